"""Packing: rows hold everything once, never overflow, and are those of first fit decreasing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minillm.data.packing import pack

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def packed_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    packed = pack(np.array(lengths, np.int64), capacity)
    return [packed.row(number).tolist() for number in range(len(packed))]


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook, in quadratic time."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= capacity:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@given(LENGTHS, st.integers(40, 60))
def test_rows_are_those_of_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    assert packed_rows(lengths, capacity) == first_fit_decreasing(lengths, capacity)


@given(LENGTHS, st.integers(40, 60))
def test_every_dialogue_is_in_one_row_and_no_row_overflows(
    lengths: list[int], capacity: int
) -> None:
    rows = packed_rows(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)


def test_many_dialogues_are_packed_as_one_by_one() -> None:
    """Large enough that many items of one length share rows with many others."""
    lengths = [1 + (i * 7919) % 200 for i in range(3_000)]
    rows = packed_rows(lengths, 512)
    assert rows == first_fit_decreasing(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) > 0.98
