"""Schedules of any kind against a simulated cache that notices every wrong copy. No torch."""

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.serve.blocks import BlockPool
from minillm.serve.scheduler import Scheduler
from minillm.serve.sequence import Drop, Load, Move, Reset, Save, Sequence, Status, Swap


class SimulatedCache:
    """Slots hold the tokens themselves, and a "state": all tokens so far."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.states: list[tuple[int, ...]] = [()] * num_slots
        self.blocks: dict[int, tuple[list[int], tuple[int, ...] | None]] = {}
        self.size = block_size

    def apply(self, scheduler: Scheduler) -> None:
        slots, states, size = self.slots, self.states, self.size
        for op in scheduler.take_operations():
            match op:
                case Move(source, target, length):
                    slots[target], states[target] = slots[source][:length], states[source]
                case Swap(a, b, length):
                    slots[a], slots[b] = slots[b][:length], slots[a][:length]
                    states[a], states[b] = states[b], states[a]
                case Reset(slot):
                    slots[slot], states[slot] = [], ()
                case Save(block, slot, start, has_state):
                    known = self.blocks.get(block, (None, None))[1]
                    data = slots[slot][start : start + size]
                    assert len(data) == size
                    if has_state:
                        assert len(states[slot]) == start + size
                    self.blocks[block] = data, states[slot] if has_state else known
                case Load(blocks, slot):
                    slots[slot] = [t for block in blocks for t in self.blocks[block][0]]
                    states[slot] = self.blocks[blocks[-1]][1] or ()
                case Drop(block):
                    del self.blocks[block]
        assert set(self.blocks) == {block.uid for block in scheduler.pool.kept}

    def feed(self, sequence: Sequence, start: int, tokens: list[int], has_state: bool) -> None:
        """Compute tokens; what came before must be there."""
        slot = self.slots[sequence.slot]
        assert slot[:start] == sequence.tokens[:start]
        if has_state:
            assert self.states[sequence.slot] == tuple(sequence.tokens[:start])
        self.slots[sequence.slot] = slot[:start] + tokens
        self.states[sequence.slot] = (*self.states[sequence.slot], *tokens)


class World:
    """A scheduler, a simulated cache, and answers that depend on all tokens before."""

    def __init__(
        self, num_blocks: int, size: int, *, max_running: int, chunk: int, has_state: bool,
        keeps: bool = True,
    ) -> None:  # fmt: skip
        pool = BlockPool(num_blocks, size, state_cost=2 if has_state else 0)
        self.scheduler = Scheduler(
            pool, max_running=max_running, prefill_chunk=chunk, has_state=has_state,
            keeps_prefixes=keeps,
        )  # fmt: skip
        self.cache = SimulatedCache(max_running, size)
        self.has_state, self.steps = has_state, 0
        self.done: list[Sequence] = []
        self.first_steps: dict[int, int] = {}

    def answer(self, tokens: list[int]) -> int:
        return (sum(tokens) * 31 + len(tokens)) % 3

    def step(self, rng: random.Random) -> None:
        scheduler, cache = self.scheduler, self.cache
        for one in scheduler.slots[: scheduler.num_decoding]:
            if one.num_pending == 1 and rng.random() < 0.5:
                room = one.limit - len(one.tokens) - 1
                one.drafts = [rng.randrange(3) for _ in range(min(room, rng.randrange(4)))]
        plan = scheduler.plan()
        cache.apply(scheduler)
        self.steps += 1
        self.check(plan.num_tokens, sum(chunk.length for chunk in plan.chunks))
        states = [cache.states[one.slot] for one in plan.decodes]
        for one in plan.decodes:
            new = [*one.tokens[one.num_computed :], *one.drafts]
            cache.feed(one, one.num_computed, new, self.has_state)
        answers = [self.verify(*pair) for pair in zip(plan.decodes, states, strict=True)]
        for one, new in zip(plan.decodes, answers, strict=True):
            self.report(one, new)
        cache.apply(scheduler)
        for chunk in plan.chunks:
            one = chunk.sequence
            self.first_steps.setdefault(one.arrival, self.steps)
            new = one.tokens[chunk.start : chunk.start + chunk.length]
            assert chunk.start == one.num_computed
            cache.feed(one, chunk.start, new, self.has_state)
            scheduler.computed(one, chunk.length)
            if one.status is Status.DECODE:
                self.append(one, [self.answer(one.tokens)])
            cache.apply(scheduler)

    def verify(self, one: Sequence, state: tuple[int, ...]) -> list[int]:
        """Return the guesses that are right and one more token; `state` is that before."""
        new: list[int] = []
        for draft in [*one.drafts, None]:
            new.append(self.answer(one.tokens + new))
            if draft != new[-1]:
                break
        if self.has_state and len(new) <= len(one.drafts):
            self.cache.states[one.slot] = state  # these tokens are computed again
        return new

    def report(self, one: Sequence, new: list[int]) -> None:
        if not self.has_state or len(new) > len(one.drafts):
            one.tokens += new[:-1]
            self.scheduler.computed(one, one.num_pending)
            del new[:-1]
        self.append(one, new)

    def append(self, one: Sequence, new: list[int]) -> None:
        one.drafts = ()
        one.tokens += new
        if len(one.tokens) >= one.limit:
            del one.tokens[one.limit :]
            self.scheduler.remove(one)
            self.done.append(one)

    def check(self, num_tokens: int, num_prompt_tokens: int) -> None:
        scheduler = self.scheduler
        assert num_prompt_tokens <= scheduler.prefill_chunk
        assert len(scheduler.slots) <= scheduler.max_running
        assert scheduler.num_decoding <= len(scheduler.slots)
        assert scheduler.pool.num_held == sum(one.num_blocks for one in scheduler.slots)
        for number, one in enumerate(scheduler.slots):
            assert one.slot == number
            decodes = number < scheduler.num_decoding
            assert one.status is (Status.DECODE if decodes else Status.PREFILL)
            assert one.num_blocks * scheduler.pool.block_size >= len(one.tokens) + len(one.drafts)
        arrivals = [one.arrival for one in scheduler.waiting]
        assert arrivals == sorted(arrivals)
        # nobody overtakes: who is in came before who has not been in yet
        never = [one.arrival for one in scheduler.waiting if not one.num_preemptions]
        assert all(one.arrival < min(never, default=10**9) for one in scheduler.slots)
        if scheduler.has_work:
            assert num_tokens > 0


@st.composite
def worlds(draw: Callable[..., object]) -> World:
    size = draw(st.integers(1, 5))
    return World(
        draw(st.integers(2, 16)),  # type: ignore[arg-type]
        size,  # type: ignore[arg-type]
        max_running=draw(st.integers(1, 5)),  # type: ignore[arg-type]
        chunk=draw(st.integers(1, 12)),  # type: ignore[arg-type]
        has_state=draw(st.booleans()),  # type: ignore[arg-type]
        keeps=draw(st.integers(0, 4)) > 0,  # type: ignore[operator]
    )


def wants(limit: int) -> st.SearchStrategy[tuple[list[int], int, int, bool]]:
    """Prompt, length of the answer, steps before the next event, whether to abort somebody."""
    return st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=limit),
        st.integers(1, 12),
        st.integers(0, 3),
        st.booleans(),
    )


@settings(max_examples=500, deadline=None)
@given(worlds(), st.lists(wants(20), max_size=8), st.integers(0, 10**6))
def test_any_schedule_ends_with_every_answer_right_and_all_memory_free(
    world: World, events: list[tuple[list[int], int, int, bool]], seed: int
) -> None:
    rng, scheduler = random.Random(seed), world.scheduler
    made: list[Sequence] = []
    aborted: set[int] = set()
    for prompt, num_new, steps, aborts in events:
        prompt = prompt[: max(1, scheduler.max_tokens - 1)]
        limit = min(len(prompt) + num_new, scheduler.max_tokens)
        if limit > len(prompt):
            made.append(Sequence(len(made), list(prompt), limit))
            scheduler.add(made[-1])
        for _ in range(steps):
            world.step(rng)
        if aborts and made:
            victim = rng.choice(made)
            if victim.status is not Status.DONE:
                aborted.add(victim.arrival)
            scheduler.remove(victim)
            scheduler.remove(victim)
            world.cache.apply(scheduler)
            assert victim.num_blocks == 0 or victim.arrival not in aborted
    # the earliest always goes on: a bound on the steps, whatever the memory
    bound = world.steps + 10 + sum(2 * one.limit + len(one.tokens) for one in made) * 2
    while scheduler.has_work:
        world.step(rng)
        assert world.steps < bound, "somebody starves"
    for one in made:
        assert one.status is Status.DONE
        if one.arrival not in aborted:
            right = one.tokens[: one.num_prompt]
            while len(right) < one.limit:
                right.append(world.answer(right))
            assert one.tokens == right
    assert scheduler.pool.num_held == 0
    assert scheduler.slots == scheduler.waiting == []


def run(world: World, sequences: list[Sequence]) -> None:
    for one in sequences:
        world.scheduler.add(one)
    while world.scheduler.has_work:
        world.step(random.Random(0))


def test_requests_begin_in_the_order_of_their_arrival() -> None:
    world = World(100, 4, max_running=2, chunk=8, has_state=False)
    run(world, [Sequence(n, [n] * (30 - 4 * n), 40) for n in range(6)])
    begun = [world.first_steps[n] for n in range(6)]
    assert begun == sorted(begun)


def test_a_long_prompt_does_not_stop_the_answers_of_others() -> None:
    world = World(100, 4, max_running=4, chunk=4, has_state=False)
    short, long_ = Sequence(0, [1], 30), Sequence(1, [2] * 60, 70)
    world.scheduler.add(short)
    world.step(random.Random(0))
    world.scheduler.add(long_)
    for _ in range(10):
        had = len(short.tokens)
        world.step(random.Random(1))
        assert len(short.tokens) > had
    assert 4 * 10 >= long_.num_computed > 0


def test_a_full_cache_preempts_the_latest_who_then_finishes() -> None:
    world = World(6, 4, max_running=3, chunk=50, has_state=False, keeps=False)
    made = [Sequence(n, [n] * 4, 20) for n in range(3)]
    run(world, made)
    assert world.scheduler.counters.preemptions > 0
    assert made[0].num_preemptions == 0
    assert [one.arrival for one in world.done] == [0, 1, 2]


@pytest.mark.parametrize("has_state", [False, True])
def test_a_prompt_that_begins_like_another_computes_the_rest_only(has_state: bool) -> None:
    world = World(100, 4, max_running=2, chunk=64, has_state=has_state)
    run(world, [Sequence(0, [1] * 22, 24)])
    before = world.scheduler.counters.prefill_tokens
    run(world, [Sequence(1, [1] * 20 + [2, 2, 2], 30)])
    counters = world.scheduler.counters
    assert (counters.prefix_hits, counters.prefix_tokens) == (1, 20)
    assert counters.prefill_tokens - before == 3


def test_scheduling_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import minillm.serve.scheduler; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
