"""Documents from parquet, JSON lines and text files, in batches, in flat memory and sorted order.

    .parquet                     one document per row of the text column
    .jsonl  .jsonl.gz  .jsonl.zst    one JSON object per line, the text under one key
    .txt  .txt.gz  .txt.zst      documents are separated by one or more blank lines

Documents without any visible character are skipped. A line of a text file is never split, so a
.txt without blank lines is one document and is held in memory as a whole.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from minillm.errors import InputError

_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 1 << 20
_KINDS = ("parquet", "jsonl", "txt")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some documents, and how far reading them moved through the file (bytes on disk)."""

    texts: list[str]
    read_bytes: float


def find_files(path: Path) -> list[Path]:
    """Return the supported files below a folder, sorted by path, or the file itself.

    Names that begin with a dot are left out.

    Raises:
        InputError: There is nothing at `path`, or nothing that we can read.
    """
    if path.is_file():
        if _kind(path) is None:
            raise InputError(
                f"`{path}` is neither parquet, jsonl nor txt",
                hint='convert it to JSON lines, one `{"text": …}` per line, named `NAME.jsonl`',
            )
        return [path]
    if not path.is_dir():
        raise InputError(f"no file or folder at `{path}`", hint="check the path")
    found = [
        file
        for file in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix())
        if _kind(file) is not None
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise InputError(
            f"no parquet, jsonl or txt file below `{path}`",
            hint="put some there, or use the text in the package: `--data bundled`",
        )
    return found


def total_bytes(files: list[Path]) -> int:
    """Return the bytes on disk: the total that `Batch.read_bytes` adds up to."""
    return sum(file.stat().st_size for file in files)


def read_batches(files: list[Path], text_column: str = "text") -> Iterator[Batch]:
    """Yield the documents of all files in order.

    Args:
        files: As `find_files` gives them.
        text_column: Parquet column or JSON key of the text.

    Raises:
        InputError: A file is broken, lacks the column, or there is no document in any of them.
    """
    num_documents = 0
    for file in files:
        for batch in read_file(file, text_column):
            num_documents += len(batch.texts)
            yield batch
    if num_documents == 0:
        names = f"`{files[0]}`" if len(files) == 1 else f"the {len(files)} files"
        raise InputError(
            f"no document with any text in {names}",
            hint="use other files, or the text in the package: `--data bundled`",
        )


def read_file(file: Path, text_column: str = "text") -> Iterator[Batch]:
    """Yield the documents of one file; batches may be empty, and there may be none.

    Raises:
        InputError: The file is broken or lacks the column.
    """
    kind = _kind(file)
    if kind == "parquet":
        yield from _read_parquet(file, text_column)
        return
    read = _read_txt if kind == "txt" else _read_jsonl
    with file.open("rb") as raw:
        position = 0
        for texts in _pack(read(file, read_lines(file, raw), text_column)):
            yield Batch(texts, raw.tell() - position)
            position = raw.tell()
        yield Batch([], file.stat().st_size - position)


def stem_of(file: Path) -> str:
    """Return a file's name without the endings we know: `wiki.zh.jsonl.gz` → `wiki.zh`."""
    bare = file.name
    for ending in (".gz", ".zst", *(f".{kind}" for kind in _KINDS)):
        if bare.lower().endswith(ending):
            bare = bare[: -len(ending)]
    return bare or file.name


def _kind(file: Path) -> str | None:
    """Return the format of a file by its name."""
    name = file.name.lower()
    bare = name.removesuffix(".gz").removesuffix(".zst")
    kind = bare.rpartition(".")[2]
    if kind not in _KINDS or (kind == "parquet" and bare != name):
        return None
    return kind


def open_parquet(file: Path, column: str) -> pq.ParquetFile:
    """Open a parquet file for streaming and check that `column` holds strings.

    Raises:
        InputError: It is not parquet, or has no such column of text.
    """
    try:
        opened = pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as err:
        raise _broken(file, err) from err
    names = opened.schema_arrow.names
    if column not in names:
        raise _missing(str(file), column, names)
    found = opened.schema_arrow.field(column).type
    if pa.types.is_dictionary(found):
        found = found.value_type
    if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise InputError(
            f"column `{column}` of `{file}` holds {found}, not text",
            hint=f"name the column of text, one of {_quoted(names)}: `--text-column NAME`",
        )
    return opened


