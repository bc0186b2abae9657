"""Responses that can be fetched and continued: in memory, bounded, gone with the server."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm.serve.problems import ApiError, short

MAX_BYTES = 64 * 2**20
"""Size of all stored responses as JSON; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, and all that went before it."""

    body: Mapping[str, Any]
    items: list[dict[str, Any]]
    """Input, with that of the responses it goes on from."""
    size: int

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Items for a response that goes on from this one."""
        return [*self.items, *self.body["output"]]


class ResponseStore:
    """Responses by id; used in the event loop only."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Begin empty."""
        self._max_bytes, self._size = max_bytes, 0
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def put(self, body: Mapping[str, Any], items: list[dict[str, Any]]) -> None:
        """Keep a response; older ones make room."""
        size = len(json.dumps([body, items], ensure_ascii=False).encode())
        self._kept[body["id"]] = Stored(body, items, size)
        self._size += size
        while self._size > self._max_bytes:
            self._size -= self._kept.popitem(last=False)[1].size

    def get(self, uid: str, param: str = "response_id") -> Stored:
        """Return a response.

        Raises:
            ApiError: 404 if it is not here (any more).
        """
        if uid not in self._kept:
            message = f"no response `{short(uid)}` here; only recent ones with `store` are kept"
            raise ApiError(message, status=404, code="not_found", param=param)
        return self._kept[uid]

    def delete(self, uid: str) -> None:
        """Forget a response.

        Raises:
            ApiError: 404 if it is not here.
        """
        self._size -= self.get(uid).size
        del self._kept[uid]


def list_items(
    stored: Stored, *, limit: int, order: str, after: str | None = None
) -> dict[str, Any]:
    """Return a page of a response's input, in the form of OpenAI's lists."""
    shown = [_show(item, f"{stored.body['id']}-{n}") for n, item in enumerate(stored.items)]
    if order == "desc":
        shown.reverse()
    ids = [item["id"] for item in shown]
    start = ids.index(after) + 1 if after in ids else 0
    page = shown[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(shown),
    }


def _show(item: dict[str, Any], uid: str) -> dict[str, Any]:
    shown = {"id": f"item_{uid}", "type": "message", "status": "completed", **item}
    if shown["type"] == "message" and isinstance(text := shown.get("content"), str):
        kind = "output_text" if shown.get("role") == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": text}
        shown["content"] = [part | ({"annotations": []} if kind == "output_text" else {})]
    return shown
