"""First-fit-decreasing packing: several dialogues into each row of a fixed capacity.

It needs at most 11/9 of the fewest possible rows, plus one (Johnson 1973; Dósa 2007), and for the
many short dialogues of a chat set comes within a percent of full. The price: dialogues of like
length share a row, so rows must be shuffled before training.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`, each of which sums to at most `capacity`.

    Args:
        lengths: Tokens of each dialogue, at least 1 and at most `capacity`.
        capacity: Tokens of a row.

    Returns:
        The rows in the order they were opened; within a row the longest first. O(n log n).

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    assert all(0 < length <= capacity for length in lengths)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    free = _FirstFit(len(lengths), capacity)
    for index in order:
        row = free.take(lengths[index])
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
    return rows


class _FirstFit:
    """Free room of up to `count` rows; finds the first row with enough of it in O(log n).

    A complete binary tree whose leaves are the rows and whose inner nodes hold the largest room
    below them. Rows not yet opened have all their room, so a search always ends.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._room = [capacity] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """Use `length` of the first row that has it, and return that row."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._room[2 * node] >= length else 2 * node + 1
        row = node - self._leaves
        self._room[node] -= length
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return row
