"""Pretraining windows: each exactly once, in an order that depends on the seed alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data.windows import Windows, permute, restarting_positions
from minillm.errors import InputError

SEPARATOR = 9


def token_file(num_tokens: int) -> Any:
    """Tokens that count up, so that a window shows where it was cut."""
    tokens = np.arange(num_tokens, dtype=np.uint16)
    manifest = SimpleNamespace(separator_id=SEPARATOR)
    return type(
        "File",
        (),
        {
            "path": Path("x.bin"),
            "tokens": tokens,
            "manifest": manifest,
            "__len__": lambda self: num_tokens,
            "require_whole": lambda self: None,
        },
    )()


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 5))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {
        tuple(permute(i, 200, seed, epoch) for i in range(200))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_permute_spreads_neighbours_like_a_random_order() -> None:
    # for a random permutation of n the mean distance of neighbours is (n + 1) / 3
    size = 10_000
    order = np.array([permute(i, size, 1, 0) for i in range(size)])
    assert abs(np.abs(np.diff(order)).mean() / ((size + 1) / 3) - 1) < 0.05


@given(st.integers(40, 400), st.integers(2, 9), st.integers(0, 7))
def test_an_epoch_and_the_held_out_windows_are_the_whole_file(
    num_tokens: int, length: int, val: int
) -> None:
    windows = Windows(token_file(num_tokens), length, seed=3, val_windows=val, doc_mask=False)
    rows = windows.rows(0, len(windows)).input_ids.tolist()
    if windows.num_val:
        rows += windows.val_rows(0, windows.num_val).input_ids.tolist()
    total = (num_tokens - 1) // length
    assert sorted(rows) == [list(range(i * length, (i + 1) * length)) for i in range(total)]


def test_labels_are_the_next_tokens() -> None:
    rows = Windows(token_file(101), 10, seed=0, val_windows=1, doc_mask=False).rows(0, 9)
    assert (rows.shift_labels == rows.input_ids + 1).all()


def test_samples_do_not_depend_on_how_they_are_asked_for() -> None:
    windows = Windows(token_file(301), 10, seed=5, val_windows=2, doc_mask=False)
    together = windows.rows(20, 40).input_ids  # over the end of an epoch
    apart = np.concatenate([windows.rows(20 + i, 1).input_ids for i in range(40)])
    assert (together == apart).all()


def test_positions_restart_after_each_separator() -> None:
    ids = np.array([[1, 9, 2, 3, 9, 9, 4], [1, 2, 3, 4, 5, 6, 9]])
    expected = [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert restarting_positions(ids == SEPARATOR).tolist() == expected


def test_a_file_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="too few for rows of 512"):
        Windows(token_file(600), 512, seed=0, val_windows=1, doc_mask=False)
