"""Samples: so many multi-turn, types alike, as random as a choice from all that fit."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minillm.data.sft_choose import choose, mix, share_out, shuffled, targets

CAPS = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@given(CAPS, st.integers(0, 150))
def test_shares_are_those_of_dealing_one_by_one(caps: list[int], total: int) -> None:
    dealt = [0] * len(caps)
    for _ in range(min(total, sum(caps))):
        has_room = [i for i in range(len(caps)) if dealt[i] < caps[i]]
        dealt[min(has_room, key=lambda i: dealt[i])] += 1
    shares = share_out(np.array(caps, np.int64), total)
    assert sum(shares) == sum(dealt)
    assert (np.sort(shares) == np.sort(dealt)).all()
    assert (shares <= caps).all()


@given(CAPS, CAPS, st.integers(0, 300), st.floats(0, 1))
def test_turns_keep_their_ratio_and_fill_up_for_each_other(
    single: list[int], multi: list[int], total: int, ratio: float
) -> None:
    caps = np.array([*single, *multi], np.int64)
    flags = np.array([False] * len(single) + [True] * len(multi))
    found = targets(caps, flags, total, ratio)
    assert found.sum() == min(total, caps.sum())
    wanted = round(total * ratio)
    if sum(multi) >= wanted and sum(single) >= total - wanted:
        assert found[flags].sum() == wanted


def sample(
    total: int, ratio: float = 0.2, seed: int = 0, fit_share: float = 0.5
) -> tuple[np.ndarray, set[int], np.ndarray, np.ndarray]:
    """Choose of 6,000 dialogues of 6 types, the last of which are rare."""
    size = 6000
    rng = np.random.default_rng(1)
    kind = np.minimum(rng.geometric(0.5, size) - 1, 5)
    is_multi = rng.random(size) < 0.3
    fits = rng.random(size) < fit_share
    encoded: set[int] = set()

    def encode(picks: np.ndarray) -> np.ndarray:
        assert (np.diff(picks) > 0).all()
        assert encoded.isdisjoint(picks.tolist())
        encoded.update(picks.tolist())
        return fits[picks]

    group = kind * 2 + is_multi
    found = choose(np.arange(size), group, is_multi, total, ratio, seed, encode)
    assert fits[found].all()
    assert len(set(found.tolist())) == len(found)
    return found, encoded, kind, is_multi


def test_a_sample_is_balanced_and_most_dialogues_are_never_encoded() -> None:
    found, encoded, kind, is_multi = sample(300)
    assert len(found) == 300
    assert is_multi[found].sum() == 60
    counts = Counter(kind[found].tolist())
    assert max(counts.values()) - min(counts.values()) <= 2
    assert len(encoded) < 1200


def test_a_type_that_runs_short_leaves_its_share_to_the_others() -> None:
    found, _, kind, is_multi = sample(2000)
    assert len(found) == 2000
    assert is_multi[found].sum() == 400
    counts = Counter(kind[found].tolist())
    assert counts[0] > counts[1] > counts[5] > 0


def test_all_that_fit_are_taken_where_too_few_fit() -> None:
    found, encoded, _, _ = sample(5000)
    assert len(encoded) == 6000
    assert 2800 < len(found) < 3200


def test_another_seed_takes_others_and_the_same_seed_the_same() -> None:
    first, again, other = (sample(300, seed=seed)[0] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    kind = sample(300)[2]
    common = np.intersect1d(first, other)
    assert (kind[first] == 0).sum() > 40
    assert (kind[common] == 0).sum() < 10


def test_each_dialogue_is_as_likely_as_any_other_that_fits() -> None:
    """Also those behind many that do not fit."""
    fits = np.arange(40) >= 20
    hits = np.zeros(40)
    for seed in range(2000):
        nothing = np.zeros(40, bool)
        found = choose(np.arange(40), nothing * 1, nothing, 5, 0, seed, lambda picks: fits[picks])
        hits[found] += 1
    assert hits[:20].sum() == 0
    # 2000 draws of 5 from 20: mean 500, standard deviation 19
    assert (np.abs(hits[20:] - 500) < 5 * 19).all()


def test_orders_are_permutations_that_differ_by_seed_and_stream() -> None:
    orders = [shuffled(1000, seed, stream) for seed, stream in ((0, 1), (0, 2), (1, 1), (7, 1))]
    for order in orders:
        assert sorted(order) == list(range(1000))
    for left in range(4):
        for right in range(left):
            assert (orders[left] == orders[right]).mean() < 0.02
    assert len(np.unique(mix(100_000, 3, 1))) == 100_000


def test_keys_are_those_of_splitmix64() -> None:
    def reference(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    golden, seed, stream = 0x9E3779B97F4A7C15, 12345, 3
    start = (seed * golden % 2**64) ^ (stream << 56)
    keys = [reference((start + place) * golden % 2**64) for place in range(1, 50)]
    assert mix(49, seed, stream).tolist() == keys
