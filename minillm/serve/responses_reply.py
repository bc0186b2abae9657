"""Answers of OpenAI's Responses API: items instead of messages, named and numbered events."""

import copy
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from minillm.errors import MinillmError
from minillm.models.generator import Delta
from minillm.serve.answer_items import AnswerItems
from minillm.serve.logprobs import TokenBytes, Visible, chat_logprobs
from minillm.serve.problems import error_body
from minillm.serve.replies import Reply
from minillm.serve.tool_calls import Call

Event = dict[str, Any]
PARTS = {"text": "output_text", "think": "reasoning_text"}


class ResponseReply(Reply):
    """`response` and its events; a `<think>` part becomes a reasoning item."""

    prefix, kind = "resp_", "response"
    end_mark, names_events = "", True

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        *,
        items: AnswerItems,
        fields: Mapping[str, Any],
        bytes_of: TokenBytes | None = None,
        keep: Callable[[Event], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            model: The name that the client used.
            prompt_tokens: Tokens of the prompt.
            items: Reads the answer.
            fields: What the response repeats of its request.
            bytes_of: Gives a token's bytes; with it log-probabilities are reported.
            keep: Gets the response when it is whole.
        """
        super().__init__(model, prompt_tokens, 1)
        self._items, self._fields, self._keep = items, fields, keep
        self._bytes_of = bytes_of
        self._visible = Visible(bytes_of) if bytes_of else None
        self._output: list[Event] = []
        self._open: Event | None = None
        """The last item, as long as text is added to it."""
        self._logprobs: list[Event] = []
        """Of text that has not been shown yet."""
        self._reasoning_tokens = self._num_events = 0

    def usage(self) -> dict[str, Any]:
        """Return the token counts."""
        total = self._prompt_tokens + self._completion_tokens
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self._completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": total,
        }

    def body(self) -> Event:
        """Return the whole response."""
        made = self._snapshot("completed" if self._finish[0] == "stop" else "incomplete")
        if self._keep is not None:
            self._keep(made)
        return made

    def opening(self) -> list[Event]:
        """Return the events that go out before any token."""
        begun = self._snapshot("in_progress")
        names = ("created", "in_progress")
        return [self._event(f"response.{name}", response=begun) for name in names]

    def closing(self, *, include_usage: bool) -> list[Event]:
        """Return the last event."""
        made = self.body()
        return [self._event(f"response.{made['status']}", response=made)]

    def failure(self, error: Exception) -> list[Event]:
        """Return the last event of an answer that fails."""
        message = error_body(error)["error"]["message"] if isinstance(error, MinillmError) else ""
        shown = {"code": "server_error", "message": message or "internal error"}
        failed = {**self._snapshot("failed"), "error": shown}
        return [self._event("response.failed", response=failed)]

    def _snapshot(self, status: str) -> Event:
        is_over = status in ("completed", "incomplete")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head["id"],
            "object": self.kind,
            "created_at": self._head["created"],
            "model": self._head["model"],
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": [dict(item) for item in self._output],
            "usage": self.usage() if is_over else None,
            **self._fields,
        }

    # ------------------------------------------------------------------------ events

    def _take(self, index: int, delta: Delta) -> list[Event]:
        self._measure(delta)
        was_thinking = self._items.is_thinking
        events: list[Event] = []
        for item in self._items.feed(delta.text, is_end=bool(delta.finish_reason)):
            if isinstance(item, Call):
                events += [*self._close(), *self._call(item)]
            else:
                events += self._text(item.kind, item.text)
        if was_thinking or self._items.is_thinking:
            self._reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason:
            if not self._output:
                events += self._text("text", "")
            is_cut = delta.finish_reason == "length"
            events += self._close("incomplete" if is_cut else "completed")
            self._finish[0] = delta.finish_reason
        return events

    def _text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        name = "message" if kind == "text" else "reasoning"
        if self._open is None or self._open["type"] != name:
            events += [*self._close(), *self._begin(name, kind)]
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: Event = {}
        if kind == "text":
            more["logprobs"], self._logprobs = self._logprobs, []
            part["logprobs"] += more["logprobs"]
        if text:
            event = f"response.{PARTS[kind]}.delta"
            events.append(self._event(event, **self._place(), content_index=0, delta=text, **more))
        return events

    def _begin(self, name: str, kind: str) -> list[Event]:
        part: Event = {"type": PARTS[kind], "text": ""}
        short = "msg" if name == "message" else "rs"
        item: Event = {"id": f"{short}_{uuid.uuid4().hex}", "type": name, "status": "in_progress"}
        if name == "message":
            item["role"] = "assistant"
            part |= {"annotations": [], "logprobs": []}
        else:
            item["summary"] = []
        index = len(self._output)
        added = self._event(
            "response.output_item.added", output_index=index, item={**item, "content": []}
        )
        self._open = {**item, "content": [part]}
        self._output.append(self._open)
        name = "response.content_part.added"
        return [
            added,
            self._event(name, **self._place(), content_index=0, part=copy.deepcopy(part)),
        ]

    def _close(self, status: str = "completed") -> list[Event]:
        """End the item that is open."""
        if self._open is None:
            return []
        item, place = self._open, {**self._place(), "content_index": 0}
        part = item["content"][0]
        item["status"] = status
        self._open = None
        more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        name = f"response.{part['type']}.done"
        return [
            self._event(name, **place, text=part["text"], **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _call(self, call: Call) -> list[Event]:
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        self._output.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        index = len(self._output) - 1
        place = {"item_id": item["id"], "output_index": index}
        name = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event(f"{name}.delta", **place, delta=call.arguments),
            self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _place(self) -> Event:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1}

    def _measure(self, delta: Delta) -> None:
        if self._visible is None or self._bytes_of is None or delta.logprobs is None:
            return
        is_stopped = delta.finish_reason == "stop"
        num = self._visible.count(delta.text, delta.token_ids, is_stopped=is_stopped)
        found = chat_logprobs(delta.logprobs[:num], self._bytes_of)["content"]
        if not self._items.is_thinking:
            self._logprobs += found

    def _event(self, name: str, /, **fields: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": name, "sequence_number": number, **fields}
