"""Rows of parquet as (text, source) batches, in and out, in flat memory and without Python strings.

A batch is about 4 MB of text whatever the documents' length, and the file is read through a small
buffer, so a file with one huge row group costs no more memory than one with many.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minillm.errors import InputError

NO_SOURCE = "(none)"
"""Source of a document whose file has no such column, or no value in it."""

PART_ROWS = 1_000_000
"""Documents per output file."""

SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string())])

_BATCH_BYTES = 4_000_000
_MAX_BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20
_GROUP_ROWS = 8192
_GROUP_BYTES = 1 << 24


def read_rows(
    file: Path, text_column: str, source_column: str, advance: Callable[[float], None]
) -> Iterator[pa.RecordBatch]:
    """Yield the documents with a visible character, as batches of `SCHEMA`.

    Args:
        file: The parquet file.
        text_column: Its column of text.
        source_column: Its column of sources, which it may lack; empty: all are `NO_SOURCE`.
        advance: Told the bytes on disk that were read.

    Raises:
        InputError: The file is damaged, or a column does not hold what it should.
    """
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as opened:
            _require_text(file, opened.schema_arrow, text_column)
            has_source = bool(source_column) and source_column in opened.schema_arrow.names
            columns = [text_column, source_column] if has_source else [text_column]
            num_rows = max(1, opened.metadata.num_rows)
            per_row = file.stat().st_size / num_rows
            for rows in opened.iter_batches(_batch_rows(opened.metadata), columns=columns):
                rows.validate(full=True)
                sources = _as_names(file, rows.column(source_column)) if has_source else None
                yield _documents(rows.column(text_column), sources)
                advance(rows.num_rows * per_row)
    except (pa.ArrowException, OSError) as err:
        reason = str(err).strip().splitlines() or ["damaged"]
        raise InputError(
            f"`{file}` cannot be read: {reason[0]}",
            hint="fetch or make the file again, or remove it",
        ) from err


def has_column(file: Path, name: str) -> bool:
    """Tell whether a parquet file that `read_rows` has read has this column."""
    return name in pq.read_schema(file).names


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Return how many rows hold about `_BATCH_BYTES`, by the file's own account of its size."""
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(group).total_byte_size for group in groups)
    per_row = max(1, size // max(1, metadata.num_rows))
    fitting: int = _BATCH_BYTES // per_row
    return max(1, min(_MAX_BATCH_ROWS, fitting))


def _require_text(file: Path, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        names = ", ".join(f"`{name}`" for name in schema.names) or "nothing"
        other = schema.names[0] if schema.names else "NAME"
        raise InputError(
            f"`{file}` has no `{column}`, only {names}", hint=f"`--text-column {other}`"
        )
    found = schema.field(column).type
    value = found.value_type if pa.types.is_dictionary(found) else found
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise InputError(
            f"column `{column}` of `{file}` holds {found}, not text",
            hint="name the column of text: `--text-column NAME`",
        )


def _as_names(file: Path, column: pa.Array) -> pa.Array:
    try:
        names = column.cast(pa.string())
    except pa.ArrowNotImplementedError:
        raise InputError(
            f"the sources in `{file}` are {column.type}, not names",
            hint="name another column: `--source-column NAME`, or `--source-column ''` for none",
        ) from None
    known = pc.and_(pc.is_valid(names), pc.not_equal(pc.utf8_trim_whitespace(names), ""))
    return pc.if_else(pc.fill_null(known, False), names, NO_SOURCE)


def _documents(texts: pa.Array, sources: pa.Array | None) -> pa.RecordBatch:
    texts = texts.cast(pa.string())
    if sources is None:
        sources = pa.repeat(pa.scalar(NO_SOURCE, pa.string()), len(texts))
    rows = pa.RecordBatch.from_arrays([texts, sources], schema=SCHEMA)
    # all letters are white space, of which an empty text has none
    blank = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0))
    return rows.filter(pc.fill_null(pc.invert(blank), False))


class PartWriter:
    """Write rows to numbered parquet files of `PART_ROWS` each, in small row groups."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = self._rows_in_part = 0
        self._writer: pq.ParquetWriter | None = None
        self.num_parts = 0

    def append(self, rows: pa.RecordBatch) -> None:
        """Take some rows of `SCHEMA`."""
        self._held.append(rows)
        self._held_rows += rows.num_rows
        self._held_bytes += rows.nbytes
        if self._held_rows >= _GROUP_ROWS or self._held_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._held, SCHEMA).combine_chunks()
        self._held, self._held_rows, self._held_bytes = [], 0, 0
        while table.num_rows:
            if self._writer is None:
                place = self._folder / f"part-{self.num_parts:05d}.parquet"
                self._writer = pq.ParquetWriter(place, SCHEMA, compression="zstd")
                self.num_parts += 1
            head = table.slice(0, PART_ROWS - self._rows_in_part)
            self._writer.write_table(head)
            self._rows_in_part += head.num_rows
            table = table.slice(head.num_rows)
            if self._rows_in_part == PART_ROWS:
                self._writer.close()
                self._writer, self._rows_in_part = None, 0
