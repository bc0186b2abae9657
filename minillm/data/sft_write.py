"""Rows of encoded dialogues to parquet, ragged or padded as the published sets are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from minillm.data.packing import Packed
from minillm.data.sft_encode import TokenReader
from minillm.data.sft_rows import METADATA_KEY
from minillm.data.windows import IGNORE
from minillm.files import atomic_write
from minillm.log import Progress, task

_BATCH_TOKENS = 1 << 19
_INTS = pa.list_(pa.int32())
_PACKED = "packed"

Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns hold."""

    packed: bool
    """Several dialogues in a row: column `sample_lengths` says where each ends."""
    padded_to: int
    """Tokens of every row; 0 for rows as long as what they hold."""
    pad_id: int
    types: Sequence[str]
    """Of the dialogue that stands at each place of the log, by `kind`."""
    kind: npt.NDArray[np.int32]

    def schema(self, facts: dict[str, Any]) -> pa.Schema:
        """Return columns and metadata."""
        columns = [(name, _INTS) for name in ("token_ids", "labels", "position_ids")]
        columns.append(("length", pa.int32()))
        if self.packed and not self.padded_to:
            return self._named([*columns, ("sample_lengths", _INTS), ("type", pa.string())], facts)
        columns += [("attention_mask", _INTS), ("type", pa.string())]
        if self.packed:
            columns += [("num_samples", pa.int32()), ("sample_lengths", _INTS)]
        return self._named(columns, facts)

    @staticmethod
    def _named(columns: list[tuple[str, pa.DataType]], facts: dict[str, Any]) -> pa.Schema:
        return pa.schema(columns, metadata={METADATA_KEY: json.dumps(facts).encode()})


def write_rows(
    path: Path,
    reader: TokenReader,
    rows: Packed,
    order: npt.NDArray[np.int64],
    layout: Layout,
    facts: dict[str, Any],
    progress: Progress,
) -> int:
    """Write the parquet, whole or not at all; return how many of its tokens are learned.

    Args:
        path: The file.
        reader: The dialogues.
        rows: Places in the log, row by row.
        order: The order to write the rows in.
        layout: The columns.
        facts: Metadata.
        progress: Where to report.
    """
    schema, num_learned = layout.schema(facts), 0
    longest = facts["sequence_length"]
    step = max(1, _BATCH_TOKENS // longest)
    with (
        task(progress, "write rows", len(order), "rows"),
        atomic_write(path) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for first in range(0, len(order), step):
            part = [rows.row(number) for number in order[first : first + step]]
            columns, learned = _columns(reader, part, layout)
            num_learned += learned
            writer.write_table(pa.table([columns[n] for n in schema.names], schema=schema))
            progress.advance(len(part))
    return num_learned


def _columns(
    reader: TokenReader, rows: Sequence[npt.NDArray[np.int64]], layout: Layout
) -> tuple[dict[str, pa.Array], int]:
    """Return the columns of some rows, and how many tokens of them are learned."""
    places = np.concatenate(rows)
    counts = np.array([len(row) for row in rows])
    sizes = reader.lengths[places].astype(np.int64)  # of each dialogue
    lengths = np.add.reduceat(sizes, np.cumsum(counts) - counts)
    ids, learned = reader.read(places)
    labels = np.where(learned, ids, np.int32(IGNORE))
    positions = _count_up(sizes)
    found: dict[str, pa.Array] = {"length": pa.array(lengths, pa.int32())}
    lists = {"token_ids": (ids, layout.pad_id), "labels": (labels, IGNORE)}
    lists["position_ids"] = (positions, 0)
    lists["attention_mask"] = (np.ones(len(ids), np.int32), 0)
    for name, (flat, filler) in lists.items():
        found[name] = _lists(flat, lengths, layout.padded_to, filler)
    if layout.padded_to and not layout.packed:  # published rows count on through the padding
        flat = _count_up(np.full(len(rows), layout.padded_to))
        found["position_ids"] = _lists(flat, np.full(len(rows), layout.padded_to), 0, 0)
    found["num_samples"] = pa.array(counts, pa.int32())
    found["sample_lengths"] = _lists(sizes.astype(np.int32), counts, 0, 0)
    found["type"] = pa.array(list(_types(places, counts, layout)), pa.string())
    return found, int(learned.sum())


def _types(
    places: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], layout: Layout
) -> Iterator[str]:
    """Yield a type per row; padded ones get that of their first dialogue, as published."""
    is_mixed = layout.packed and not layout.padded_to
    firsts = np.cumsum(counts) - counts
    for place in places[firsts]:
        yield _PACKED if is_mixed else layout.types[layout.kind[place]]


def _count_up(sizes: npt.NDArray[np.int64]) -> Array:
    """Return 0 … size-1 for each size, joined."""
    starts = np.cumsum(sizes) - sizes
    return (np.arange(int(sizes.sum())) - np.repeat(starts, sizes)).astype(np.int32)


def _lists(flat: Array, lengths: npt.NDArray[np.int64], width: int, filler: int) -> pa.Array:
    """Return a column of lists of these lengths, each filled up to `width` if that is not 0."""
    if width:
        filled = np.full((len(lengths), width), filler, np.int32)
        filled[np.arange(width) < lengths[:, None]] = flat
        flat, lengths = filled.reshape(-1), np.full(len(lengths), width)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
