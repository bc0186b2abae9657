"""Second pass of `prepare-sft`: dialogues to tokens, on all cores, into a log on disk.

The log holds the tokens of every dialogue that fits a row, one after the other: 2 or 4 bytes an id,
then a bit a token that says whether it is learned. Beside it stands the length of each dialogue
that was encoded, negative where it did not fit. Results come in a fixed order, so that a run that
was killed takes the log of the earlier one up to its last mark, and goes on.
"""

import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from minillm.data.chat import ChatEncoder, Encoded
from minillm.data.dialogues import parse_line
from minillm.data.encoder import Encoder, EncoderPlan
from minillm.data.foreign_chat import TemplateEncoder, make_encoder
from minillm.data.sft_inputs import TokenLine
from minillm.data.sft_scan import Candidates
from minillm.data.tokenizer import fingerprint, load_tokenizer, plain_json
from minillm.data.windows import IGNORE
from minillm.data.worker_pool import Workers
from minillm.errors import InputError, RunError
from minillm.files import named_os_errors, write_text
from minillm.log import Progress, logger

_JOB_BYTES = 1_000_000  # of text: a few hundred milliseconds of work
_BATCH_DIALOGUES = 256
_MARK_EVERY_S = 10.0

Ints = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rule:
    """How to encode."""

    tokenizer: Path
    fingerprint: str
    is_fast: bool
    odd: tuple[int, ...]
    """With `is_fast`, see `encoder.EncoderPlan`."""
    wide: bool
    """32 bits an id instead of 16."""
    min_tokens: int
    max_tokens: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids on disk."""
        return np.dtype("<u4" if self.wide else "<u2")

    def sizes(self, lengths: npt.NDArray[np.integer]) -> Ints:
        """Return the bytes that dialogues of these lengths take in the log."""
        real = np.maximum(lengths, 0).astype(np.int64)
        sizes: Ints = real * self.dtype.itemsize + (real + 7) // 8
        return sizes


class TokenLog:
    """The encoded dialogues.

    Args:
        folder: Where it lies, on disk.
        rule: How dialogues are encoded.
        made_from: What identifies the input and the rule; a log of anything else is dropped.
    """

    def __init__(self, folder: Path, rule: Rule, made_from: str) -> None:
        self.rule = rule
        self._mark_path, self._made_from = folder / "log.json", made_from
        self._paths = folder / "tokens.log", folder / "lengths.log"
        self._kept = self._resume()
        self._blobs, self._lengths_file = (path.open("r+b") for path in self._paths)
        self._seen = 0
        self._marked_at = time.monotonic()
        self.indices: list[Ints] = []
        """Which dialogue each length is of."""

    def _resume(self) -> int:
        """Cut both files to the last mark; return how many lengths are kept."""
        for path in self._paths:
            path.touch()
        try:
            mark = json.loads(self._mark_path.read_bytes())
        except (OSError, ValueError):
            mark = {}
        count, size = mark.get("dialogues", 0), mark.get("bytes", 0)
        is_usable = mark.get("made_from") == self._made_from
        blobs, lengths = self._paths
        if not is_usable or blobs.stat().st_size < size or lengths.stat().st_size < 4 * count:
            count = size = 0
        if count:
            logger.info("going on after %d dialogues of an earlier run", count)
        os.truncate(blobs, size)
        os.truncate(lengths, 4 * count)
        return int(count)

    def __enter__(self) -> "TokenLog":
        """Return the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Set a last mark, as far as the log is whole, and close it."""
        try:
            if self._seen > self._kept:
                self._mark()
        finally:
            self._blobs.close()
            self._lengths_file.close()

    def encode(
        self, picks: Ints, found: Candidates, workers: Workers, progress: Progress
    ) -> Lengths:
        """Encode some dialogues, or take them from the log of an earlier run.

        Args:
            picks: Which of `found`, shape (N,).
            found: Where the dialogues lie.
            workers: Processes.
            progress: Told the bytes of text done.

        Returns:
            Tokens of each, shape (N,); negative where it is too long or too short for a row.
        """
        known = min(len(picks), max(0, self._kept - self._seen))
        done = self._known(known)
        progress.advance(float(found.size[picks[:known]].sum()))
        jobs = list(_jobs(picks[known:], found, self.rule))
        for job, (lengths, blob) in zip(jobs, workers.map(_encode, iter(jobs)), strict=True):
            self._append(lengths, blob)
            done.append(lengths)
            progress.advance(float(job.sizes.sum()))
        self.indices.append(picks)
        return np.concatenate([*done, np.empty(0, np.int32)])

    def _known(self, count: int) -> list[Lengths]:
        if not count:
            return []
        raw = os.pread(self._lengths_file.fileno(), 4 * count, 4 * self._seen)
        self._seen += count
        return [np.frombuffer(raw, "<i4").astype(np.int32)]

    def _append(self, lengths: Lengths, blob: bytes) -> None:
        with named_os_errors(self._paths[0]):
            for stream, data in (
                (self._blobs, blob),
                (self._lengths_file, lengths.astype("<i4").tobytes()),
            ):
                stream.seek(0, os.SEEK_END)
                stream.write(data)
                stream.flush()
        self._seen += len(lengths)
        if time.monotonic() - self._marked_at > _MARK_EVERY_S:
            self._mark()

    def _mark(self) -> None:
        """Note how much of the files is whole, once it has reached the disk."""
        for stream in (self._blobs, self._lengths_file):
            os.fsync(stream.fileno())
        sizes = self._lengths_file.seek(0, os.SEEK_END), self._blobs.seek(0, os.SEEK_END)
        mark = {"made_from": self._made_from, "dialogues": sizes[0] // 4, "bytes": sizes[1]}
        write_text(self._mark_path, json.dumps(mark))
        self._marked_at = time.monotonic()

    def finish(self) -> "TokenReader":
        """Return what was encoded in this run."""
        indices = np.concatenate([*self.indices, np.empty(0, np.int64)])
        raw = os.pread(self._lengths_file.fileno(), 4 * len(indices), 0)
        return TokenReader(self._blobs, self.rule, indices, np.frombuffer(raw, "<i4"))


class TokenReader:
    """Reads dialogues of a log, by their place in it.

    Attributes:
        indices: Which dialogue is at each place, shape (N,).
        lengths: Its tokens, negative where it was left out, shape (N,).
    """

    def __init__(self, blobs: IO[bytes], rule: Rule, indices: Ints, lengths: Lengths) -> None:
        self._file, self.rule = blobs, rule
        self.indices, self.lengths = indices, lengths
        sizes = rule.sizes(lengths)
        self._ends = np.cumsum(sizes)

    def read(self, places: Sequence[int] | Ints) -> tuple[npt.NDArray[np.int32], Any]:
        """Return the ids (int32) and learned flags (bool) of dialogues, joined in that order."""
        item, file = self.rule.dtype.itemsize, self._file.fileno()
        ids, flags = [], []
        lengths = self.lengths[places].tolist()
        ends = self._ends[places].tolist()
        for length, end in zip(lengths, ends, strict=True):
            size = length * item + (length + 7) // 8
            data = os.pread(file, size, end - size)
            ids.append(np.frombuffer(data, self.rule.dtype, length))
            flags.append(np.unpackbits(np.frombuffer(data, np.uint8, offset=length * item)))
        kept = [part[:length] for part, length in zip(flags, lengths, strict=True)]
        return np.concatenate(ids).astype(np.int32), np.concatenate(kept).astype(bool)


@dataclass(frozen=True, slots=True)
class _Job:
    rule: Rule
    paths: tuple[Path, ...]
    has_tokens: tuple[bool, ...]
    files: npt.NDArray[np.uint16]
    offsets: Ints
    sizes: npt.NDArray[np.int32]


def _jobs(picks: Ints, found: Candidates, rule: Rule) -> Iterator[_Job]:
    """Yield dialogues in groups of about `_JOB_BYTES` of text."""
    paths = tuple(file.path for file in found.files)
    has_tokens = tuple(file.has_tokens for file in found.files)
    group = np.cumsum(found.size[picks], dtype=np.int64) // _JOB_BYTES
    for part in np.split(picks, np.flatnonzero(np.diff(group)) + 1):
        if len(part):
            place = found.file[part], found.offset[part], found.size[part]
            yield _Job(rule, paths, has_tokens, *place)


def _encode(job: _Job) -> tuple[Lengths, bytes]:
    """Return the lengths of dialogues and, joined, the log entries of those that fit."""
    rule, lengths, blobs = job.rule, [], []
    for begin in range(0, len(job.offsets), _BATCH_DIALOGUES):
        for ids, learned in _encode_some(job, slice(begin, begin + _BATCH_DIALOGUES)):
            fits = rule.min_tokens <= len(ids) <= rule.max_tokens
            lengths.append(len(ids) if fits else -len(ids))
            if fits:
                blobs += [ids.astype(rule.dtype).tobytes(), np.packbits(learned).tobytes()]
    return np.array(lengths, np.int32), b"".join(blobs)


def _encode_some(job: _Job, part: slice) -> Iterator[tuple[npt.NDArray[Any], Any]]:
    lines = list(_lines(job, part))
    if job.has_tokens[job.files[part][0]] or len(set(job.files[part].tolist())) > 1:
        for number, line in zip(job.files[part], lines, strict=True):
            if job.has_tokens[number]:
                known = TokenLine.from_json(line)
                yield known.ids, known.learned
            else:
                yield from _tokens(job.rule, [line])
    else:
        yield from _tokens(job.rule, lines)


def _tokens(rule: Rule, lines: Sequence[bytes]) -> Iterator[tuple[npt.NDArray[Any], Any]]:
    encoder = _load_encoder(rule)
    dialogues = [parse_line(line, "").messages for line in lines]
    encoded: Sequence[Encoded]
    if isinstance(encoder, ChatEncoder):
        encoded = encoder.encode_many(dialogues)
    else:
        encoded = [encoder.encode(messages) for messages in dialogues]
    for item in encoded:
        yield np.array(item.token_ids, np.uint32), np.array(item.labels, np.int64) != IGNORE


def _lines(job: _Job, part: slice) -> Iterator[bytes]:
    opened: dict[int, int] = {}
    try:
        columns = (job.files[part], job.offsets[part], job.sizes[part])
        for file, offset, size in zip(*(c.tolist() for c in columns), strict=True):
            if file not in opened:
                opened[file] = os.open(job.paths[file], os.O_RDONLY)
            line = os.pread(opened[file], size, offset)
            if len(line) < size:
                raise InputError(
                    f"`{job.paths[file]}` became shorter during the run",
                    hint="run the same command again",
                )
            yield line
    finally:
        for handle in opened.values():
            os.close(handle)


@functools.lru_cache(maxsize=1)
def _load_encoder(rule: Rule) -> ChatEncoder | TemplateEncoder:
    if fingerprint(rule.tokenizer) != rule.fingerprint:
        raise RunError(
            f"the tokenizer in `{rule.tokenizer}` changed during the run",
            hint="run the same command again",
        )
    tokenizer = load_tokenizer(rule.tokenizer)
    encoder = Encoder(EncoderPlan(plain_json(tokenizer), rule.is_fast, rule.odd))

    def encode_texts(texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = encoder.encode(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    return make_encoder(tokenizer, encode_texts)