def iter_parquet(
    opened: pq.ParquetFile, file: Path, columns: list[str]
) -> Iterator[dict[str, list[str | None]]]:
    """Yield the columns of some rows at a time in flat memory.

    Raises:
        InputError: The file is damaged further in.
    """
    try:
        for rows in opened.iter_batches(_BATCH_DOCUMENTS, columns=columns):
            yield rows.to_pydict()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        raise _broken(file, err) from err


def _read_parquet(file: Path, column: str) -> Iterator[Batch]:
    with open_parquet(file, column) as opened:
        bytes_per_row = file.stat().st_size / max(1, opened.metadata.num_rows)
        for rows in iter_parquet(opened, file, [column]):
            texts = [text for text in rows[column] if text and not text.isspace()]
            yield Batch(texts, len(rows[column]) * bytes_per_row)


def read_lines(file: Path, raw: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their end."""
    stream: Iterable[bytes] = raw
    if file.name.lower().endswith(".gz"):
        stream = gzip.GzipFile(fileobj=raw)
    elif file.name.lower().endswith(".zst"):
        stream = _zstd_lines(raw)
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as err:
        raise InputError(
            f"`{file}` line {number}: not UTF-8 ({err.reason} at byte {err.start})",
            hint=f"convert it: `iconv -f GB18030 -t UTF-8 {file} > utf8-{file.name}`",
        ) from err
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as err:
        raise _broken(file, err) from err


def _zstd_lines(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a zstd file of one or more frames.

    zstandard's own reader takes a file that ends inside a frame for whole; here it is an error.
    """
    rest, frame = b"", zstandard.ZstdDecompressor().decompressobj()
    is_inside = False
    while piece := raw.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE):
        while piece:
            *lines, rest = (rest + frame.decompress(piece)).split(b"\n")
            yield from lines
            is_inside, piece = not frame.eof, frame.unused_data
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if is_inside:
        raise zstandard.ZstdError("it ends in the middle")
    if rest:
        yield rest


def _read_jsonl(file: Path, lines: Iterator[tuple[int, str]], key: str) -> Iterator[str]:
    for number, line in lines:
        if not line or line.isspace():
            continue
        where = f"`{file}` line {number}"
        try:
            item = json.loads(line)
        except ValueError as err:
            raise InputError(
                f"{where}: not JSON ({err})", hint=f"look at it: `sed -n {number}p {file}`"
            ) from err
        if not isinstance(item, dict):
            raise InputError(
                f"{where}: a JSON object is wanted, not {type(item).__name__}",
                hint=f'write one `{{"{key}": …}}` per line',
            )
        if key not in item:
            raise _missing(where, key, list(item))
        text = item[key]
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(
                f"{where}: `{key}` holds {type(text).__name__}, not text",
                hint=f"name the key of the text, one of {_quoted(list(item))}: "
                "`--text-column NAME`",
            )
        if not text.isascii() and not _is_unicode(text):
            raise InputError(
                f"{where}: the text holds half a surrogate pair (`\\ud800` to `\\udfff`), "
                "which no UTF-8 can hold",
                hint=f"look at it: `sed -n {number}p {file}`",
            )
        yield text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_txt(_file: Path, lines: Iterator[tuple[int, str]], _key: str) -> Iterator[str]:
    block: list[str] = []
    for _, line in lines:
        if line and not line.isspace():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _pack(texts: Iterator[str]) -> Iterator[list[str]]:
    """Gather texts to batches of bounded size, without the empty ones."""
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        if not text or text.isspace():
            continue
        batch.append(text)
        num_chars += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _missing(where: str, column: str, names: list[str]) -> InputError:
    where = where if where.startswith("`") else f"`{where}`"
    hint = f"`--text-column {names[0]}`" if names else "use a file that has one"
    return InputError(f"{where} has no `{column}`, only {_quoted(names)}", hint=hint)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def _broken(file: Path, why: object) -> InputError:
    reason = str(why).strip().splitlines() or ["damaged"]
    return InputError(
        f"`{file}` cannot be read: {reason[0]}", hint="fetch or make the file again, or remove it"
    )
