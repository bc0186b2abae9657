"""The two seams of serving, as small as they can be.

`TokenSource` is what makes tokens: `Generator`, or transformers' own `generate`. `Backend` is what
the HTTP layer asks of a queue before it: `Worker`, one generation at a time in one thread, or the
engine. `minillm.serve.texts.TextSide` is the half of a backend that both share.
"""

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from minillm.models.generator import Delta
from minillm.models.sampling import SamplingParams


class TokenSource(Protocol):
    """The part of `minillm.models.generator.Generator` that serving uses."""

    tokenizer: Any

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    def vocab_size(self) -> int:
        """Ids from 0 below this one exist."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a conversation and the opening of the answer."""

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Yield the answer in pieces."""


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to make."""

    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a backend is doing now."""

    num_running: int
    """Answers in work."""
    num_waiting: int
    """Requests that wait for their turn."""
    cache_usage: float = 0.0
    """Share of the cache in use, 0 to 1."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """More totals since the start, e.g. `prefix_hit_tokens`; they only grow."""


class Job(Protocol):
    """An admitted request of one or more runs."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index of the run, delta) until every run has had its last delta.

        Raises whatever made the generation fail.
        """

    def abort(self) -> None:
        """Give up the runs that are not done and free their place. May be called twice."""


class Backend(Protocol):
    """Text in and out of tokens, and a queue of jobs."""

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    def vocab_size(self) -> int:
        """Ids from 0 below this one exist."""

    @property
    def is_alive(self) -> bool:
        """Whether jobs can still be done."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""

    @property
    def template(self) -> str:
        """The chat template's text; empty if there is none."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation and the opening of the answer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for."""

    def max_prompt_bytes(self) -> int:
        """Return a size in UTF-8 bytes above which no prompt can fit the context."""

    def stats(self) -> Stats:
        """Return what is being done now; quick, from any thread."""

    def submit(self, runs: Sequence[Run]) -> Job:
        """Admit the runs of one request, all or none.

        Raises:
            ApiError: The queue is full (429) or nothing can be generated any more (503).
        """
