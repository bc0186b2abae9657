"""A sample of parquet documents that keeps the share of each source.

Two passes over the files in flat memory: the first counts, on all cores, the second picks. The
number picked from a source is exact, not a matter of luck: the total is `ratio` of all documents,
rounded, and is shared out by largest remainder; every source keeps at least one document. Which
ones is drawn with the seed (selection sampling, Knuth TAOCP 2, 3.4.2, algorithm S), in the files'
order. The price is reading everything twice.
"""

import math
import os
import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from minillm import paths
from minillm.data.documents import find_files, total_bytes
from minillm.data.sample_report import SampleReport, SourceCount, is_report, write_sample_report
from minillm.data.sample_rows import NO_SOURCE, PartWriter, has_column, read_rows
from minillm.errors import InputError, RunError
from minillm.files import atomic_folder, require_free_space
from minillm.log import Progress, Silent, task
from minillm.settings import PrepareTokenizerConfig

AUTO_BYTES = 40_000_000
"""Text that `sample_ratio` 0 aims at: ample for a vocabulary of 32,000, and trains in a minute."""

MAX_SOURCES = 10_000
"""More different values than this are no sources but, say, addresses, and each would keep a row."""


def stratify(cfg: PrepareTokenizerConfig, progress: Progress | None = None) -> SampleReport:
    """Write the sample to `cfg.out`, which is replaced as a whole.

    Raises:
        InputError: No parquet, a broken one, no documents, or `cfg.out` holds foreign files.
        SetupError: The disk is too small for the sample.
        RunError: The files changed while they were read.
    """
    progress = progress or Silent()
    files = _find_parquet(cfg)
    sources = _count(files, cfg, progress)
    if not sources:
        raise InputError(
            f"no document with any text in `{cfg.data}`",
            hint="use the text in the package: `--data bundled`",
        )
    num_bytes = sum(count.text_bytes for count in sources.values())
    ratio = cfg.sample_ratio or min(1.0, AUTO_BYTES / num_bytes)
    quotas = share_out({name: count.documents for name, count in sources.items()}, ratio)
    require_free_space(cfg.out.parent, int(ratio * total_bytes(files)), "the sample")
    with atomic_folder(cfg.out, ours=_is_ours) as folder:
        writer = PartWriter(folder)
        with closing(writer), task(progress, "sample", total_bytes(files), "bytes"):
            draw = _Draw(sources, quotas, cfg.seed)
            for file in files:
                for rows in read_rows(file, cfg.text_column, cfg.source_column, progress.advance):
                    picked = draw.pick(rows)
                    writer.append(picked)
                    for name, (documents, size) in _sizes(picked).items():
                        sources[name].kept_documents += documents
                        sources[name].kept_bytes += size
            draw.finish()
        report = SampleReport(
            folder=cfg.out,
            num_inputs=len(files),
            num_without_source=_without_source(files, cfg.source_column, sources),
            num_files=writer.num_parts,
            ratio=ratio,
            seed=cfg.seed,
            sources=dict(sorted(sources.items(), key=lambda item: (-item[1].documents, item[0]))),
        )
        write_sample_report(report, folder)
    return report


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


