"""`minillm inspect FILE.bin`: one pass over the ids in chunks, whatever the size of the file."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from minillm.data.inspect_near import Found, odd_neighbours, pick_tokenizer, report_tokenizer
from minillm.data.inspect_report import Duplicates, Lengths, Picks, Report, Sample, Table
from minillm.data.manifest import Manifest, TokenizerFacts, manifest_path, require_content
from minillm.data.tokenizer import find_separator, token_byte_lengths
from minillm.errors import InputError
from minillm.log import Progress, task
from minillm.settings import InspectConfig

Ids = npt.NDArray[Any]

_CHUNK_TOKENS = 1 << 21
_LONGEST_KEPT = 1 << 22
_SHOWN_TOKENS = 1 << 12
_CHECKED_DOCUMENTS = 256
_SAMPLE_TOKENS = 400
_FREQUENT = 8
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1B54A32D192ED03)


def inspect_bin(path: Path, cfg: InspectConfig, progress: Progress) -> Report:
    """Describe a token file.

    Args:
        path: The .bin, with or without manifest.
        cfg: What to show, and the tokenizer.
        progress: Where to report on a long scan.

    Raises:
        InputError: The tokenizer named in `cfg` is none.
    """
    report = Report(path.as_posix(), "token file")
    size = path.stat().st_size
    manifest = _read_manifest(path, report)
    made_with = manifest.tokenizer_sha256 if manifest else None
    found = pick_tokenizer(cfg.tokenizer, path.parent, made_with)
    facts = _facts(manifest, found)
    dtype = np.dtype(manifest.dtype if manifest else facts.dtype).newbyteorder("<")
    tokenizer = report_tokenizer(found, made_with, report)
    _check_size(size, dtype.itemsize, manifest, report)
    scan = _Scan(facts, cfg, dtype)
    with task(progress, f"scan {path.name}", size, "bytes"):
        scan.run(path, progress)
    report.facts = {
        "size_bytes": size,
        "dtype": dtype.name,
        "manifest": manifest_path(path).name if manifest else "none",
        "tokenizer": "not here" if isinstance(found, str) else found.place,
        "fingerprint": facts.sha256,
        "vocabulary": facts.vocab_size,
        "separator": facts.separator_id,
        **scan.facts(tokenizer),
    }
    if manifest:
        report.facts["sources"] = list(manifest.sources)
        _check_manifest(path, manifest, scan, report, verify=cfg.verify)
        if sentence := odd_neighbours(path, manifest.tokenizer_sha256):
            report.problems.append(sentence)
    else:
        report.notes.append(
            f"it has no manifest: read with the tokenizer `{report.facts['tokenizer']}`; another "
            "one is named with `--tokenizer FOLDER`"
        )
    if scan.lengths.count:
        report.bars.append(scan.lengths.histogram("tokens per document, without its separator"))
    _find_problems(scan, report)
    if tokenizer is not None:
        _decode(scan, tokenizer, cfg, report)
    return report


def _facts(manifest: Manifest | None, found: Found | str) -> TokenizerFacts:
    """Return what the manifest says of the tokenizer; without one, what the tokenizer is."""
    if manifest is not None:
        return manifest.facts
    assert not isinstance(found, str), "without a manifest a tokenizer is always picked"
    return TokenizerFacts(
        vocab_size=len(found.tokenizer),
        sha256=found.sha256,
        separator_id=find_separator(found.tokenizer),
    )


def _read_manifest(path: Path, report: Report) -> Manifest | None:
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    try:
        return Manifest.read(beside)
    except InputError as error:
        report.problems.append(str(error))
        return None


def _check_size(size: int, itemsize: int, manifest: Manifest | None, report: Report) -> None:
    if size == 0:
        report.problems.append("the file is empty")
    elif size % itemsize:
        report.problems.append(
            f"its {size:,} bytes are not a multiple of {itemsize}: it was cut off, or is no token "
            "file"
        )
    if manifest and size != manifest.size_bytes:
        report.problems.append(
            f"it has {size:,} bytes, its manifest says {manifest.size_bytes:,} "
            f"({manifest.num_tokens:,} tokens)"
        )


def _check_manifest(
    path: Path, manifest: Manifest, scan: "_Scan", report: Report, *, verify: bool
) -> None:
    if manifest.num_documents != scan.num_separators:
        report.problems.append(
            f"its manifest says {manifest.num_documents:,} documents, the file has "
            f"{scan.num_separators:,} separators"
        )
    report.facts |= {"sha256": manifest.content_id, "sha256_checked": verify}
    if not verify:
        return
    if manifest.parts:
        try:
            require_content(path, manifest)
        except InputError as error:
            report.problems.append(str(error))
        return
    found = scan.hash.hexdigest()
    report.facts["sha256"] = found
    if found != manifest.sha256:
        report.problems.append(
            f"its sha256 is {found[:12]}…, its manifest says {manifest.sha256[:12]}…"
        )


def _find_problems(scan: "_Scan", report: Report) -> None:
    if scan.num_outside:
        report.problems.append(
            f"{scan.num_outside:,} ids are outside the vocabulary of {scan.vocab_size:,}: the "
            f"first at token {scan.first_outside:,}, the largest {scan.largest:,}"
        )
    if scan.num_tokens and not scan.num_separators:
        report.problems.append(
            f"it holds no separator {scan.separator_id}: made with another tokenizer or layout"
        )
    elif scan.tail:
        report.notes.append(
            f"the last {scan.tail:,} tokens have no separator after them: perhaps it was cut off"
        )
    if scan.lengths.num_zero:
        share = scan.lengths.num_zero / scan.lengths.count
        report.problems.append(f"{scan.lengths.num_zero:,} documents ({share:.2%}) are empty")
    scan.duplicates.report_to(report, "documents")


def _decode(
    scan: "_Scan", tokenizer: PreTrainedTokenizerFast, cfg: InspectConfig, report: Report
) -> None:
    """Add the frequent tokens and the samples, and look for U+FFFD in the sampled documents."""
    order = np.argsort(-scan.counts[: scan.vocab_size], kind="stable")[:_FREQUENT].tolist()
    total = max(1, scan.num_tokens)
    rows = [
        [i, repr(tokenizer.decode([i])), int(scan.counts[i]), f"{scan.counts[i] / total:.2%}"]
        for i in order
        if scan.counts[i] and i < len(tokenizer)
    ]
    if rows:
        report.tables.append(Table("most frequent tokens", ["id", "text", "count", "share"], rows))
    broken = [
        place
        for place, (ids, is_whole) in scan.picks.items()
        if "\ufffd" in _text(tokenizer, ids, is_whole=is_whole)
    ]
    if broken:
        report.problems.append(
            f"{len(broken)} of {len(scan.picks.items())} sampled documents hold U+FFFD, the mark "
            f"of text lost in decoding, e.g. document {broken[0]:,}"
        )
    for place, (ids, is_whole) in scan.picks.items(cfg.samples):
        shown = ids[:_SAMPLE_TOKENS]
        is_cut = len(shown) < len(ids) or not is_whole
        text = _text(tokenizer, shown, is_whole=not is_cut)
        if not is_cut:
            text += str(tokenizer.decode([scan.separator_id]))
        report.samples.append(Sample(f"document {place:,}, {len(ids):,} tokens", text, is_cut))


def _text(tokenizer: PreTrainedTokenizerFast, ids: Ids, *, is_whole: bool) -> str:
    """Decode; where the ids were cut, so may be the last character, which is left out."""
    known = ids[ids < len(tokenizer)].tolist()
    text = str(tokenizer.decode(known, skip_special_tokens=False))
    return text if is_whole else text.rstrip("\ufffd")


@dataclass
class _Scan:
    """One pass over a token file."""

    tokenizer: TokenizerFacts
    cfg: InspectConfig
    dtype: "np.dtype[Any]"
    num_tokens: int = 0
    num_separators: int = 0
    num_outside: int = 0
    first_outside: int = -1
    largest: int = 0
    tail: int = 0
    """Tokens after the last separator."""
    lengths: Lengths = field(default_factory=Lengths)
    duplicates: Duplicates = field(default_factory=Duplicates)

    def __post_init__(self) -> None:
        self.vocab_size = self.tokenizer.vocab_size
        self.separator_id = self.tokenizer.separator_id
        self.hash = hashlib.sha256()
        self.counts = np.zeros(self.vocab_size + 1, np.int64)  # the last: ids outside
        count = max(_CHECKED_DOCUMENTS, self.cfg.samples)
        self.picks: Picks[tuple[Ids, bool]] = Picks(count, self.cfg.seed)
        self._carry = np.zeros(0, self.dtype)  # the beginning of a document that goes on
        self._is_carry_whole = True

    def run(self, path: Path, progress: Progress) -> None:
        """Read the file to its end."""
        with path.open("rb") as stream:
            while True:
                raw = stream.read(_CHUNK_TOKENS * self.dtype.itemsize)
                if not raw:
                    break
                if self.cfg.verify:
                    self.hash.update(raw)
                whole = len(raw) // self.dtype.itemsize
                self._read(np.frombuffer(raw, self.dtype, whole))
                progress.advance(len(raw))
        if self.tail:  # a document that nothing ends
            self.lengths.add([self.tail])
            self.picks.offer(1, lambda _: (self._carry[:_SHOWN_TOKENS], False))

    def _read(self, piece: Ids) -> None:
        outside = piece >= self.vocab_size
        is_outside = bool(outside.any())
        if is_outside:
            if self.first_outside < 0:
                self.first_outside = self.num_tokens + int(np.argmax(outside))
            self.num_outside += int(np.count_nonzero(outside))
        if piece.size:
            self.largest = max(self.largest, int(piece.max()))
        inside = np.minimum(piece, self.vocab_size) if is_outside else piece
        self.counts += np.bincount(inside, minlength=self.vocab_size + 1)
        self.num_tokens += len(piece)
        self._read_documents(piece)

    def _read_documents(self, piece: Ids) -> None:
        ends = np.flatnonzero(piece == self.separator_id)
        if not ends.size:
            self._keep(piece)
            return
        # `tail` counts all tokens of the open document, `carry` may hold only its beginning
        sizes = np.diff(ends, prepend=-1) - 1
        sizes[0] += self.tail
        data = np.concatenate([self._carry, piece])
        ends = ends + len(self._carry)
        starts = np.concatenate([[0], ends[:-1] + 1])
        first = self.num_separators
        is_first_whole, self._is_carry_whole = self._is_carry_whole, True
        self.num_separators += len(ends)
        self.lengths.add(sizes)

        def take(index: int) -> tuple[Ids, bool] | None:
            begin, end = int(starts[index]), int(ends[index])
            if begin == end:
                return None
            kept = data[begin : min(end, begin + _SHOWN_TOKENS)].copy()
            return kept, len(kept) == end - begin and (index > 0 or is_first_whole)

        self.picks.offer(len(ends), take)
        full = np.flatnonzero(ends > starts)
        if not is_first_whole:
            full = full[full > 0]
        self._find_duplicates(data, starts[full], ends[full], first + full)
        self.tail = 0
        self._carry = data[:0]
        self._keep(data[int(ends[-1]) + 1 :])

    def _keep(self, rest: Ids) -> None:
        """Remember the beginning of a document that the next chunk may end."""
        self.tail += len(rest)
        if self.tail > _LONGEST_KEPT:
            self._is_carry_whole = False
            self._carry = self._carry if len(self._carry) else rest[:_SHOWN_TOKENS].copy()
        else:
            self._carry = np.concatenate([self._carry, rest])

    def _find_duplicates(self, data: Ids, starts: Ids, ends: Ids, places: Ids) -> None:
        """Hash the documents whose length and three tokens fall into the sample."""
        if not starts.size:
            return
        probes = (ends - starts, data[starts], data[(starts + ends) // 2], data[ends - 1])
        keys = np.zeros(len(starts), np.uint64)
        for probe, factor in zip(probes, _MIX, strict=True):
            keys = (keys ^ probe.astype(np.uint64)) * np.uint64(factor)
            keys ^= keys >> np.uint64(31)
        chosen = np.flatnonzero((keys & np.uint64(self.duplicates.mask)) == 0)
        for index in chosen.tolist():
            content = data[int(starts[index]) : int(ends[index])].tobytes()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            self.duplicates.add(int(keys[index]), digest, int(places[index]))

    def facts(self, tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
        """Return counts, and what they say."""
        inside = self.counts[: self.vocab_size]
        found: dict[str, Any] = {
            "tokens": self.num_tokens,
            "documents": self.num_separators + bool(self.tail),
            "used_tokens": f"{int(np.count_nonzero(inside)):,} of {self.vocab_size:,}",
            "largest_id": self.largest,
        }
        if total := int(inside.sum()):
            shares = inside[inside > 0] / total
            found["entropy"] = f"{-(shares * np.log2(shares)).sum():.3f} bits per token, unigram"
        if tokenizer is not None and total:
            try:
                by_id = token_byte_lengths(tokenizer)
            except InputError:
                return found
            both = min(len(by_id), self.vocab_size)
            text_bytes = int((by_id[:both] * inside[:both]).sum())
            found["text_bytes"] = text_bytes
            found["bytes_per_token"] = round(text_bytes / self.num_tokens, 4)
        return found
