"""Which dialogues make a sample: so many multi-turn, and of each type alike.

Whether a dialogue fits a row is known only when it is encoded, and to encode millions for a
sample of 50,000 would take an hour. So the dialogues of each group (type, one answer or several)
are shuffled, and encoded in that order until the group has its share: the first that fit of a
shuffled list are as random a choice as any. A group that runs out leaves its share to the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Encode = Callable[[Ints], npt.NDArray[np.bool_]]
"""Encodes dialogues by index; tells which fit."""

_SPARE = 1.05  # so that one round is mostly enough
_MIN_DRAW = 16


def mix(count: int, seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """Return a random-looking key for each of 0 … count-1 (splitmix64, Steele et al. 2014).

    The same with every version of every library, unlike numpy's generators.
    """
    with np.errstate(over="ignore"):
        start = (np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(stream << 56)
        key = (np.arange(1, count + 1, dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return key ^ (key >> np.uint64(31))


def shuffled(count: int, seed: int, stream: int) -> Ints:
    """Return 0 … count-1 in random order; streams of one seed are independent."""
    return np.argsort(mix(count, seed, stream), kind="stable")


def share_out(caps: Ints, total: int) -> Ints:
    """Deal `total` to groups as evenly as their caps allow; the first groups get the odd ones.

    >>> share_out(np.array([10, 1, 10]), 8).tolist()
    [4, 1, 3]
    """
    total = min(total, int(caps.sum()))
    shares = np.zeros_like(caps)
    while (left := total - int(shares.sum())) > 0:
        open_groups = np.flatnonzero(shares < caps)
        each = left // len(open_groups)
        give = np.full(len(open_groups), each)
        if not each:
            give[:left] = 1
        shares[open_groups] = np.minimum(shares[open_groups] + give, caps[open_groups])
    return shares


def targets(caps: Ints, is_multi: npt.NDArray[np.bool_], total: int, ratio: float) -> Ints:
    """Return how many dialogues each group gives.

    Args:
        caps: Dialogues of each group, shape (G,).
        is_multi: Whether the group's dialogues have several answers, shape (G,).
        total: Dialogues wanted.
        ratio: Share of them with several answers; if one sort runs short the other fills up.
    """
    num_multi, num_single = int(caps[is_multi].sum()), int(caps[~is_multi].sum())
    multi = min(num_multi, round(total * ratio))
    single = min(num_single, total - multi)
    multi = min(num_multi, total - single)
    shares = np.zeros_like(caps)
    shares[is_multi] = share_out(caps[is_multi], multi)
    shares[~is_multi] = share_out(caps[~is_multi], single)
    return shares


@dataclass(slots=True)
class _Group:
    members: Ints
    """Indices of dialogues, shuffled."""
    is_multi: bool
    fits: npt.NDArray[np.bool_]
    """Of the members that were encoded."""

    @property
    def num_fit(self) -> int:
        return int(self.fits.sum())

    @property
    def cap(self) -> int:
        """Members that fit, or may fit."""
        return len(self.members) - len(self.fits) + self.num_fit

    def draw(self, wanted: int) -> Ints:
        """Return the next members to encode, likely enough that `wanted` fit in all."""
        need = wanted - self.num_fit
        if need <= 0:
            return self.members[:0]
        rate = (self.num_fit + 1) / (len(self.fits) + 1)
        first = len(self.fits)
        return self.members[first : first + max(_MIN_DRAW, int(need / rate * _SPARE) + 1)]


def choose(
    pool: Ints,
    group_of: npt.NDArray[np.int64],
    is_multi: npt.NDArray[np.bool_],
    total: int,
    ratio: float,
    seed: int,
    encode: Encode,
) -> Ints:
    """Return the indices of a balanced random sample of the dialogues that fit.

    Args:
        pool: Indices to choose from, shape (N,).
        group_of: Group number of each, shape (N,).
        is_multi: Whether each has several answers (all of a group alike), shape (N,).
        total: Dialogues wanted; fewer only if no more fit.
        ratio: Share of dialogues with several answers.
        seed: Seed of the choice.
        encode: Called a few times with indices, ascending.
    """
    groups = _groups(pool, group_of, is_multi, seed)
    multi = np.array([group.is_multi for group in groups], bool)
    while True:
        wanted = targets(np.array([g.cap for g in groups], np.int64), multi, total, ratio)
        draws = [group.draw(int(count)) for group, count in zip(groups, wanted, strict=True)]
        todo = np.concatenate([*draws, pool[:0]])
        if not len(todo):
            break
        order = np.argsort(todo)
        fits = np.empty(len(todo), bool)
        fits[order] = encode(todo[order])
        ends = np.cumsum([len(draw) for draw in draws])[:-1]
        for group, part in zip(groups, np.split(fits, ends), strict=True):
            group.fits = np.concatenate([group.fits, part])
    chosen = [
        group.members[: len(group.fits)][group.fits][:count]
        for group, count in zip(groups, wanted, strict=True)
    ]
    return np.sort(np.concatenate([*chosen, pool[:0]]))


def _groups(
    pool: Ints, group_of: npt.NDArray[np.int64], is_multi: npt.NDArray[np.bool_], seed: int
) -> list[_Group]:
    order = np.lexsort((mix(len(pool), seed, 1), group_of))
    starts = np.flatnonzero(np.diff(group_of[order], prepend=-1))
    nothing = np.empty(0, bool)
    return [
        _Group(pool[part], bool(is_multi[part[0]]), nothing)
        for part in np.split(order, starts[1:])
        if len(part)
    ]
