"""Who is computed in the next step: admission, chunks of prompts, preemption, slots. No tensors.

Every step computes one token (and guesses) of each running answer, and beside them up to
`prefill_chunk` tokens of prompts, the earliest request first. Requests enter in the order of their
arrival: who has no room yet waits, and nobody overtakes. When answers have grown until memory is
full, the latest one in loses its place and waits again, its answer so far as part of its prompt;
the earliest one always goes on, so that everyone comes to an end.

A sequence in work has a slot of the cache. Slots are dense: 0 to n - 1, those that decode before
those whose prompts are not done, so that a batch is one piece of memory.
"""

import bisect
from dataclasses import dataclass

from minillm.serve.blocks import BlockPool
from minillm.serve.sequence import (
    Chunk,
    Drop,
    Load,
    Move,
    Operation,
    Plan,
    Reset,
    Save,
    Sequence,
    Status,
    Swap,
)


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    prefix_hits: int = 0
    """Admissions that found a part of their prompt in the cache."""
    prefix_tokens: int = 0
    """Prompt tokens that were found there, and not computed."""
    prefill_tokens: int = 0
    """Prompt tokens that were computed, again ones included."""
    preemptions: int = 0


class Scheduler:
    """Plans steps; the caller computes them and reports what came out."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        prefill_chunk: int,
        has_state: bool = False,
        keeps_prefixes: bool = True,
    ) -> None:
        """Begin with nothing to do.

        Args:
            pool: The cache's memory.
            max_running: Slots.
            prefill_chunk: Most prompt tokens of a step.
            has_state: The model has a recurrent state, which is known only where a chunk ends.
            keeps_prefixes: Keep computed blocks for sequences that begin alike.
        """
        self.pool, self.max_running, self.prefill_chunk = pool, max_running, prefill_chunk
        self.has_state, self.keeps_prefixes = has_state, keeps_prefixes
        self.waiting: list[Sequence] = []
        self.slots: list[Sequence] = []
        self.num_decoding = 0
        self.counters = Counters()
        self._operations: list[Operation] = []

    @property
    def has_work(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.waiting or self.slots)

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence may have; one alone must fit into the memory."""
        return self.pool.num_blocks * self.pool.block_size

    # --------------------------------------------------------------------- in and out

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        assert 0 < len(sequence.tokens) <= sequence.limit <= self.max_tokens
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=lambda one: one.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever it is doing; its memory is free at once."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is not Status.DONE:
            self._leave(sequence)
        sequence.status = Status.DONE

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot, and close the gap."""
        gap = sequence.slot
        if sequence.status is Status.DECODE:
            self.num_decoding -= 1
            gap = self._fill(gap, self.num_decoding)
        self._fill(gap, len(self.slots) - 1)
        self.slots.pop()
        self.pool.release(sequence.num_blocks)
        sequence.slot, sequence.num_blocks, sequence.num_computed = -1, 0, 0
        sequence.num_stored, sequence.drafts = 0, ()

    def _fill(self, gap: int, last: int) -> int:
        """Move the sequence in slot `last` into `gap`; return the new gap."""
        if gap != last:
            moved = self.slots[last]
            self.slots[gap], moved.slot = moved, gap
            self._operations.append(Move(last, gap, moved.num_fed))
        return last

    # ---------------------------------------------------------------------- a step

    def plan(self) -> Plan:
        """Decide the next step: its decodes are computed first, then its chunks, in their order."""
        self._grow()
        chunks = self._chunks()
        return Plan(self.slots[: self.num_decoding], chunks)

    def take_operations(self) -> list[Operation]:
        """Return what must be done to the cache, in this order, before anything else is computed.

        Call it after `plan` and after every report: slots have then changed already.
        """
        operations, self._operations = self._operations, []
        return operations

    def _note_drops(self) -> None:
        self._operations += [Drop(uid) for uid in self.pool.dropped]
        self.pool.dropped.clear()

    def _grow(self) -> None:
        """Give every answer room for its next tokens; the latest pay if there is none."""
        for sequence in sorted(self.slots[: self.num_decoding], key=lambda one: one.arrival):
            while sequence.status is Status.DECODE and not self._has_room(sequence):
                if sequence.drafts:
                    sequence.drafts = ()
                else:
                    self._preempt(max(self.slots, key=lambda one: one.arrival))

    def _has_room(self, sequence: Sequence) -> bool:
        tokens = min(len(sequence.tokens) + len(sequence.drafts), sequence.limit)
        missing = self.pool.blocks_of(tokens) - sequence.num_blocks
        if missing > 0:
            has_room = self.pool.hold(missing)
            self._note_drops()
            if not has_room:
                return False
            sequence.num_blocks += missing
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        self.add(sequence)

    def _chunks(self) -> list[Chunk]:
        """Share the step's prompt tokens out: first to those in slots, then to those who wait."""
        budget, chunks = self.prefill_chunk, []
        queue = sorted(self.slots[self.num_decoding :], key=lambda one: one.arrival)
        while budget > 0:
            sequence = queue.pop(0) if queue else self._admit()
            if sequence is None:
                break
            start = sequence.num_computed
            for length in self._lengths(sequence, budget):
                chunks.append(Chunk(sequence, start, length))
                start += length
                budget -= length
        self.counters.prefill_tokens += sum(chunk.length for chunk in chunks)
        return chunks

    def _lengths(self, sequence: Sequence, budget: int) -> list[int]:
        """Return the lengths of the next chunks of a prompt.

        Where there is a state, a chunk ends at the prompt's last whole block too: to keep it.
        """
        length = min(budget, sequence.num_pending)
        end, size = sequence.num_computed + length, self.pool.block_size
        border = end // size * size
        first = border - sequence.num_computed
        if self._keeps(sequence) and self.has_state and 0 < first < length:
            return [first, length - first] if end == len(sequence.tokens) else [first]
        return [length]

    def _keeps(self, sequence: Sequence) -> bool:
        return self.keeps_prefixes and sequence.reuses_prefix

    def _admit(self) -> Sequence | None:
        """Give the first in the queue a slot and memory for its prompt, if there are any."""
        if not self.waiting or len(self.slots) >= self.max_running:
            return None
        sequence, pool = self.waiting[0], self.pool
        found = []
        if self._keeps(sequence):
            # the last token is always computed: its logits are wanted
            found = pool.match(sequence.tokens, (len(sequence.tokens) - 1) // pool.block_size)
        need = pool.blocks_of(len(sequence.tokens))
        # those who run will soon need a block each; else one would enter only to be preempted
        if self.slots and pool.num_blocks - pool.num_held < need + len(self.slots):
            return None
        if not pool.hold(need, [block.uid for block in found]):
            found = []
            if not pool.hold(need):
                return None
        self._note_drops()
        self.waiting.pop(0)
        sequence.status, sequence.slot = Status.PREFILL, len(self.slots)
        sequence.num_blocks, sequence.num_stored = need, len(found)
        sequence.num_computed = len(found) * pool.block_size
        self.slots.append(sequence)
        self._operations.append(Reset(sequence.slot))
        if found:
            self._operations.append(Load(tuple(block.uid for block in found), sequence.slot))
            self.counters.prefix_hits += 1
            self.counters.prefix_tokens += sequence.num_computed
        return sequence

    # --------------------------------------------------------------------- results

    def computed(self, sequence: Sequence, num: int) -> None:
        """Note that the cache has `num` more tokens of a sequence; keep blocks that are full."""
        sequence.num_computed += num
        assert sequence.num_computed <= len(sequence.tokens)
        if sequence.status is Status.PREFILL and sequence.num_pending == 0:
            self._start_decoding(sequence)
        full = sequence.num_computed // self.pool.block_size
        if self._keeps(sequence) and full > sequence.num_stored:
            is_at_border = sequence.num_computed == full * self.pool.block_size
            has_state = self.has_state and is_at_border
            new = self.pool.keep(sequence.tokens, full, has_state=has_state)
            self._note_drops()
            for number, block in new:
                start, state = number * self.pool.block_size, has_state and number == full - 1
                save = Save(block.uid, sequence.slot, start, has_state=state and block.has_state)
                self._operations.append(save)
            sequence.num_stored = full

    def _start_decoding(self, sequence: Sequence) -> None:
        first = self.num_decoding
        self.num_decoding += 1
        sequence.status = Status.DECODE
        if sequence.slot != first:
            other, slot = self.slots[first], sequence.slot
            length = max(sequence.num_fed, other.num_fed)
            self._operations.append(Swap(slot, first, length))
            self.slots[first], self.slots[slot] = sequence, other
            sequence.slot, other.slot = first, slot
