"""Documents from parquet, JSON lines and text files, in batches, in flat memory and sorted order.

    .parquet                     one document per row: the text column, or a recipe of several
    .jsonl  .jsonl.gz  .jsonl.zst    one JSON object per line, the text under one key, or several
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

from minillm.data.recipes import Recipe
from minillm.errors import InputError

_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 1 << 20
_KINDS = ("parquet", "jsonl", "txt")

TEXT = Recipe.of_column("text")


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
        for batch in read_file(file, Recipe.of_column(text_column)):
            num_documents += len(batch.texts)
            yield batch
    if num_documents == 0:
        names = f"`{files[0]}`" if len(files) == 1 else f"the {len(files)} files"
        raise InputError(
            f"no document with any text in {names}",
            hint="use other files, or the text in the package: `--data bundled`",
        )


def read_file(file: Path, recipe: Recipe = TEXT) -> Iterator[Batch]:
    """Yield the documents of one file; batches may be empty, and there may be none.

    Args:
        file: As `find_files` gives it.
        recipe: What of a row makes a document; a text file has no columns, and ignores it.

    Raises:
        InputError: The file is broken or lacks a column.
    """
    kind = _kind(file)
    if kind == "parquet":
        yield from _read_parquet(file, recipe)
        return
    read = _read_txt if kind == "txt" else _read_jsonl
    with file.open("rb") as raw:
        position = 0
        for texts in _pack(read(file, read_lines(file, raw), recipe)):
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


def open_parquet(file: Path, *columns: str) -> pq.ParquetFile:
    """Open a parquet file for streaming and check that each of `columns` holds strings.

    Raises:
        InputError: It is not parquet, or has no such column of text.
    """
    try:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as err:
        raise _broken(file, err) from err
    names = opened.schema_arrow.names
    for column in columns:
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


def _read_parquet(file: Path, recipe: Recipe) -> Iterator[Batch]:
    needed = [column for column in recipe.columns if column not in recipe.optional]
    with open_parquet(file, *needed) as opened:
        names = opened.schema_arrow.names
        columns = [column for column in dict.fromkeys(recipe.columns) if column in names]
        if not columns:
            raise _missing(str(file), recipe.columns[0], names)
        bytes_per_row = file.stat().st_size / max(1, opened.metadata.num_rows)
        for rows in iter_parquet(opened, file, columns):
            values = [rows[column] for column in columns]
            if recipe.is_plain:
                texts: Iterable[str | None] = values[0]
            else:
                texts = (
                    recipe.join(dict(zip(columns, r, strict=True)))
                    for r in zip(*values, strict=True)
                )
            kept = [text for text in texts if text and not text.isspace()]
            yield Batch(kept, len(values[0]) * bytes_per_row)


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


def _read_jsonl(file: Path, lines: Iterator[tuple[int, str]], recipe: Recipe) -> Iterator[str]:
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
                hint=f'write one `{{"{recipe.columns[0]}": …}}` per line',
            )
        text = _text_of(item, recipe, where)
        if not text.isascii() and not _is_unicode(text):
            raise InputError(
                f"{where}: the text holds half a surrogate pair (`\\ud800` to `\\udfff`), "
                "which no UTF-8 can hold",
                hint=f"look at it: `sed -n {number}p {file}`",
            )
        yield text


def _text_of(item: dict[str, object], recipe: Recipe, where: str) -> str:
    row: dict[str, str | None] = {}
    for key in recipe.columns:
        value = item.get(key)
        if value is None:
            if key not in item and key not in recipe.optional:
                raise _missing(where, key, list(item))
        elif isinstance(value, str):
            row[key] = value
        else:
            raise InputError(
                f"{where}: `{key}` holds {type(value).__name__}, not text",
                hint=f"name the key of the text, one of {_quoted(list(item))}: "
                "`--text-column NAME`",
            )
    if not row and not any(key in item for key in recipe.columns):
        raise _missing(where, recipe.columns[0], list(item))
    return (row.get(recipe.columns[0]) or "") if recipe.is_plain else recipe.join(row)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_txt(_file: Path, lines: Iterator[tuple[int, str]], _recipe: Recipe) -> Iterator[str]:
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
