"""Inputs of `prepare-sft` as plain JSONL files, in which any line can be read by itself.

A plain `.jsonl` is taken as it is. What is compressed, and rows of a parquet, are first written as
JSONL to the work folder; the price is their unpacked size on disk for a while. Rows that hold
tokens already (an SFT parquet, ours or a published one) become lines with their ids in base64.
"""

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from minillm.data.documents import read_lines
from minillm.data.identity import SOURCE
from minillm.data.sft_rows import LISTS, read_batch, read_metadata
from minillm.errors import InputError
from minillm.files import atomic_write
from minillm.log import Progress, task

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A JSONL file of dialogues, or of tokens."""

    path: Path
    name: Path
    """The file that the user knows."""
    has_tokens: bool = False
    is_identity: bool = False


@dataclass(frozen=True, slots=True)
class TokenLine:
    """An encoded dialogue of L tokens."""

    ids: npt.NDArray[np.uint32]
    learned: npt.NDArray[np.bool_]
    source: str

    @property
    def is_multi_turn(self) -> bool:
        """More than one stretch is learned."""
        return int((np.diff(self.learned.astype(np.int8), prepend=0) == 1).sum()) > 1

    def to_json(self) -> str:
        """Return one line."""
        bits = np.packbits(self.learned)
        parts = [base64.b64encode(a.tobytes()).decode() for a in (self.ids.astype("<u4"), bits)]
        return json.dumps({"ids": parts[0], "learned": parts[1], "type": self.source})

    @classmethod
    def from_json(cls, line: bytes) -> "TokenLine":
        """Read what `to_json` wrote."""
        item = json.loads(line)
        ids = np.frombuffer(base64.b64decode(item["ids"]), "<u4")
        bits = np.frombuffer(base64.b64decode(item["learned"]), np.uint8)
        return cls(ids, np.unpackbits(bits, count=len(ids)).astype(bool), item["type"])


def find_dialogue_files(path: Path, *, without: Path | None = None) -> list[Path]:
    """Return the JSONL and parquet files below a folder, sorted by path, or the file itself.

    Args:
        path: File or folder. Names that begin with a dot are left out.
        without: A result that may lie in the folder, left out with its work folder.

    Raises:
        InputError: There is none.
    """
    if path.is_file() and path.name.lower().endswith(_SUFFIXES):
        return [path]
    places = ((file, file.relative_to(path).parts) for file in sorted(path.rglob("*")))
    files = [
        file
        for file, parts in places
        if file.name.lower().endswith(_SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") or part.endswith(".work") for part in parts)
        and (without is None or file.resolve() != without.resolve())
    ]
    if not files:
        what = "is not a JSONL file" if path.is_file() else "holds no .jsonl file"
        raise InputError(
            f"`{path}` {what}",
            hint="write one dialogue per line to `NAME.jsonl`, or use `--data bundled`",
        )
    return files


def unpack(
    files: list[Path], work: Path, tokenizer_sha256: str, vocab_size: int, progress: Progress
) -> list[PlainFile]:
    """Return plain files of the same lines, in order.

    Raises:
        InputError: A file is broken, or holds tokens of another tokenizer.
    """
    plain = []
    for number, file in enumerate(files):
        if file.name.lower().endswith(".jsonl"):
            plain.append(PlainFile(file, file))
            continue
        lines = _unpacked_lines(file, progress)
        has_tokens = False
        if file.name.lower().endswith(".parquet"):
            with _readable(file):
                names = pq.read_schema(file).names
            has_tokens = "token_ids" in names
            if has_tokens:
                _check_tokenizer(file, tokenizer_sha256)
                lines = _token_lines(file, vocab_size, progress)
            else:
                lines = _message_lines(file, names, progress)
        place = work / f"unpacked-{number}.jsonl"
        with atomic_write(place) as stream:
            for line in lines:
                stream.write(line.encode() + b"\n")
        plain.append(PlainFile(place, file, has_tokens=has_tokens))
    return plain


def write_identity(dialogues: list[dict[str, Any]], work: Path) -> list[PlainFile]:
    """Write the identity dialogues as a file like the others; no file if there are none."""
    if not dialogues:
        return []
    place = work / f"{SOURCE}.jsonl"
    with atomic_write(place) as stream:
        for item in dialogues:
            stream.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
    return [PlainFile(place, Path(SOURCE), is_identity=True)]


def _unpacked_lines(file: Path, progress: Progress) -> Iterator[str]:
    size = file.stat().st_size
    with task(progress, f"unpack {file.name}", size, "bytes"), file.open("rb") as raw:
        before = 0
        for number, line in read_lines(file, raw):
            yield line
            if number % 4096 == 0:
                progress.advance(raw.tell() - before)
                before = raw.tell()
        progress.advance(size - before)


def _message_lines(file: Path, names: list[str], progress: Progress) -> Iterator[str]:
    """Yield rows that have a column `messages`, or those of a deepctrl line."""
    if "messages" not in names and not {"instruction", "output"} <= set(names):
        raise InputError(
            f"`{file}` has no column `messages`, `instruction` with `output`, or `token_ids`, so "
            "it holds no dialogues",
            hint='a row of dialogues has `messages`: `[{"role": …, "content": …}, …]`',
        )
    wanted = ("messages", "instruction", "input", "output", "history", "type", "source")
    columns = [name for name in wanted if name in names]
    for batch in _batches(file, columns, progress):
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=True)


def _token_lines(file: Path, vocab_size: int, progress: Progress) -> Iterator[str]:
    """Yield the dialogues of an SFT parquet, packed or not, as lines of tokens."""
    with _readable(file):
        names = pq.read_schema(file).names
    lists = [name for name in (*LISTS, "length") if name in names]
    columns = [*lists, *(["type"] if "type" in names else [])]
    first = 0
    for batch in _batches(file, columns, progress):
        sizes, ids, learned, starts = read_batch(file, first, batch.select(lists), vocab_size)
        types = batch["type"].to_pylist() if "type" in names else [""] * len(sizes)
        row_of = np.repeat(np.arange(len(sizes)), sizes)
        begins = np.flatnonzero(starts)
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            source = types[row_of[begin]]
            kind = source if isinstance(source, str) else ""
            yield TokenLine(ids[begin:end], learned[begin:end], kind).to_json()
        first += batch.num_rows


def _batches(file: Path, columns: list[str], progress: Progress) -> Iterator[pa.RecordBatch]:
    with (
        _readable(file),
        pq.ParquetFile(file, pre_buffer=False) as opened,
        task(progress, f"unpack {file.name}", opened.metadata.num_rows, "rows"),
    ):
        for batch in opened.iter_batches(_BATCH_ROWS, columns=columns):
            yield batch
            progress.advance(batch.num_rows)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as err:
        raise InputError(
            f"`{file}` is not a readable parquet: {str(err).splitlines()[0]}",
            hint="fetch or make the file again, or remove it",
        ) from err


def _check_tokenizer(file: Path, tokenizer_sha256: str) -> None:
    found = str(read_metadata(file).get("tokenizer_sha256", ""))
    if found not in ("", tokenizer_sha256):
        raise InputError(
            f"`{file}` was made with tokenizer {found[:12]}…, not {tokenizer_sha256[:12]}…",
            hint="name the folder of the tokenizer that made it: `--tokenizer FOLDER`",
        )
