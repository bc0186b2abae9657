"""The two seams of serving, as small as they can be.

`TokenSource` is what makes tokens: `Generator`, or transformers' own `generate`. `Backend` is what
the HTTP layer asks of a queue before it: `Worker`, one generation at a time in one thread.
"""

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, enable_think: bool = False
    ) -> list[int]:
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

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, think: bool) -> list[int]:
        """Return the ids of a conversation and the opening of the answer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def max_prompt_bytes(self) -> int:
        """Return a size in UTF-8 bytes above which no prompt can fit the context."""

    def submit(self, runs: Sequence[Run]) -> Job:
        """Admit the runs of one request, all or none.

        Raises:
            ApiError: The queue is full (429) or nothing can be generated any more (503).
        """
