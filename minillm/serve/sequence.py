"""One answer in the making, as the scheduler sees it: tokens and numbers, no tensors."""

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """In the queue: new, or preempted."""
    PREFILL = "prefill"
    """In a slot; some of its tokens but the last are not computed yet."""
    DECODE = "decode"
    """In a slot; only its newest tokens are not computed yet."""
    DONE = "done"


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what follows it.

    The cache holds the first `num_computed` tokens. The next forward pass takes the others, and
    `drafts` after them.
    """

    arrival: int
    """Smaller came first, and goes first."""
    tokens: list[int]
    """The prompt, then the answer."""
    limit: int
    """Most tokens that prompt and answer may have together."""
    reuses_prefix: bool = True
    """Whether computed blocks of others may stand in for its own."""
    request: Any = None
    """What the engine knows of it; the scheduler never looks."""
    num_prompt: int = 0
    status: Status = Status.WAITING
    slot: int = -1
    num_computed: int = 0
    num_blocks: int = 0
    """Blocks of memory that it holds."""
    num_stored: int = 0
    """Blocks from its start that have been offered to the prefix store."""
    drafts: Seq[int] = field(default=())
    """Guesses at the tokens that come next."""
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        """Note how long the prompt is."""
        self.num_prompt = len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def num_fed(self) -> int:
        """Tokens that the cache may have something of, reported or not."""
        decodes = self.status is Status.DECODE
        return len(self.tokens) + len(self.drafts) if decodes else self.num_computed

    @property
    def answer(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy what the cache has of one slot over another's."""

    source: int
    target: int
    length: int
    """Tokens that matter."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Exchange two slots."""

    first: int
    second: int
    length: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget the state of a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Save:
    """Copy a block of a slot into the prefix store."""

    block: int
    slot: int
    start: int
    """Its first token's position."""
    has_state: bool
    """Also the recurrent state, which is that after the block's last token."""


@dataclass(frozen=True, slots=True)
class Load:
    """Copy blocks of the prefix store to the beginning of a slot, and the last one's state."""

    blocks: tuple[int, ...]
    slot: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free a block of the prefix store."""

    block: int


Operation = Move | Swap | Reset | Save | Load | Drop


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of a prompt to compute."""

    sequence: Sequence
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes."""

    decodes: list[Sequence]
    """Slots 0, 1, 2 … in this order; each takes its pending tokens and its drafts."""
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        fed = sum(one.num_pending + len(one.drafts) for one in self.decodes)
        return fed + sum(chunk.length for chunk in self.chunks)
