"""`minillm inspect FILE.parquet` of SFT rows: ours and the published layout, packed or not."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from minillm.data.inspect_near import (
    odd_neighbours,
    pick_tokenizer,
    report_tokenizer,
    sft_metadata,
)
from minillm.data.inspect_report import Duplicates, Lengths, Picks, Report, Sample, Table
from minillm.data.sft_rows import LISTS, read_batch
from minillm.errors import InputError
from minillm.files import sha256_file
from minillm.log import Progress, task
from minillm.settings import InspectConfig

Array = npt.NDArray[Any]

_BATCH_ROWS = 1024
_CHECKED = 256
_SHOWN_TOKENS = 400
_MAX_PROBLEMS = 5
_ANY_ID = 1 << 31


def inspect_sft(path: Path, cfg: InspectConfig, progress: Progress) -> Report:
    """Describe an SFT parquet in flat memory.

    Args:
        path: The parquet, with columns `token_ids` and `labels`.
        cfg: What to show, and the tokenizer.
        progress: Where to report on a long scan.

    Raises:
        InputError: The tokenizer named in `cfg` is none.
    """
    metadata = sft_metadata(path)
    made_with = str(metadata.get("tokenizer_sha256") or "") or None
    found = pick_tokenizer(cfg.tokenizer, path.parent, made_with)
    place = "not here" if isinstance(found, str) else found.place
    vocab_size = metadata.get("vocab_size")
    if not isinstance(vocab_size, int):
        vocab_size = _ANY_ID if isinstance(found, str) else len(found.tokenizer)
    scan = _Scan(path, cfg, vocab_size)
    scan.run(progress)
    report = Report(path.as_posix(), f"SFT rows ({scan.layout()})")
    tokenizer = report_tokenizer(found, made_with, report)
    report.facts = {
        "size_bytes": path.stat().st_size,
        **scan.facts(metadata.get("sequence_length")),
        "vocabulary": vocab_size,
        "tokenizer": place,
        "fingerprint": made_with or "not in the file",
        **({"sha256": sha256_file(path)} if cfg.verify else {}),
    }
    report.problems += scan.problems()
    scan.duplicates.report_to(report, "dialogues")
    if made_with and (sentence := odd_neighbours(path, made_with)):
        report.problems.append(sentence)
    if not made_with:
        report.notes.append(f"it does not say which tokenizer made it: read with `{place}`")
    if scan.types:
        total = scan.types.total()
        rows = [[n or "(none)", c, f"{c / total:.2%}"] for n, c in scan.types.most_common()]
        report.tables.append(Table("types", ["type", "rows", "share"], rows))
    report.bars = [
        lengths.histogram(title)
        for title, lengths in (
            ("tokens per row, without padding", scan.rows),
            ("tokens per dialogue", scan.dialogues),
        )
        if lengths.count
    ]
    if scan.per_row.largest > 1:
        report.bars.append(scan.per_row.histogram("dialogues per row"))
    if tokenizer is not None:
        _decode(scan, tokenizer, cfg, report)
    return report


def _decode(
    scan: "_Scan", tokenizer: PreTrainedTokenizerFast, cfg: InspectConfig, report: Report
) -> None:
    """Add samples, with «» around what is learned; look for U+FFFD in the sampled dialogues."""
    picked = scan.picks.items()
    lost = [row for row, (ids, _) in picked if "\ufffd" in _text(tokenizer, ids)]
    if lost:
        report.problems.append(
            f"{len(lost)} of {len(picked)} sampled rows hold U+FFFD, the mark of text lost in "
            f"decoding, e.g. row {lost[0]:,}"
        )
    for row, (ids, learned) in scan.picks.items(cfg.samples):
        shown, marks = ids[:_SHOWN_TOKENS], learned[:_SHOWN_TOKENS]
        where = f"row {row:,}, first dialogue, {len(ids):,} tokens, {int(learned.sum()):,} learned"
        cuts = np.flatnonzero(np.diff(marks)) + 1
        text, place = "", 0
        for part in np.split(shown, cuts):
            piece = _text(tokenizer, part)
            text += f"«{piece}»" if len(part) and marks[place] else piece
            place += len(part)
        report.samples.append(Sample(where, text, is_cut=len(shown) < len(ids)))
    if report.samples:
        report.notes.append("«…» in the samples is what the loss learns")


def _text(tokenizer: PreTrainedTokenizerFast, ids: Array) -> str:
    known = ids[ids < len(tokenizer)].tolist()
    return str(tokenizer.decode(known, skip_special_tokens=False))


@dataclass
class _Scan:
    """One pass over an SFT parquet."""

    path: Path
    cfg: InspectConfig
    vocab_size: int
    num_rows: int = 0
    num_learned: int = 0
    num_mute: int = 0
    """Rows without a token to learn."""
    first_mute: int = -1
    width: int = 0
    """Longest row with its padding."""
    narrow: int = 1 << 62
    names: list[str] = field(default_factory=list)
    types: "Counter[str]" = field(default_factory=Counter)
    rows: Lengths = field(default_factory=Lengths)
    dialogues: Lengths = field(default_factory=Lengths)
    per_row: Lengths = field(default_factory=Lengths)
    duplicates: Duplicates = field(default_factory=Duplicates)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0

    def __post_init__(self) -> None:
        count = max(_CHECKED, self.cfg.samples)
        self.picks: Picks[tuple[Array, Array]] = Picks(count, self.cfg.seed)

    def run(self, progress: Progress) -> None:
        """Read the file to its end, or to where it is broken."""
        try:
            for batch in self._batches(progress):
                self._read(batch)
        except (pa.ArrowException, OSError) as err:
            reason = str(err).strip().splitlines() or ["damaged"]
            self.errors.append(f"it cannot be read on: {reason[0]}")
            self.num_errors += 1

    def _batches(self, progress: Progress) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            self.names = list(file.schema_arrow.names)
            total = file.metadata.num_rows
            wanted = [n for n in (*LISTS, "length", "type") if n in self.names]
            with task(progress, f"scan {self.path.name}", total, "rows"):
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    yield batch
                    progress.advance(batch.num_rows)

    def _read(self, batch: pa.RecordBatch) -> None:
        first, self.num_rows = self.num_rows, self.num_rows + batch.num_rows
        names = batch.schema.names
        if "type" in names:
            self.types.update(str(name or "") for name in batch.column("type").to_pylist())
        try:
            lists = batch.select([name for name in names if name != "type"])
            sizes, ids, learned, starts = read_batch(self.path, first, lists, self.vocab_size)
        except InputError as error:
            self.num_errors += 1
            if len(self.errors) < _MAX_PROBLEMS:
                self.errors.append(str(error).replace(f"`{self.path}` ", ""))
            return
        widths = batch.column("token_ids").value_lengths().to_numpy(zero_copy_only=False)
        self.width, self.narrow = (
            max(self.width, int(widths.max())),
            min(self.narrow, int(widths.min())),
        )
        ends = np.cumsum(sizes)
        begins = ends - sizes
        mute = np.flatnonzero(np.add.reduceat(learned.astype(np.int64), begins) == 0)
        if mute.size:
            self.first_mute = self.first_mute if self.num_mute else first + int(mute[0])
            self.num_mute += mute.size
        self.num_learned += int(learned.sum())
        self.rows.add(sizes)
        self._read_dialogues(first, begins, ids, learned, starts)

    def _read_dialogues(
        self, first: int, begins: Array, ids: Array, learned: Array, starts: Array
    ) -> None:
        heads = np.flatnonzero(starts)
        tails = np.append(heads[1:], len(ids))
        row_of = np.searchsorted(begins, heads, side="right") - 1
        self.dialogues.add(tails - heads)
        self.per_row.add(np.bincount(row_of, minlength=len(begins)))

        def take(index: int) -> tuple[Array, Array]:
            end = int(tails[np.searchsorted(heads, begins[index])])
            part = slice(int(begins[index]), end)
            return ids[part].copy(), learned[part].copy()

        self.picks.offer(len(begins), take)
        for head, tail, row in zip(heads.tolist(), tails.tolist(), row_of.tolist(), strict=True):
            digest = hashlib.blake2b(ids[head:tail].tobytes(), digest_size=16).digest()
            self.duplicates.add(int.from_bytes(digest[:8], "little"), digest, first + row)

    def layout(self) -> str:
        """Return e.g. `packed, ragged`."""
        packed = "packed" if "sample_lengths" in self.names else "a dialogue a row"
        is_padded = self.num_rows > 1 and self.width == self.narrow
        is_padded = is_padded and self.rows.total < self.rows.count * self.width
        return f"{packed}, {'padded as published' if is_padded else 'ragged'}"

    def facts(self, sequence_length: object) -> dict[str, Any]:
        """Return counts and rates."""
        length = sequence_length if isinstance(sequence_length, int) else self.width
        tokens = self.rows.total
        return {
            "rows": self.num_rows,
            "dialogues": self.dialogues.count,
            "tokens": tokens,
            "sequence_length": length,
            "fill_share": tokens / max(1, self.rows.count * length),
            "label_tokens": self.num_learned,
            "label_share": self.num_learned / max(1, tokens),
            "columns": self.names,
        }

    def problems(self) -> list[str]:
        """Return what is wrong with the rows."""
        found = list(self.errors)
        if self.num_errors > len(found):
            found.append(f"{self.num_errors - len(found):,} more groups of rows are broken")
        if not self.num_rows and not found:
            found.append("there is no row in it")
        if self.num_mute:
            found.append(
                f"{self.num_mute:,} rows have no token to learn, first row {self.first_mute:,}"
            )
        return found
