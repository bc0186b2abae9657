"""The prefix store against a brute-force copy of it, and its accounts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.serve.blocks import ROOT, BlockPool


def test_equal_tokens_after_another_beginning_are_another_block() -> None:
    pool = BlockPool(8, 2)
    assert len(pool.keep([1, 2, 7, 8], 2, has_state=False)) == 2
    assert len(pool.match([1, 2, 7, 8, 9], 2)) == 2
    assert pool.match([7, 8], 1) == []
    assert len(pool.match([1, 2, 3, 8], 2)) == 1


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 1)
    pool.keep([1, 2], 2, has_state=False)
    pool.keep([3, 4], 2, has_state=False)
    pool.match([1, 2], 2)
    assert pool.hold(1)
    assert [len(pool.match(tokens, 2)) for tokens in ([1, 2], [3, 4])] == [2, 1]
    assert len(pool.dropped) == 1


def test_memory_that_is_held_is_never_taken_for_keeping() -> None:
    pool = BlockPool(3, 1)
    assert pool.hold(2)
    assert len(pool.keep([1, 2, 3], 3, has_state=False)) == 1
    assert not pool.hold(2)
    assert pool.hold(1)
    assert pool.num_free == pool.num_kept == 0


def test_blocks_that_must_stay_stay() -> None:
    pool = BlockPool(2, 1)
    pool.keep([1, 2], 2, has_state=False)
    found = [block.uid for block in pool.match([1], 1)]
    assert not pool.hold(2, found)
    assert pool.hold(1, found)
    assert [block.uid for block in pool.kept] == found


def test_with_a_state_a_match_ends_where_one_is_kept() -> None:
    pool = BlockPool(20, 1, state_cost=3)
    pool.keep([1, 2], 2, has_state=True)
    assert pool.num_kept == 2 + 3
    pool.keep([1, 2, 3, 4], 4, has_state=False)
    assert len(pool.match([1, 2, 3, 4], 4)) == 2
    assert pool.match([1], 1) == []
    # the state of a block that is known already is worth a copy
    assert [number for number, _ in pool.keep([1, 2, 3, 4], 4, has_state=True)] == [3]
    assert len(pool.match([1, 2, 3, 4], 4)) == 4


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 6)),
        st.tuples(st.just("release"), st.integers(0, 6)),
        st.tuples(st.just("keep"), st.lists(st.integers(0, 1), max_size=12), st.booleans()),
        st.tuples(st.just("match"), st.lists(st.integers(0, 1), max_size=12)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(1, 12), st.integers(1, 3), st.integers(0, 3))
def test_accounts_add_up_whatever_happens(
    operations: list[tuple[object, ...]], num_blocks: int, block_size: int, state_cost: int
) -> None:
    pool = BlockPool(num_blocks, block_size, state_cost)
    texts: dict[int, tuple[int, ...]] = {}  # block: all tokens up to its end
    for name, *given_ in operations:
        if name == "hold":
            had = pool.num_held
            num = int(given_[0])  # type: ignore[call-overload]
            fits = num <= num_blocks - had
            assert pool.hold(num) == fits
            assert pool.num_held == had + num * fits
        elif name == "release":
            pool.release(min(int(given_[0]), pool.num_held))  # type: ignore[call-overload]
        elif name == "keep":
            tokens = list(given_[0])  # type: ignore[call-overload]
            num = len(tokens) // block_size
            has_state = bool(given_[1] and state_cost and num)
            for number, block in pool.keep(tokens, num, has_state=has_state):
                texts[block.uid] = tuple(tokens[: (number + 1) * block_size])
        else:
            tokens = list(given_[0])  # type: ignore[call-overload]
            found = pool.match(tokens, len(tokens) // block_size)
            for number, block in enumerate(found):
                assert texts[block.uid] == tuple(tokens[: (number + 1) * block_size])
            longest = max(
                (
                    len(texts[block.uid])
                    for block in pool.kept
                    if texts[block.uid] == tuple(tokens[: len(texts[block.uid])])
                    and (block.has_state or not state_cost)
                ),
                default=0,
            )
            assert len(found) * block_size == longest
        kept = pool.kept
        assert sum(block.cost for block in kept) == pool.num_kept
        assert pool.num_free >= 0
        assert pool.num_held + pool.num_kept + pool.num_free == num_blocks
        uids = [block.uid for block in kept]
        assert all(block.key[0] == ROOT or block.key[0] in uids for block in kept)
        assert not set(pool.dropped) & set(uids)
