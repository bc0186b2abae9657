"""Read SFT parquet: ragged rows of ours and padded rows of the published sets, packed or not.

Rows are checked once, on opening, and held in memory without padding: 2 or 4 bytes a token for
its id, and one each for "is learned" and "begins a dialogue". The price: a set must fit in memory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from minillm.data.windows import IGNORE
from minillm.errors import InputError
from minillm.files import sha256_file

METADATA_KEY = b"minillm"
LISTS = ("token_ids", "labels", "position_ids", "attention_mask", "sample_lengths")
_BATCH_ROWS = 1024

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SftRow:
    """One training row of L tokens: one dialogue, or several packed; arrays are int32 (L,)."""

    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    """Equal to the token where it is to be learned, else IGNORE; not shifted."""
    position_ids: npt.NDArray[np.int32]
    """Positions from 0 in each dialogue."""


@contextmanager
def open_rows(path: Path) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
    """Open an SFT parquet; give it and the columns of it that matter.

    Raises:
        InputError: It is missing or broken, here or while the block reads, or lacks a column.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = [name for name in (*LISTS, "length") if name in file.schema_arrow.names]
            check_columns(path, names)
            yield file, names
    except FileNotFoundError:
        raise InputError(
            f"no dialogues at `{path}`", hint=f"`minillm prepare-sft --out {path}` makes them"
        ) from None
    except (pa.ArrowException, OSError) as err:
        raise InputError(
            f"`{path}` is not a readable parquet: {str(err).splitlines()[0]}",
            hint=f"make it anew: `minillm prepare-sft --out {path}`",
        ) from err


class SftRows:
    """The rows of an SFT parquet."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        offsets: Ints,
        ids: npt.NDArray[Any],
        learned: Bools,
        starts: Bools,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._offsets, self._ids, self._learned, self._starts = offsets, ids, learned, starts

    @classmethod
    def open(cls, path: Path, vocab_size: int) -> "SftRows":
        """Read and check a file.

        Args:
            path: The parquet. Columns `token_ids` and `labels` are needed; padding is found by
                `attention_mask`, else `sample_lengths`, else `length`.
            vocab_size: Every id must be below.

        Raises:
            InputError: It is missing, broken, or a row contradicts itself; the row is named.
        """
        with open_rows(path) as (file, names):
            metadata = _beside(path) | _metadata(file.schema_arrow.metadata or {})
            dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
            parts, first = [], 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                parts.append(_Batch(path, first, batch).read(vocab_size, dtype))
                first += batch.num_rows
        if not first:
            raise InputError(f"`{path}` holds no row", hint="prepare some dialogues first")
        sizes, ids, learned, starts = (np.concatenate(part) for part in zip(*parts, strict=True))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(path, metadata, offsets, ids, learned, starts)

    def __len__(self) -> int:
        """Rows."""
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return len(self._ids)

    @property
    def num_label_tokens(self) -> int:
        """Tokens that are learned."""
        return int(self._learned.sum())

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer that made the ids; empty where the file does not say."""
        return str(self.metadata.get("tokenizer_sha256", ""))

    @property
    def sha256(self) -> str:
        """Hex sha256 of the file."""
        return sha256_file(self.path)

    def row(self, index: int) -> SftRow:
        """Return a row, 0 ≤ index < len."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        ids = self._ids[part].astype(np.int32)
        labels = np.where(self._learned[part], ids, np.int32(IGNORE))
        place = np.arange(len(ids), dtype=np.int32)
        begins = np.maximum.accumulate(np.where(self._starts[part], place, 0))
        return SftRow(ids, labels, (place - begins).astype(np.int32))


def read_batch(
    path: Path, first: int, batch: pa.RecordBatch, vocab_size: int
) -> tuple[Ints, npt.NDArray[Any], Bools, Bools]:
    """Check some rows of a file and return row lengths, ids, learned and starts, unpadded.

    Args:
        path: The file, for messages.
        first: Row of the file that `batch` begins with.
        batch: Rows with the columns that `SftRows.open` knows.
        vocab_size: Every id must be below.

    Raises:
        InputError: A row contradicts itself; it is named.
    """
    return _Batch(path, first, batch).read(vocab_size, np.uint32)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a file, or what lies beside it, says of its making; nothing if it does not.

    Raises:
        InputError: What lies beside it is broken.
    """
    return _beside(path) | _metadata(pq.read_schema(path).metadata or {})


def check_columns(path: Path, names: list[str]) -> None:
    """Raise InputError unless the columns are those of SFT rows."""
    for name in ("token_ids", "labels"):
        if name not in names:
            raise InputError(
                f"`{path}` has no column `{name}`, so it is no SFT parquet",
                hint="make one from dialogues: `minillm prepare-sft --data FILE.jsonl`",
            )


def _beside(path: Path) -> dict[str, Any]:
    """Read what `minillm download` knows of a published parquet, which says nothing itself."""
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        return {}
    try:
        return {"tokenizer_sha256": str(json.loads(beside.read_bytes())["tokenizer_sha256"])}
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"`{beside}` does not name a tokenizer: {err!r}",
            hint=f"`minillm download` writes it again; to do without it: `rm {beside}`",
        ) from err


