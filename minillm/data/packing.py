"""First-fit-decreasing packing: several dialogues into each row of a fixed capacity.

It needs at most 11/9 of the fewest possible rows, plus one (Johnson 1973; Dósa 2007), and for the
many short dialogues of a chat set comes within a percent of full. The price: dialogues of like
length share a row, so rows must be shuffled before training.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of indices, one after the other."""

    indices: Ints
    """Every index once, row by row; within a row the longest first."""
    starts: Ints
    """Where each row starts in `indices`, and the end: one more than there are rows."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    def row(self, number: int) -> Ints:
        """Return the indices of one row."""
        return self.indices[self.starts[number] : self.starts[number + 1]]


def pack(lengths: npt.NDArray[np.integer], capacity: int) -> Packed:
    """Deal indices into `lengths` to rows, each of which sums to at most `capacity`.

    First fit goes on to a row until no more of a length fit, so all items of one length are placed
    in one step: O(different lengths * rows) simple operations, a second for millions of items.

    Args:
        lengths: Tokens of each dialogue, shape (N,), at least 1 and at most `capacity`.
        capacity: Tokens of a row.

    Returns:
        The rows in the order they were opened.

    >>> packed = pack(np.array([3, 5, 2, 4]), 7)
    >>> [packed.row(i).tolist() for i in range(len(packed))]
    [[1, 2], [3, 0]]
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    row_of = np.empty(len(lengths), np.int32)  # of each place in `order`
    room = np.empty(max(1, len(lengths)), np.int32)
    num_rows = first = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fitting = np.flatnonzero(room[:num_rows] >= size)
        takes = room[fitting] // size
        used = np.searchsorted(np.cumsum(takes), count) + 1
        fitting, takes = fitting[:used], takes[:used]
        over = int(takes.sum()) - count
        if over > 0:
            takes[-1] -= over
        else:
            new, rest = divmod(-over, capacity // size)
            opened = np.full(new + (rest > 0), capacity // size, np.int32)
            if rest:
                opened[-1] = rest
            fitting = np.concatenate([fitting, np.arange(num_rows, num_rows + len(opened))])
            takes = np.concatenate([takes, opened])
            room[num_rows : num_rows + len(opened)] = capacity
            num_rows += len(opened)
        room[fitting] -= takes * size
        row_of[first : first + count] = np.repeat(fitting, takes)
        first += count
    by_row = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[by_row], np.arange(num_rows + 1)).astype(np.int64)
    return Packed(order[by_row], starts)