def _count(
    files: list[Path], cfg: PrepareTokenizerConfig, progress: Progress
) -> dict[str, SourceCount]:
    """Count documents and bytes of every source, a few files at a time."""
    lock, stop = threading.Lock(), threading.Event()

    def advance(amount: float) -> None:
        with lock:
            progress.advance(amount)

    def count_file(file: Path) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for rows in read_rows(file, cfg.text_column, cfg.source_column, advance):
            for name, (documents, size) in _sizes(rows).items():
                before = found.get(name, (0, 0))
                found[name] = (before[0] + documents, before[1] + size)
            _require_sources(len(found), cfg)
            if stop.is_set():
                break
        return found

    sources: dict[str, SourceCount] = {}
    workers = min(len(files), os.cpu_count() or 1, 8)
    with (
        task(progress, "count", total_bytes(files), "bytes"),
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for found in pool.map(count_file, files):
                for name, (documents, size) in found.items():
                    count = sources.setdefault(name, SourceCount())
                    count.documents += documents
                    count.text_bytes += size
                _require_sources(len(sources), cfg)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sources


def _require_sources(num_sources: int, cfg: PrepareTokenizerConfig) -> None:
    if num_sources > MAX_SOURCES:
        raise InputError(
            f"column `{cfg.source_column}` has more than {MAX_SOURCES:,} different values; "
            "those are no sources, and each would keep a document",
            hint="name another column: `--source-column NAME`, or `--source-column ''` for none",
        )


def _sizes(rows: pa.RecordBatch) -> dict[str, tuple[int, int]]:
    """Return documents and bytes of text by source."""
    if not rows.num_rows:
        return {}
    codes = rows.column("source").dictionary_encode()
    places = codes.indices.to_numpy()
    sizes = pc.binary_length(rows.column("text")).to_numpy().astype(np.int64)
    names = codes.dictionary.to_pylist()
    documents = np.bincount(places, minlength=len(names))
    text_bytes = np.zeros(len(names), dtype=np.int64)
    np.add.at(text_bytes, places, sizes)
    return {
        name: (int(documents[place]), int(text_bytes[place])) for place, name in enumerate(names)
    }


class _Draw:
    """Pick the quotas' number of rows of each source, each row with the same chance."""

    def __init__(
        self, sources: Mapping[str, SourceCount], quotas: Mapping[str, int], seed: int
    ) -> None:
        self._unseen = {name: count.documents for name, count in sources.items()}
        self._wanted = dict(quotas)
        self._draws = {name: random.Random(f"{seed} {name}").random for name in sources}

    def pick(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows that are drawn, in order."""
        unseen, wanted, draws = self._unseen, self._wanted, self._draws
        mask = []
        for name in rows.column("source").to_pylist():
            left = unseen.get(name, 0)
            if left == 0:
                raise _changed()
            is_drawn = draws[name]() * left < wanted[name]
            wanted[name] -= is_drawn
            unseen[name] = left - 1
            mask.append(is_drawn)
        return rows.filter(pa.array(mask, pa.bool_()))

    def finish(self) -> None:
        """Check that every quota is full."""
        if any(self._wanted.values()):
            raise _changed()


def _changed() -> RunError:
    return RunError(
        "the files changed between the two passes over them",
        hint="run the same command again when nothing writes them",
    )


def _find_parquet(cfg: PrepareTokenizerConfig) -> list[Path]:
    """Return the files to sample; an earlier sample that lies among them is none of them."""
    given = cfg.data
    if given == paths.RAW and not given.exists():
        raise InputError(
            f"no documents: `{given}` does not exist",
            hint="sample the text in the package with `minillm prepare-tokenizer --data bundled`, "
            "or name your own: `--data FOLDER`",
        )
    place = paths.resolve(given, paths.BUNDLED_CORPUS)
    found = [file for file in _outside(find_files(place), cfg.out) if _is_parquet(file)]
    if not found:
        raise InputError(
            f"no parquet file in `{place}`; only parquet can be sampled by source",
            hint=f"`minillm train-tokenizer --data {place}` takes jsonl and txt as they are",
        )
    return found


def _outside(files: list[Path], folder: Path) -> Iterator[Path]:
    folder = folder.resolve()
    return (file for file in files if not file.resolve().is_relative_to(folder))


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _without_source(files: list[Path], column: str, sources: Mapping[str, SourceCount]) -> int:
    """Return how many files lack the column; looks only where documents say that some do."""
    if NO_SOURCE not in sources or not column:
        return 0
    return sum(not has_column(file, column) for file in files)


def _is_ours(entry: Path) -> bool:
    return is_report(entry) or (entry.name.startswith("part-") and _is_parquet(entry))