def _metadata(raw: dict[bytes, bytes]) -> dict[str, Any]:
    """Return our part of the schema metadata; a foreign or mangled one counts as none."""
    try:
        found = json.loads(raw.get(METADATA_KEY, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Batch:
    """Some rows, as flat arrays; `row_of` tells the row of each place."""

    def __init__(self, path: Path, first: int, batch: pa.RecordBatch) -> None:
        self.path, self.first, self.count = path, first, batch.num_rows
        self.columns = {name: self._flat(name, batch.column(name)) for name in batch.schema.names}
        self.values, self.sizes = self.columns["token_ids"]
        self.row_of = np.repeat(np.arange(self.count), self.sizes)
        begins = np.cumsum(self.sizes) - self.sizes
        self.place = np.arange(len(self.values)) - begins[self.row_of]

    def read(
        self, vocab_size: int, dtype: type[np.unsignedinteger[Any]]
    ) -> tuple[Ints, npt.NDArray[Any], Bools, Bools]:
        """Return row lengths, ids, learned and starts, without padding."""
        ids, labels = self.values, self._like_ids("labels")
        keep = self._keep()
        outside = keep & ((ids < 0) | (ids >= vocab_size))
        self._refuse(outside, f"a token id outside the vocabulary of {vocab_size}")
        learned = labels != IGNORE
        self._refuse(keep & learned & (labels != ids), "a label that is neither -100 nor its token")
        starts = self._starts(keep)
        sizes = np.bincount(self.row_of[keep], minlength=self.count).astype(np.int64)
        empty = np.flatnonzero(sizes == 0)
        if empty.size:
            raise self._error(int(empty[0]), "no token")
        return sizes, ids[keep].astype(dtype), learned[keep], starts[keep]

    def _flat(self, name: str, column: pa.Array) -> tuple[Ints, Ints]:
        """Return values and row lengths of a column of lists, or of single numbers."""
        wanted = pa.int64() if name == "length" else pa.list_(pa.int64())
        try:
            column = column.cast(wanted)
        except pa.ArrowException:
            raise InputError(
                f"column `{name}` of `{self.path}` holds {column.type}, not integers",
                hint="make the file anew with `minillm prepare-sft`",
            ) from None
        nulls = column.null_count or (name != "length" and column.flatten().null_count)
        if nulls:
            raise InputError(
                f"column `{name}` of `{self.path}` has missing values near row {self.first}",
                hint="make the file anew with `minillm prepare-sft`",
            )
        if name == "length":
            return column.to_numpy(zero_copy_only=False), np.ones(len(column), np.int64)
        sizes = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        return column.flatten().to_numpy(zero_copy_only=False), sizes

    def _like_ids(self, name: str) -> Ints:
        """Return a column that must have one value per token id."""
        values, sizes = self.columns[name]
        wrong = np.flatnonzero(sizes != self.sizes)
        if wrong.size:
            row = int(wrong[0])
            raise self._error(row, f"{sizes[row]} {name} for {self.sizes[row]} token_ids")
        return values

    def _keep(self) -> Bools:
        """Tell for each place whether it is a token, not padding."""
        real = self.sizes
        if "sample_lengths" in self.columns:
            values, sizes = self.columns["sample_lengths"]
            rows = np.repeat(np.arange(self.count), sizes)
            if (values < 0).any():
                raise self._error(int(rows[values < 0][0]), "a negative sample length")
            real = np.bincount(rows, values, self.count).astype(np.int64)
        elif "length" in self.columns and "attention_mask" not in self.columns:
            real = self.columns["length"][0]
        longer = np.flatnonzero(real > self.sizes)
        if longer.size:
            row = int(longer[0])
            raise self._error(row, f"a length of {real[row]}, but {self.sizes[row]} token_ids")
        keep: Bools = self.place < real[self.row_of]
        if "attention_mask" in self.columns:
            keep &= self._like_ids("attention_mask") != 0
        self._check_length(np.bincount(self.row_of[keep], minlength=self.count))
        return keep

    def _check_length(self, real: Ints) -> None:
        """Check `length`, the tokens of a row with or without its padding."""
        if "length" not in self.columns:
            return
        stated = self.columns["length"][0]
        wrong = np.flatnonzero((stated != real) & (stated != self.sizes))
        if wrong.size:
            row = int(wrong[0])
            raise self._error(row, f"a length of {stated[row]}, but {real[row]} tokens")

    def _starts(self, keep: Bools) -> Bools:
        """Tell where dialogues begin, by `position_ids` and `sample_lengths`, which must agree."""
        stated = np.zeros(len(self.values), bool)
        stated[self.place == 0] = True
        if "sample_lengths" in self.columns:
            values, sizes = self.columns["sample_lengths"]
            rows = np.repeat(np.arange(self.count), sizes)
            before = np.cumsum(values) - values
            begins = (np.cumsum(self.sizes) - self.sizes)[rows]
            within = before - before[np.searchsorted(rows, rows)]
            at = begins + within
            stated[at[within < self.sizes[rows]]] = True
        if "position_ids" not in self.columns:
            return stated
        positions = self._like_ids("position_ids")
        starts: Bools = positions == 0
        follows = np.zeros(len(positions), bool)
        follows[1:] = (positions[1:] == positions[:-1] + 1) & (self.place[1:] > 0)
        self._refuse(keep & ~starts & ~follows, "position_ids that neither count on nor restart")
        if "sample_lengths" in self.columns:
            self._refuse(keep & (starts != stated), "position_ids that contradict sample_lengths")
        return starts

    def _refuse(self, bad: Bools, what: str) -> None:
        found = np.flatnonzero(bad)
        if found.size:
            at = int(found[0])
            raise self._error(int(self.row_of[at]), f"{what} (token {int(self.place[at])})")

    def _error(self, row: int, what: str) -> InputError:
        return InputError(
            f"`{self.path}` row {self.first + row} has {what}",
            hint="make the file anew with `minillm prepare-sft`, with the tokenizer of the model",
        )
