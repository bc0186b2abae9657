"""Responses of the OpenAI API, built from deltas as they come.

One reply object serves both modes: `feed` returns the chunks of a stream, `body` the whole.
Clients trip over small things, so these hold: one id and `created` throughout, the role first,
exactly one `finish_reason` per choice, reasoning and content never in one chunk, and usage counted
in tokens.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.errors import RunError
from minillm.models.generator import Delta
from minillm.serve.answer_items import AnswerItems
from minillm.serve.logprobs import CompletionLogprobs, TokenBytes, Visible, chat_logprobs
from minillm.serve.problems import error_body
from minillm.serve.tool_calls import Call


class Reply:
    """What chat and plain completions share."""

    prefix, kind, chunk_kind = "", "", ""
    end_mark = "data: [DONE]\n\n"
    """What closes a stream."""
    names_events = False
    """Whether an event's name stands before its data too."""

    def __init__(self, model: str, prompt_tokens: int, num_choices: int) -> None:
        """Begin a reply of `num_choices` answers; `prompt_tokens` counts each prompt once."""
        self._head = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens, self._completion_tokens = prompt_tokens, 0
        self._finish: list[str | None] = [None] * num_choices

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks that go out before any token."""
        return []

    def feed(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Take a delta of choice `index` and return its chunks.

        Raises:
            RunError: The generation was cut short by the server.
        """
        self._completion_tokens += len(delta.token_ids)
        if delta.finish_reason == "cancelled":
            raise RunError("the server stopped this generation")
        return self._take(index, delta)

    def check_finished(self) -> None:
        """Raise RunError unless every choice has come to its end."""
        if None in self._finish:
            raise RunError("the server stopped this generation")

    def usage(self) -> dict[str, int]:
        """Return the token counts."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def closing(self, *, include_usage: bool) -> list[dict[str, Any]]:
        """Return the last chunks of a stream; the usage if it was asked for."""
        return [{**self._chunk([]), "usage": self.usage()}] if include_usage else []

    def failure(self, error: Exception) -> list[dict[str, Any]]:
        """Return the last chunks of a stream that fails."""
        return [error_body(error)]

    def body(self) -> dict[str, Any]:
        """Return the response of a request that does not stream."""
        choices = [self._choice(index) for index in range(len(self._finish))]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _take(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        raise AssertionError("each kind of reply has its own")

    def _choice(self, index: int) -> dict[str, Any]:
        raise AssertionError("each kind of reply has its own")


class ChatReply(Reply):
    """`chat.completion` and its chunks; a `<think>` part becomes `reasoning_content`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        num_choices: int,
        *,
        items: Sequence[AnswerItems],
        bytes_of: TokenBytes | None = None,
    ) -> None:
        """Begin.

        Args:
            model: The name that the client used.
            prompt_tokens: Tokens of the prompt.
            num_choices: Answers.
            items: One for each answer.
            bytes_of: Gives a token's bytes; with it log-probabilities are reported.
        """
        super().__init__(model, prompt_tokens, num_choices)
        self._bytes_of = bytes_of
        self._visible = [Visible(bytes_of) for _ in range(num_choices)] if bytes_of else []
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(num_choices)]
        self._items = items

    def opening(self) -> list[dict[str, Any]]:
        """Return one chunk per choice that names the role."""
        first = {"role": "assistant", "content": ""}
        return [self._delta(index, first) for index in range(len(self._finish))]

    def _take(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        answer = self._items[index]
        num_calls = len(answer.calls)
        chunks = []
        for item in answer.feed(delta.text, is_end=bool(delta.finish_reason)):
            if isinstance(item, Call):
                fields: dict[str, Any] = {"tool_calls": [{"index": num_calls, **item.body()}]}
                num_calls += 1
            else:
                fields = _fields(item.kind, item.text)
            chunks.append(self._delta(index, fields))
        if found := self._measure(index, delta):
            if not chunks:
                chunks = [self._delta(index, {"content": ""})]
            chunks[0]["choices"][0]["logprobs"] = {"content": found, "refusal": None}
        if delta.finish_reason:
            is_call = num_calls and delta.finish_reason == "stop"
            self._finish[index] = "tool_calls" if is_call else delta.finish_reason
            chunks.append(self._delta(index, {}, self._finish[index]))
        return chunks

    def _measure(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        if self._bytes_of is None or delta.logprobs is None:
            return []
        is_stopped = delta.finish_reason == "stop"
        num = self._visible[index].count(delta.text, delta.token_ids, is_stopped=is_stopped)
        found: list[dict[str, Any]] = chat_logprobs(delta.logprobs[:num], self._bytes_of)["content"]
        self._logprobs[index] += found
        return found

    def _delta(
        self, index: int, fields: Mapping[str, Any], finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": fields, "logprobs": None, "finish_reason": finish}
        return self._chunk([choice])

    def _choice(self, index: int) -> dict[str, Any]:
        answer = self._items[index]
        think, text = answer.text_of("think"), answer.text_of("text")
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := answer.calls:
            message["content"] = text or None
            message["tool_calls"] = [call.body() for call in calls]
        if think:
            message |= _fields("think", think)
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": self._logprobs[index], "refusal": None}
            if self._bytes_of
            else None,
            "finish_reason": self._finish[index],
        }


def _fields(kind: str, text: str) -> dict[str, str]:
    if kind == "think":  # two names, for clients are split between them
        return {"reasoning_content": text, "reasoning": text}
    return {"content": text}


class CompletionReply(Reply):
    """`text_completion`; the chunks of a stream have the same name."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        num_choices: int,
        *,
        echoes: Sequence[tuple[str, Sequence[int]]],
        bytes_of: TokenBytes | None = None,
    ) -> None:
        """Begin.

        Args:
            model: The name that the client used.
            prompt_tokens: Tokens of all prompts.
            num_choices: Answers over all prompts.
            echoes: The prompt that each choice starts with, as text and ids; or empty.
            bytes_of: Gives a token's bytes; with it log-probabilities are reported.
        """
        super().__init__(model, prompt_tokens, num_choices)
        self._echoes, self._bytes_of = echoes, bytes_of
        self._texts: list[list[str]] = [[echo] for echo, _ in echoes] or [
            [] for _ in range(num_choices)
        ]
        self._visible = [Visible(bytes_of) for _ in range(num_choices)] if bytes_of else []
        self._counts = (
            [CompletionLogprobs(bytes_of) for _ in range(num_choices)] if bytes_of else []
        )
        self._logprobs: list[dict[str, list[Any]]] = [{} for _ in range(num_choices)]

    def opening(self) -> list[dict[str, Any]]:
        """Return the prompts, if they are to be echoed; measured ones come later."""
        if self._bytes_of:
            return []
        return [self._text_chunk(i, echo) for i, (echo, _) in enumerate(self._echoes) if echo]

    def _take(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        self._texts[index].append(delta.text)
        self._finish[index] = delta.finish_reason
        found: dict[str, list[Any]] | None = None
        chunks = []
        if self._bytes_of:
            if delta.prompt_logprobs is not None and self._echoes:
                text, ids = self._echoes[index]
                first = self._note(index, self._counts[index].take(ids, delta.prompt_logprobs))
                chunks.append(self._text_chunk(index, text, logprobs=first))
            is_stopped = delta.finish_reason == "stop"
            num = self._visible[index].count(delta.text, delta.token_ids, is_stopped=is_stopped)
            measured = (delta.logprobs or ())[:num]
            ids = delta.token_ids[: len(measured)]
            found = self._note(index, self._counts[index].take(ids, measured))
        if delta.text or delta.finish_reason:
            chunks.append(self._text_chunk(index, delta.text, delta.finish_reason, found))
        return chunks

    def _note(self, index: int, found: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in found.items():
            self._logprobs[index].setdefault(key, []).extend(values)
        return found

    def _text_chunk(
        self,
        index: int,
        text: str,
        finish: str | None = None,
        logprobs: dict[str, list[Any]] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk([choice])

    def _choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(self._texts[index]),
            "logprobs": self._logprobs[index] or None,
            "finish_reason": self._finish[index],
        }
