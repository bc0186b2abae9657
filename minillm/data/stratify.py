"""A sample of parquet documents that keeps the share of each source.

Two passes over the files in flat memory: the first counts, the second picks. The number picked
from a source is exact, not a matter of luck: the total is `ratio` of all documents, rounded, and
is shared out by largest remainder; every source keeps at least one document. Which ones is drawn
with the seed (selection sampling, Knuth TAOCP 2, 3.4.2, algorithm S), in the files' order. The
price is reading everything twice.
"""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from minillm import paths
from minillm.data.documents import find_files, iter_parquet, open_parquet, total_bytes
from minillm.errors import InputError, RunError
from minillm.files import atomic_folder
from minillm.log import Progress, Silent, task
from minillm.settings import PrepareTokenizerConfig

PART_ROWS = 1_000_000
"""Documents per output file."""

AUTO_BYTES = 40_000_000
"""Text that `sample_ratio` 0 aims at: ample for a vocabulary of 32,000, and trains in a minute."""

ONE_SOURCE = "all"
"""Source of documents in a file without a `source` column."""

_GROUP_ROWS = 8192
_GROUP_CHARS = 1 << 24
_SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string())])


@dataclass(slots=True)
class SourceCount:
    """One source, before and after."""

    documents: int = 0
    text_bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What was sampled: counts per source, by name."""

    folder: Path
    num_files: int
    sources: Mapping[str, SourceCount]


def stratify(cfg: PrepareTokenizerConfig, progress: Progress | None = None) -> SampleReport:
    """Write the sample to `cfg.out`, which is replaced as a whole.

    Raises:
        InputError: No parquet, a broken one, no documents, or `cfg.out` holds foreign files.
    """
    progress = progress or Silent()
    files = _find_parquet(cfg.data)
    sources: dict[str, SourceCount] = {}
    for text, source in _read(files, progress, "count"):
        count = sources.setdefault(source, SourceCount())
        count.documents += 1
        count.text_bytes += len(text.encode())
    if not sources:
        raise InputError(
            f"no document with any text in `{cfg.data}`",
            hint="use the text in the package: `--data bundled`",
        )
    ratio = cfg.sample_ratio or min(1.0, AUTO_BYTES / sum(c.text_bytes for c in sources.values()))
    quotas = share_out({name: count.documents for name, count in sources.items()}, ratio)
    with atomic_folder(cfg.out, ours=_is_part) as folder:
        writer = _PartWriter(folder)
        for text, source in _pick(_read(files, progress, "sample"), sources, quotas, cfg.seed):
            writer.append(text, source)
            sources[source].kept_documents += 1
            sources[source].kept_bytes += len(text.encode())
        writer.close()
    return SampleReport(cfg.out, writer.num_parts, dict(sorted(sources.items())))


def share_out(counts: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Share `ratio` of all documents among the sources by largest remainder, at least one each.

    >>> share_out({"a": 70, "b": 25, "c": 5}, 0.1)
    {'a': 7, 'b': 2, 'c': 1}
    """
    exact = {name: count * ratio for name, count in counts.items()}
    quotas = {name: math.floor(share) for name, share in exact.items()}
    left = round(sum(counts.values()) * ratio) - sum(quotas.values())
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: max(0, left)]:
        quotas[name] += 1
    return {name: min(counts[name], max(1, quota)) for name, quota in quotas.items()}


def _pick(
    documents: Iterator[tuple[str, str]],
    sources: Mapping[str, SourceCount],
    quotas: Mapping[str, int],
    seed: int,
) -> Iterator[tuple[str, str]]:
    unseen = {name: count.documents for name, count in sources.items()}
    wanted = dict(quotas)
    draws = {name: random.Random(f"{seed} {name}") for name in sources}
    for text, source in documents:
        if unseen.get(source, 0) == 0:
            raise _changed()
        if draws[source].random() * unseen[source] < wanted[source]:
            wanted[source] -= 1
            yield text, source
        unseen[source] -= 1
    if any(wanted.values()):
        raise _changed()


def _changed() -> RunError:
    return RunError(
        "the files changed between the two passes over them",
        hint="run the same command again when nothing writes them",
    )


def _find_parquet(given: Path) -> list[Path]:
    if given == paths.RAW and not given.exists():
        raise InputError(
            f"no documents: `{given}` does not exist",
            hint="sample the text in the package with `minillm prepare-tokenizer --data bundled`, "
            "or name your own: `--data FOLDER`",
        )
    place = paths.resolve(given, paths.BUNDLED_CORPUS)
    found = [file for file in find_files(place) if file.suffix.lower() == ".parquet"]
    if not found:
        raise InputError(
            f"no parquet file in `{place}`; only parquet can be sampled by source",
            hint=f"`minillm train-tokenizer --data {place}` takes jsonl and txt as they are",
        )
    return found


def _read(files: list[Path], progress: Progress, what: str) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of all documents that are not blank."""
    with task(progress, what, total_bytes(files), "bytes"):
        for file in files:
            with open_parquet(file, "text") as opened:
                has_source = "source" in opened.schema_arrow.names
                bytes_per_row = file.stat().st_size / max(1, opened.metadata.num_rows)
                columns = ["text", "source"] if has_source else ["text"]
                for rows in iter_parquet(opened, file, columns):
                    names = rows.get("source", [None] * len(rows["text"]))
                    for text, name in zip(rows["text"], names, strict=True):
                        if text and not text.isspace():
                            yield text, ONE_SOURCE if name is None else str(name)
                    progress.advance(len(names) * bytes_per_row)


def _is_part(entry: Path) -> bool:
    return entry.name.startswith("part-") and entry.suffix == ".parquet"


class _PartWriter:
    """Write rows to numbered parquet files of bounded size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts: list[str] = []
        self._names: list[str] = []
        self._num_chars = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_part = 0
        self.num_parts = 0

    def append(self, text: str, source: str) -> None:
        self._texts.append(text)
        self._names.append(source)
        self._num_chars += len(text)
        is_full = len(self._texts) == min(_GROUP_ROWS, PART_ROWS - self._rows_in_part)
        if is_full or self._num_chars >= _GROUP_CHARS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._texts:
            return
        if self._writer is None:
            place = self._folder / f"part-{self.num_parts:05d}.parquet"
            self._writer = pq.ParquetWriter(place, _SCHEMA, compression="zstd")
            self.num_parts += 1
        table = pa.table({"text": self._texts, "source": self._names}, schema=_SCHEMA)
        self._writer.write_table(table)
        self._rows_in_part += len(self._texts)
        self._texts, self._names, self._num_chars = [], [], 0
        if self._rows_in_part >= PART_ROWS:
            self._writer.close()
            self._writer, self._rows_in_part = None, 0
