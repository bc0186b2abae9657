"""Bookkeeping of cache memory in blocks of tokens, and which prefixes are kept for reuse.

Memory is one number of blocks. Running sequences hold some; the rest keeps blocks that sequences
have computed, until somebody needs the room: the least recently used go first. A kept block is
found by its tokens and the kept block before it, so that equal tokens after different beginnings
are different blocks. A block is kept only while the one before it is.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

Key = tuple[int, tuple[int, ...]]
ROOT = -1


@dataclass(slots=True)
class Block:
    """A kept block."""

    uid: int
    key: Key
    """Block before it, or `ROOT`, and its tokens."""
    cost: int
    """Blocks of memory: one for the tokens, and more where a recurrent state is kept too."""
    has_state: bool


class BlockPool:
    """Who holds which share of the memory."""

    def __init__(self, num_blocks: int, block_size: int, state_cost: int = 0) -> None:
        """Begin with all memory free.

        Args:
            num_blocks: Memory in blocks.
            block_size: Tokens of a block.
            state_cost: Memory of a recurrent state, in blocks; 0: the model has none.
        """
        self.num_blocks, self.block_size, self.state_cost = num_blocks, block_size, state_cost
        self.num_held = 0
        self.num_kept = 0
        self.dropped: list[int] = []
        """Blocks that are kept no more; whoever holds their data empties the list."""
        self._kept: OrderedDict[int, Block] = OrderedDict()  # least recently used first
        self._index: dict[Key, int] = {}
        self._next = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nothing is kept in."""
        return self.num_blocks - self.num_held - self.num_kept

    def blocks_of(self, num_tokens: int) -> int:
        """Return the blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def hold(self, num: int, spare: Collection[int] = ()) -> bool:
        """Take memory for a sequence, or nothing if there is not enough.

        Args:
            num: Blocks.
            spare: Kept blocks that must stay.
        """
        if not self._make_room(num, spare):
            return False
        self.num_held += num
        return True

    def release(self, num: int) -> None:
        """Give memory of a sequence back."""
        assert 0 <= num <= self.num_held
        self.num_held -= num

    def match(self, tokens: Sequence[int], most: int) -> list[Block]:
        """Return kept blocks that begin `tokens`, at most `most`, and note their use.

        Where there is a recurrent state, the last of them has it.
        """
        found = list(self._walk(tokens, most))
        while self.state_cost and found and not found[-1].has_state:
            found.pop()
        self._touch(found)
        return found

    def keep(self, tokens: Sequence[int], num: int, *, has_state: bool) -> list[tuple[int, Block]]:
        """Keep the first `num` blocks of `tokens` as far as there is room; running ones go first.

        Args:
            tokens: A sequence.
            num: Full blocks of it.
            has_state: Whether the recurrent state after the last of them can be kept too.

        Returns:
            Blocks whose data must be copied now, and their numbers in the sequence.
        """
        known = list(self._walk(tokens, num))
        chain = {block.uid for block in known}
        new: list[tuple[int, Block]] = []
        for number in range(len(known), num):
            if not self._make_room(1, chain):
                break
            block = self._add(known[-1].uid if known else ROOT, self._slice(tokens, number))
            known.append(block)
            chain.add(block.uid)
            new.append((number, block))
        if has_state and len(known) == num and not known[-1].has_state:
            last = known[-1]
            if self._make_room(self.state_cost, chain):
                last.has_state = True
                last.cost += self.state_cost
                self.num_kept += self.state_cost
                if not new or new[-1][1] is not last:
                    new.append((num - 1, last))
        self._touch(known)
        return new

    def _walk(self, tokens: Sequence[int], most: int) -> Iterator[Block]:
        parent = ROOT
        for number in range(most):
            parent = self._index.get((parent, self._slice(tokens, number)), ROOT)
            if parent == ROOT:
                return
            yield self._kept[parent]

    def _slice(self, tokens: Sequence[int], number: int) -> tuple[int, ...]:
        start = number * self.block_size
        return tuple(tokens[start : start + self.block_size])

    def _add(self, parent: int, tokens: tuple[int, ...]) -> Block:
        block = Block(self._next, (parent, tokens), 1, has_state=False)
        self._next += 1
        self._kept[block.uid] = block
        self._index[block.key] = block.uid
        self.num_kept += 1
        return block

    def _touch(self, chain: Sequence[Block]) -> None:
        # the last first: a block is then always older than the one before it, and goes before it
        for block in reversed(chain):
            self._kept.move_to_end(block.uid)

    def _make_room(self, num: int, spare: Collection[int]) -> bool:
        missing = num - self.num_free
        if missing <= 0:
            return True
        victims, gained = [], 0
        for uid, block in self._kept.items():
            if gained >= missing:
                break
            if uid not in spare:
                victims.append(block)
                gained += block.cost
        if gained < missing:
            return False
        for block in victims:
            del self._kept[block.uid], self._index[block.key]
            self.num_kept -= block.cost
            self.dropped.append(block.uid)
        return True

    @property
    def kept(self) -> list[Block]:
        """Kept blocks, the least recently used first."""
        return list(self._kept.values())
