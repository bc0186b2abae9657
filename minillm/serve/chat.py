"""A conversation in the terminal, without the terminal: turns, trimming, statistics.

The history holds answers without their `<think>` part, as the chat template would drop it anyway.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from minillm.errors import InputError
from minillm.files import write_text
from minillm.serve.think import Part
from minillm.settings import SamplingConfig


class ContextFullError(InputError):
    """The conversation does not fit the context of a model behind a server."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens so far; the prompt's are 0 where they are not known."""

    prompt_tokens: int
    completion_tokens: int


class Speaker(Protocol):
    """Who answers: a model in this process, or a server."""

    max_context: int
    """Tokens that a prompt and its answer may have together; 0 if that is not known."""

    def count(self, messages: Sequence[Mapping[str, str]], *, think: bool) -> int:
        """Return the tokens of a conversation and the opening of the answer; 0 if not known."""

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: SamplingConfig,
        *,
        think: bool,
        cancel: threading.Event,
    ) -> Iterator[Part | Usage]:
        """Yield the parts of one answer, and now and then its size; stop if `cancel` is set."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What the last answer cost."""

    num_tokens: int
    first_s: float
    decode_s: float
    context_tokens: int
    max_context: int

    def __str__(self) -> str:
        """Return e.g. `42 tokens · 118 tok/s · first 35 ms · context 310/2048`."""
        parts = [f"{self.num_tokens} tokens"]
        if self.num_tokens > 1 and self.decode_s > 0:
            parts.append(f"{(self.num_tokens - 1) / self.decode_s:.0f} tok/s")
        parts.append(f"first {self.first_s * 1000:.0f} ms")
        if self.context_tokens:
            limit = f"/{self.max_context}" if self.max_context else ""
            parts.append(f"context {self.context_tokens}{limit}")
        return " · ".join(parts)


class Session:
    """The turns so far, and how the next answer is made."""

    def __init__(
        self, speaker: Speaker, settings: SamplingConfig | None = None, system: str = ""
    ) -> None:
        """Begin without turns."""
        self.speaker = speaker
        self.settings = settings or SamplingConfig()
        self.system = system
        self.think = False
        self.thoughts: Literal["on", "off", "fold"] = "fold"
        self.turns: list[dict[str, str]] = []
        self.stats: Stats | None = None

    def ask(self, text: str, cancel: threading.Event | None = None) -> Iterator[Part]:
        """Add a user turn, yield the answer's parts, and keep the answer.

        If `cancel` is set meanwhile, what was said so far is kept.

        Raises:
            InputError: The message alone does not fit the context; the turns stay as they were.
        """
        self.turns.append({"role": "user", "content": text})
        answer = ""
        try:
            for part in self._answer(cancel or threading.Event()):
                answer += part.text if part.kind == "text" else ""
                yield part
        finally:  # also when the reader stops early
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()

    def undo(self) -> str | None:
        """Take back the last question and its answer; return the question."""
        question = None
        while self.turns and question is None:
            turn = self.turns.pop()
            question = turn["content"] if turn["role"] == "user" else None
        return question

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()
        self.stats = None

    def save(self, path: Path) -> None:
        """Write the conversation as JSON."""
        tree = {"system": self.system, "messages": self.turns, "think": self.think}
        tree |= {"settings": dataclasses.asdict(self.settings)}
        write_text(path, json.dumps(tree, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Replace the conversation and its settings by a saved one.

        Raises:
            InputError: The file is missing or is not a saved conversation.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            turns = [_turn(turn) for turn in tree["messages"]]
            settings = SamplingConfig(**tree.get("settings", {}))
            system, think = str(tree.get("system", "")), bool(tree.get("think", False))
        except OSError as err:
            raise InputError(f"cannot read `{path}`: {err.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            hint = "`/save FILE` writes one"
            raise InputError(f"`{path}` is not a saved conversation", hint=hint) from None
        self.turns, self.settings, self.system, self.think = turns, settings, system, think

    def context_tokens(self) -> int:
        """Return how many tokens the conversation takes now, or took in the last answer."""
        if not self.turns:
            return 0
        counted = self._count(self.turns)
        return counted or (self.stats.context_tokens if self.stats else 0)

    def _answer(self, cancel: threading.Event) -> Iterator[Part]:
        turns, num_dropped = self._fit()
        while True:
            if num_dropped:
                noun = "turn" if num_dropped == 1 else "turns"
                yield Part(
                    "notice", f"left out the {num_dropped} oldest {noun}: the context is full"
                )
            try:
                yield from self._speak(turns, cancel)
            except ContextFullError:
                if len(turns) == 1:
                    raise
                num_dropped += _drop_oldest(turns)
                continue
            return

    def _speak(self, turns: list[dict[str, str]], cancel: threading.Event) -> Iterator[Part]:
        """Yield one answer's parts and set the statistics, however it ends."""
        start, first, usage = time.perf_counter(), 0.0, Usage(0, 0)
        messages = self._messages(turns)
        try:
            for piece in self.speaker.answer(
                messages, self.settings, think=self.think, cancel=cancel
            ):
                self.turns = turns
                if isinstance(piece, Usage):
                    usage = piece
                    if usage.completion_tokens:
                        first = first or time.perf_counter()
                else:
                    first = first or time.perf_counter()
                    yield piece
        finally:
            end = time.perf_counter()
            first = first or end
            used = usage.prompt_tokens and usage.prompt_tokens + usage.completion_tokens
            self.stats = Stats(
                num_tokens=usage.completion_tokens,
                first_s=first - start,
                decode_s=end - first,
                context_tokens=used,
                max_context=self.speaker.max_context,
            )

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *turns]

    def _count(self, turns: list[dict[str, str]]) -> int:
        return self.speaker.count(self._messages(turns), think=self.think)

    def _fit(self) -> tuple[list[dict[str, str]], int]:
        """Return the turns, without the oldest exchanges if an answer had no room otherwise.

        An answer gets `max_tokens`, but a quarter of the context is always enough.
        """
        limit = self.speaker.max_context
        room = min(self.settings.max_tokens, limit // 4)
        turns, num_dropped = list(self.turns), 0
        num_tokens = self._count(turns)
        while num_tokens and num_tokens + room > limit and len(turns) > 1:
            num_dropped += _drop_oldest(turns)
            num_tokens = self._count(turns)
        if num_tokens and num_tokens >= limit:
            raise InputError(
                f"the message takes {num_tokens} tokens, the context holds {limit}",
                hint="send a shorter message",
            )
        return turns, num_dropped


def _drop_oldest(turns: list[dict[str, str]]) -> int:
    """Take the oldest exchange away; return 1."""
    del turns[: 2 if turns[1]["role"] == "assistant" else 1]
    return 1


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """Return a checked turn of a saved conversation."""
    role, content = turn["role"], turn["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError(role)
    return {"role": role, "content": content}
