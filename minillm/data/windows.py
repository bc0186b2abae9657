"""Pretraining rows: non-overlapping windows of a token file in a stateless, seeded order.

Sample `i` of a run is window `permute(i % n, n, seed, epoch)` of epoch `i // n`. Nothing is
stored but `i`, so resume is O(1) and does not depend on workers. The price: windows cut documents
at arbitrary places, and the last `len % T` tokens of a file are never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minillm.data.binfile import TokenFile
from minillm.errors import InputError

IGNORE = -100
"""Label of a position without loss, as in torch.nn.functional.cross_entropy."""

_ROUNDS = 4


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Map `index` in [0, size) to its place in a pseudo-random permutation, in O(1) memory.

    A Feistel network over the next even number of bits with cycle walking (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"): a bijection for every key, so each window is visited
    exactly once an epoch.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, seed, epoch * _ROUNDS + round_) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mix(value: int, seed: int, salt: int) -> int:
    """Hash three integers to 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    word = (value + 0x9E3779B97F4A7C15 * (salt + 1) + 0xD1B54A32D192ED03 * (seed + 1)) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch of B rows of T tokens; all arrays are int64 of shape (B, T)."""

    input_ids: npt.NDArray[np.int64]
    shift_labels: npt.NDArray[np.int64]
    """Label of each position: the next token, or IGNORE."""
    position_ids: npt.NDArray[np.int64] | None
    """Positions that restart with each document; None when a row is one document."""


class Windows:
    """The windows of a token file, split into training and validation.

    Args:
        file: The token file.
        length: Tokens per row, T. A window is T inputs and the token after each.
        seed: Seed of the order.
        val_windows: This many windows, spread evenly over the file, are held out.
        doc_mask: Give positions that restart after each separator.

    Raises:
        InputError: The file holds fewer than two windows, or was cut short since it was opened.
    """

    def __init__(
        self, file: TokenFile, length: int, *, seed: int, val_windows: int, doc_mask: bool
    ) -> None:
        total = (len(file) - 1) // length
        if total < 2:
            raise InputError(
                f"`{file.path}` holds {len(file)} tokens, too few for rows of {length}",
                hint=f"use more text, or `--sequence-length {max(16, (len(file) - 1) // 16)}`",
            )
        self.file, self.length, self.seed, self.doc_mask = file, length, seed, doc_mask
        val_windows = min(val_windows, max(1, total // 10)) if val_windows else 0
        # the middle of each of `val_windows` equal stretches: every source is represented
        self._val = [(2 * i + 1) * total // (2 * val_windows) for i in range(val_windows)]
        self._train_size = total - len(self._val)

    def __len__(self) -> int:
        """Training windows in one epoch."""
        return self._train_size

    @property
    def num_val(self) -> int:
        """Validation windows."""
        return len(self._val)

    def rows(self, first: int, count: int) -> Rows:
        """Return training samples `first` to `first + count` of the run."""
        picks = (divmod(first + i, self._train_size) for i in range(count))
        return self._gather(
            [
                self._skip_val(permute(index, self._train_size, self.seed, epoch))
                for epoch, index in picks
            ]
        )

    def val_rows(self, first: int, count: int) -> Rows:
        """Return validation windows `first` to `first + count`, in file order."""
        return self._gather(self._val[first : first + count])

    def _skip_val(self, index: int) -> int:
        """Map the n-th training window to its place in the file."""
        low, high = 0, len(self._val)
        while low < high:  # first held-out window with more than `index` training ones before it
            middle = (low + high) // 2
            if self._val[middle] - middle <= index:
                low = middle + 1
            else:
                high = middle
        return index + low

    def _gather(self, places: Sequence[int]) -> Rows:
        self.file.require_whole()
        length, tokens = self.length, self.file.tokens
        windows = np.stack([tokens[p * length : (p + 1) * length + 1] for p in places])
        windows = windows.astype(np.int64)
        inputs = windows[:, :-1]
        positions = None
        if self.doc_mask:
            positions = restarting_positions(inputs == self.file.manifest.separator_id)
        return Rows(inputs, windows[:, 1:], positions)


def restarting_positions(is_end: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count positions from 0 after each document end.

    Args:
        is_end: (B, T), true where a document's last token stands.

    Returns:
        (B, T) positions.

    >>> restarting_positions(np.array([[False, True, False, False]])).tolist()
    [[0, 1, 0, 1]]
    """
    place = np.broadcast_to(np.arange(is_end.shape[1]), is_end.shape)
    starts = np.zeros_like(place)
    starts[:, 1:] = np.where(is_end[:, :-1], place[:, 1:], 0)
    return place - np.maximum.accumulate(starts, axis=1)
