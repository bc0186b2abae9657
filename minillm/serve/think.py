"""Split a streamed answer into its `<think>` part and the rest.

Works on text, so a tag may arrive in pieces; what may still become a tag is held back. Only a tag
at the very beginning of the answer opens a think part: later ones are ordinary text.
"""

import re
from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
TAIL = 16
"""Last tokens of a prompt in which an open tag is looked for, however it is tokenized."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one kind of text; a `notice` is ours, not the model's."""

    kind: Literal["think", "text", "notice"]
    text: str


class ThinkSplitter:
    """Feed text in any pieces, get parts; white space around the think part is dropped."""

    def __init__(self, *, inside: bool = False) -> None:
        """Start at the beginning of an answer, or `inside` if the prompt opened the tag."""
        self._state: Literal["start", "think", "after", "text"] = "think" if inside else "start"
        self._held = ""
        self._empty = True

    @property
    def is_inside(self) -> bool:
        """Whether the think part is open."""
        return self._state == "think"

    def feed(self, text: str) -> list[Part]:
        """Return the parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            self._begin()
        if self._state == "think":
            parts += self._think()
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "after"
        if self._state == "text" and self._held:
            parts.append(Part("text", self._held))
            self._held = ""
        return parts

    def flush(self) -> list[Part]:
        """Return what was held back when the answer has ended."""
        rest, self._held = self._held, ""
        kind: Literal["think", "text"] = "think" if self._state == "think" else "text"
        if kind == "think":
            rest = rest.rstrip()
        return [Part(kind, rest)] if rest and self._state != "after" else []

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._state, self._held = "think", start[len(OPEN) :]
        elif not OPEN.startswith(start):
            self._state = "text"

    def _think(self) -> list[Part]:
        body, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = "after", rest
            body = body.rstrip()
        else:
            body = body[: len(body) - _tail(body)]
            self._held = self._held[len(body) :]
        if self._empty:
            body = body.lstrip()
            self._empty = not body
        return [Part("think", body)] if body else []


def _tail(text: str) -> int:
    """Return how many last characters may belong to white space before `</think>`."""
    size = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
    space = re.search(r"\s*$", text[: len(text) - size])
    return size + (len(space.group()) if space else 0)
