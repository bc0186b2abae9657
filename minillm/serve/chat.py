"""A conversation in the terminal, without the terminal: turns, trimming, statistics.

The history holds answers without their `<think>` part, as the chat template would drop it anyway.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import InputError
from minillm.files import write_text
from minillm.models.sampling import SamplingParams
from minillm.serve.backend import TokenSource
from minillm.serve.think import OPEN, TAIL, Part, ThinkSplitter
from minillm.settings import SamplingConfig


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
        return " · ".join([*parts, f"context {self.context_tokens}/{self.max_context}"])


class Session:
    """The turns so far, and how the next answer is made."""

    def __init__(
        self, source: TokenSource, settings: SamplingConfig | None = None, system: str = ""
    ) -> None:
        """Begin without turns."""
        self.source = source
        self.settings = settings or SamplingConfig()
        self.system = system
        self.think = False
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
        """Return how many tokens the conversation takes now."""
        return len(self._encode(self.turns)) if self.turns else 0

    def _answer(self, cancel: threading.Event) -> Iterator[Part]:
        prompt_ids, num_dropped = self._fit()
        if num_dropped:
            noun = "turn" if num_dropped == 1 else "turns"
            yield Part("notice", f"left out the {num_dropped} oldest {noun}: the context is full")
        splitter = ThinkSplitter(inside=self._opens_think(prompt_ids))
        room = self.source.max_context - len(prompt_ids)
        start, first, num_tokens = time.perf_counter(), 0.0, 0
        for delta in self.source.stream(prompt_ids, self._params(room), cancel=cancel):
            first = first or time.perf_counter()
            num_tokens += len(delta.token_ids)
            yield from splitter.feed(delta.text)
        yield from splitter.flush()
        end = time.perf_counter()
        used = len(prompt_ids) + num_tokens
        first = first or end
        limit = self.source.max_context
        self.stats = Stats(num_tokens, first - start, end - first, used, limit)

    def _params(self, room: int) -> SamplingParams:
        values = dataclasses.asdict(self.settings)
        return SamplingParams(**{**values, "max_tokens": min(self.settings.max_tokens, room)})

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.source.encode_chat([*system, *turns], enable_think=self.think)

    def _fit(self) -> tuple[list[int], int]:
        """Return the prompt, after dropping the oldest exchanges until an answer has room.

        An answer gets `max_tokens`, but a quarter of the context is always enough.
        """
        limit = self.source.max_context
        room = min(self.settings.max_tokens, limit // 4)
        turns, num_dropped = list(self.turns), 0
        prompt_ids = self._encode(turns)
        while len(prompt_ids) + room > limit and len(turns) > 1:
            del turns[: 2 if turns[1]["role"] == "assistant" else 1]
            num_dropped += 1
            prompt_ids = self._encode(turns)
        if len(prompt_ids) >= limit:
            raise InputError(
                f"the message takes {len(prompt_ids)} tokens, the context holds {limit}",
                hint="send a shorter message",
            )
        self.turns = turns
        return prompt_ids, num_dropped

    def _opens_think(self, prompt_ids: list[int]) -> bool:
        tail = self.source.tokenizer.decode(prompt_ids[-TAIL:], skip_special_tokens=False)
        return str(tail).rstrip().endswith(OPEN)


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """Return a checked turn of a saved conversation."""
    role, content = turn["role"], turn["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError(role)
    return {"role": role, "content": content}
