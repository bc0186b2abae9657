"""What `minillm inspect` finds, as plain data, and the flat-memory counters that gather it."""

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")

_EXACT_LENGTHS = 1 << 20
_MAX_KEPT = 100_000
_LINEAR_BARS = 10
_MANY_COPIES = 0.05


@dataclass(slots=True)
class Bars:
    """A row of text bars: a histogram, or values in an order."""

    title: str
    summary: dict[str, float] = field(default_factory=dict)
    bars: list[tuple[str, float]] = field(default_factory=list)


@dataclass(slots=True)
class Table:
    """Rows under column names."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(slots=True)
class Sample:
    """A piece of what is inside, as text; special tokens are spelled out."""

    where: str
    text: str
    is_cut: bool = False


@dataclass(slots=True)
class Report:
    """What one file or folder is.

    Names of `facts` carry their unit: `_bytes` is shown as a size, `_share` in per cent.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is wrong: each makes the command exit with 3."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing, and right."""
    tables: list[Table] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    parts: list["Report"] = field(default_factory=list)

    @property
    def num_problems(self) -> int:
        """Problems here and in all parts."""
        return len(self.problems) + sum(part.num_problems for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**dataclasses.asdict(self), "num_problems": self.num_problems}


class Lengths:
    """Statistics of any number of lengths; exact up to a million, 8 MB at most."""

    def __init__(self) -> None:
        self._counts = np.zeros(1024, np.int64)
        self.count = self.total = self.largest = 0

    def add(self, values: "Sequence[int] | npt.NDArray[np.integer]") -> None:
        """Count some lengths, each ≥ 0."""
        array = np.asarray(values, np.int64)
        if not array.size:
            return
        self.count += array.size
        self.total += int(array.sum())
        self.largest = max(self.largest, int(array.max()))
        found = np.bincount(np.minimum(array, _EXACT_LENGTHS))
        if len(found) > len(self._counts):
            self._counts.resize(min(2 * len(found), _EXACT_LENGTHS + 1), refcheck=False)
        self._counts[: len(found)] += found

    @property
    def num_zero(self) -> int:
        """How often the length was 0."""
        return int(self._counts[0])

    def quantile(self, share: float) -> int:
        """Return the smallest length that `share` of all do not exceed."""
        place = int(np.searchsorted(np.cumsum(self._counts), max(1.0, share * self.count)))
        return self.largest if place >= _EXACT_LENGTHS else place

    def histogram(self, title: str) -> Bars:
        """Return a bar per stretch of lengths: even stretches, or doubling where they vary much."""
        if not self.count:
            return Bars(title)
        low = int(np.flatnonzero(self._counts)[0])
        summary = {
            "count": self.count,
            "min": low,
            "median": self.quantile(0.5),
            "mean": round(self.total / self.count, 1),
            "p95": self.quantile(0.95),
            "max": self.largest,
        }
        edges = _edges(low, self.largest)
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        capped = [min(edge, len(self._counts)) for edge in edges]
        bars: list[tuple[str, float]] = []
        for first, last, a, b in zip(edges, edges[1:], capped, capped[1:], strict=False):
            label = f"{first:,}" if last == first + 1 else f"{first:,}-{last - 1:,}"
            bars.append((label, int(sums[b] - sums[a])))
        beyond = self.count - sum(count for _, count in bars)
        if beyond:
            bars[-1] = (bars[-1][0], bars[-1][1] + beyond)
        return Bars(title, summary, bars)


def _edges(low: int, high: int) -> list[int]:
    """Return the first length of each bar, and one past the last bar."""
    if high - low < _LINEAR_BARS:
        return list(range(low, high + 2))
    if high < 8 * max(1, low):
        width = -(-(high - low + 1) // _LINEAR_BARS)
        return [*range(low, high + 1, width), high + 1]
    first = 1 << (low.bit_length() - 1) if low else 0
    edges = [first]
    while edges[-1] <= min(high, _EXACT_LENGTHS - 1):
        edges.append(2 * edges[-1] or 1)
    edges[-1] = max(high + 1, low + 1)
    return edges


class Picks(Generic[Item]):
    """A uniform random sample of a stream: the items with the smallest random keys.

    Args:
        count: Items to keep.
        seed: Same seed and stream, same sample.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._rng = count, np.random.default_rng(seed)
        self._heap: list[tuple[float, int, Item]] = []
        self._seen = 0

    def offer(self, count: int, get: Callable[[int], Item | None]) -> None:
        """Show the next `count` items; `get(i)` is called for those taken, None declines."""
        keys = self._rng.random(count)
        for index in range(count) if self._count > len(self._heap) else self._near(keys):
            key = -float(keys[index])
            is_full = len(self._heap) >= self._count
            if is_full and (not self._heap or key <= self._heap[0][0]):
                continue
            item = get(int(index))
            if item is None:
                continue
            entry = (key, self._seen + int(index), item)
            (heapq.heappushpop if is_full else heapq.heappush)(self._heap, entry)
        self._seen += count

    def _near(self, keys: npt.NDArray[np.float64]) -> Sequence[int]:
        if not self._heap:
            return []
        found: list[int] = np.flatnonzero(keys < -self._heap[0][0]).tolist()
        return found

    def items(self, count: int | None = None) -> list[tuple[int, Item]]:
        """Return (place in the stream, item), in order; `count` of them, else all."""
        chosen = sorted(self._heap, key=lambda entry: -entry[0])[:count]
        return sorted(((place, item) for _, place, item in chosen), key=lambda pair: pair[0])


class Duplicates:
    """Exact duplicates in a sample by content, which holds all copies of an item or none.

    An item counts where the low bits of its key are 0; the mask grows with the number of items
    kept (distinct sampling, Gibbons 2001), so memory is bounded. Equal items need equal keys.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, bytes], list[int]] = {}  # → number of copies, two places
        self.mask = 0

    def add(self, key: int, digest: bytes, place: int) -> None:
        """Count an item, if it is in the sample: `key & mask == 0`."""
        if key & self.mask:
            return
        entry = self._found.get((key, digest))
        if entry is None:
            self._found[key, digest] = [1, place]
            if len(self._found) > _MAX_KEPT:
                self.mask = 2 * self.mask + 1
                self._found = {k: v for k, v in self._found.items() if not k[0] & self.mask}
        else:
            entry[0] += 1
            if len(entry) < 3:
                entry.append(place)

    @property
    def num_seen(self) -> int:
        """Items in the sample."""
        return sum(entry[0] for entry in self._found.values())

    @property
    def num_extra(self) -> int:
        """Items in the sample that are copies of an earlier one."""
        return sum(entry[0] - 1 for entry in self._found.values())

    def report_to(self, report: Report, what: str) -> None:
        """Tell about copies: a few are a note, many are a problem."""
        if not self.num_extra:
            return
        is_many = self.num_extra > _MANY_COPIES * self.num_seen
        (report.problems if is_many else report.notes).append(self._describe(what))

    def _describe(self, what: str) -> str:
        _, first, second = max(
            (entry for entry in self._found.values() if entry[0] > 1), key=lambda e: (e[0], -e[1])
        )
        seen = f"{self.num_seen:,} sampled {what}" if self.mask else f"{self.num_seen:,} {what}"
        copies = "is a copy" if self.num_extra == 1 else "are copies"
        return (
            f"{self.num_extra:,} of {seen} {copies} of an earlier one "
            f"({self.num_extra / self.num_seen:.2%}), e.g. {first:,} and {second:,}"
        )
