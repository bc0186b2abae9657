"""`minillm inspect` of documents and dialogues: parquet, JSON lines and text, streamed."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from minillm.data.dialogues import parse_line
from minillm.data.documents import iter_parquet, open_parquet, read_file, read_lines, total_bytes
from minillm.data.inspect_near import pick_tokenizer
from minillm.data.inspect_report import Duplicates, Lengths, Picks, Report, Sample, Table
from minillm.data.tokenizer import plain_encoder
from minillm.errors import InputError
from minillm.log import Progress, task
from minillm.settings import InspectConfig

_BATCH = 512
_CHECKED_DOCUMENTS = 200
_CHECKED_CHARS = 20_000
_SHOWN_CHARS = 800
_MAX_NAMES = 10_000
_MAX_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class _Document:
    """One row: a text, or the messages of a dialogue."""

    text: str
    source: str
    messages: list[dict[str, str]] | None = None


def inspect_text(path: Path, files: list[Path], cfg: InspectConfig, progress: Progress) -> Report:
    """Describe documents or dialogues.

    Args:
        path: What the user named.
        files: The files of one kind below it, as `find_files` gives them.
        cfg: What to show, the text column and the tokenizer.
        progress: Where to report on a long scan.

    Raises:
        InputError: The tokenizer named in `cfg` is none.
    """
    scan = _Scan(cfg)
    with task(progress, f"scan {path.name}", total_bytes(files), "bytes"):
        for file in files:
            scan.read(file)
            progress.advance(file.stat().st_size)
    kind = "dialogues" if scan.num_dialogues else "documents"
    folder = path if path.is_dir() else path.parent
    found = pick_tokenizer(cfg.tokenizer, folder)
    report = Report(path.as_posix(), f"{kind} ({', '.join(sorted(scan.formats))})")
    report.facts = {
        **({"files": len(files)} if len(files) > 1 else {}),
        "size_bytes": total_bytes(files),
        **scan.facts(),
    }
    report.problems = scan.problems()
    scan.duplicates.report_to(report, "rows")
    if scan.sources and set(scan.sources) != {""}:
        report.tables.append(_source_table(scan.sources))
    report.bars.append(scan.lengths.histogram(f"characters per {kind.removesuffix('s')}"))
    if scan.turns.count:
        report.bars.append(scan.turns.histogram("messages per dialogue"))
    if scan.lengths.count and not isinstance(found, str):
        _measure(scan, found.tokenizer, found.place, report)
        picked = scan.picks.items(cfg.samples)
        report.samples = [_sample(place, item, found.tokenizer) for place, item in picked]
    return report


def _source_table(sources: "Counter[str]") -> Table:
    total = sources.total()
    rows = [[name or "(none)", n, f"{n / total:.2%}"] for name, n in sources.most_common()]
    return Table("sources", ["source", "rows", "share"], rows)


def _measure(scan: "_Scan", tokenizer: PreTrainedTokenizerFast, place: str, report: Report) -> None:
    """Encode the sampled documents: bytes per token, and the tokens that all would have."""
    encoder = plain_encoder(tokenizer)
    texts = [item.text[:_CHECKED_CHARS] for _, item in scan.picks.items()]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    size = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(made.ids) for made in encoder.encode_batch(texts))
    if not num_tokens:
        return
    report.facts["bytes_per_token"] = round(size / num_tokens, 3)
    report.facts["tokens_about"] = round(scan.text_bytes * num_tokens / size)
    report.facts["tokenizer"] = place
    report.notes.append(f"bytes per token and tokens: from {len(texts)} sampled rows")


def _sample(place: int, item: _Document, tokenizer: PreTrainedTokenizerFast) -> Sample:
    where = f"row {place:,}" + (f", {item.source}" if item.source else "")
    text = item.text
    if item.messages is not None and tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(item.messages, tokenize=False))
    return Sample(where, text[:_SHOWN_CHARS], is_cut=len(text) > _SHOWN_CHARS)


@dataclass
class _Scan:
    """Counts over some files."""

    cfg: InspectConfig
    num_rows: int = 0
    num_dialogues: int = 0
    text_bytes: int = 0
    num_chars: int = 0
    num_han: int = 0
    num_lost: int = 0
    """Documents with U+FFFD."""
    formats: set[str] = field(default_factory=set)
    columns: "Counter[str]" = field(default_factory=Counter)
    sources: "Counter[str]" = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)
    turns: Lengths = field(default_factory=Lengths)
    duplicates: Duplicates = field(default_factory=Duplicates)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0
    num_empty: int = 0
    num_surrogates: int = 0

    def __post_init__(self) -> None:
        count = max(_CHECKED_DOCUMENTS, self.cfg.samples)
        self.picks: Picks[_Document] = Picks(count, self.cfg.seed)
        self._where: dict[str, str] = {}

    def read(self, file: Path) -> None:
        """Read a file to its end, or to where it is broken."""
        kind = file.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
        self.formats.add(kind)
        read = {"parquet": self._parquet, "jsonl": self._jsonl}.get(kind, self._txt)
        batch: list[_Document] = []
        try:
            for item in read(file):
                batch.append(item)
                if len(batch) == _BATCH:
                    self._count(batch, file)
                    batch = []
        except InputError as error:
            self._fail(f"{error}; the rest of it was not read")
        self._count(batch, file)

    def _fail(self, sentence: str) -> None:
        self.num_errors += 1
        if len(self.errors) < _MAX_PROBLEMS:
            self.errors.append(sentence)

    def _parquet(self, file: Path) -> Iterator[_Document]:
        with open_parquet(file, self.cfg.text_column) as opened:
            names = opened.schema_arrow.names
            self.columns.update({str(name): opened.metadata.num_rows for name in names})
            label = next((name for name in ("source", "type") if name in names), None)
            wanted = [self.cfg.text_column, *([label] if label else [])]
            for rows in iter_parquet(opened, file, wanted):
                labels = rows[label] if label else [""] * len(rows[self.cfg.text_column])
                for text, source in zip(rows[self.cfg.text_column], labels, strict=True):
                    yield _Document(text or "", str(source or ""))

    def _jsonl(self, file: Path) -> Iterator[_Document]:
        with file.open("rb") as raw:
            for number, line in read_lines(file, raw):
                if line and not line.isspace():
                    try:
                        yield self._json_row(line, f"`{file.name}` line {number}")
                    except InputError as error:
                        self._fail(str(error))

    def _json_row(self, line: str, where: str) -> _Document:
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError(f"{where}: not JSON ({err})") from None
        if not isinstance(item, dict):
            raise InputError(f"{where}: an object is wanted, not {type(item).__name__}")
        self.columns.update(item.keys())
        source = str(item.get("type") or item.get("source") or "")
        if "messages" in item or {"instruction", "output"} <= item.keys():
            messages = parse_line(line, where).messages
            return _Document("\n".join(m["content"] for m in messages), source, messages)
        text = item.get(self.cfg.text_column, "")
        if self.cfg.text_column not in item or not isinstance(text, str | None):
            names = ", ".join(f"`{name}`" for name in item)
            raise InputError(f"{where}: no text under `{self.cfg.text_column}`, only {names}")
        return _Document(text or "", source)

    def _txt(self, file: Path) -> Iterator[_Document]:
        for batch in read_file(file):
            yield from (_Document(text, "") for text in batch.texts)

    def _count(self, batch: list[_Document], file: Path) -> None:
        self.lengths.add([len(item.text) for item in batch])
        self.turns.add([len(item.messages) for item in batch if item.messages is not None])
        self.picks.offer(len(batch), lambda i: batch[i] if batch[i].text.strip() else None)
        for place, item in enumerate(batch, self.num_rows):
            self._count_one(place, item, file)
        self.num_rows += len(batch)

    def _count_one(self, place: int, item: _Document, file: Path) -> None:
        if item.source in self.sources or len(self.sources) < _MAX_NAMES:
            self.sources[item.source] += 1
        self.num_dialogues += item.messages is not None
        if not item.text or item.text.isspace():
            self.num_empty += 1
            self._where.setdefault("empty", f"row {place:,} (`{file.name}`)")
            return
        raw = item.text.encode("utf-8", "surrogatepass")
        self.text_bytes += len(raw)
        self.num_chars += len(item.text)
        if "\ufffd" in item.text:
            self.num_lost += 1
            self._where.setdefault("lost", f"row {place:,} (`{file.name}`)")
        if b"\xed" in raw and any("\ud800" <= char <= "\udfff" for char in item.text):
            self.num_surrogates += 1
            self._where.setdefault("half", f"row {place:,} (`{file.name}`)")
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        self.duplicates.add(int.from_bytes(digest[:8], "little"), digest, place)

    def facts(self) -> dict[str, Any]:
        """Return what was counted."""
        texts = "".join(item.text for _, item in self.picks.items())
        han = sum("\u4e00" <= char <= "\u9fff" for char in texts)
        what = "dialogues" if self.num_dialogues else "documents"
        found: dict[str, Any] = {
            "rows": self.num_rows,
            what: self.num_rows - self.num_empty,
            "characters": self.num_chars,
            "text_bytes": self.text_bytes,
            "han_share": han / max(1, len(texts)),
        }
        if self.columns:
            found["columns"] = [name for name, _ in self.columns.most_common(20)]
        return found

    def problems(self) -> list[str]:
        """Return what is wrong with the rows."""
        found = list(self.errors)
        if self.num_errors > len(found):
            found.append(f"{self.num_errors - len(found):,} more rows or files are broken")
        for count, name, what in (
            (self.num_empty, "empty", "are empty"),
            (self.num_lost, "lost", "hold U+FFFD, the mark of text lost in decoding"),
            (self.num_surrogates, "half", "hold half a surrogate pair, which no UTF-8 can hold"),
        ):
            if count:
                where = self._where[name]
                found.append(f"{count:,} rows ({count / self.num_rows:.2%}) {what}, first {where}")
        if not self.num_rows and not found:
            found.append("there is no row in it")
        return found


def is_sft(file: Path) -> bool:
    """Tell whether a parquet holds SFT rows; False for a broken one."""
    try:
        names = set(pq.read_schema(file).names)
    except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        return False
    return {"token_ids", "labels"} <= names
