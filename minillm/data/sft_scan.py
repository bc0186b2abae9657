"""First pass of `prepare-sft`: where each dialogue lies, and of what kind it is.

Every line is parsed and checked on all cores; kept are some 20 bytes a dialogue, so that millions
can be chosen from and packed in memory while their text stays on disk.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minillm.data.chat import EMPTY, BadDialogue
from minillm.data.dialogues import parse_line
from minillm.data.sft_inputs import PlainFile, TokenLine
from minillm.data.worker_pool import Workers
from minillm.log import Progress, task

_CHUNK_BYTES = 8_000_000
_MAX_TYPES = 10_000
_MAX_EXAMPLES = 3
OTHER = "(other)"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The N dialogues of all files, in order; arrays of shape (N,)."""

    files: tuple[PlainFile, ...]
    file: npt.NDArray[np.uint16]
    offset: Ints
    """First byte of the line in its file."""
    size: npt.NDArray[np.int32]
    """Bytes of the line."""
    kind: npt.NDArray[np.int32]
    """Index into `types`."""
    is_multi: npt.NDArray[np.bool_]
    """More than one answer."""
    types: list[str]
    num_lines: int
    """Lines that are not blank, rejected ones too."""
    rejected: "Rejected"
    sha256: str
    """Of all that was read."""

    def __len__(self) -> int:
        """Dialogues."""
        return len(self.offset)

    @property
    def is_identity(self) -> npt.NDArray[np.bool_]:
        """Made of the identity templates."""
        flags = np.array([file.is_identity for file in self.files])
        return flags[self.file]


@dataclass(slots=True)
class Rejected:
    """Lines left out: how many by reason, and the first ones by name."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, count: int, examples: Sequence[str]) -> None:
        """Count some more."""
        self.counts[reason] += count
        found = self.examples.setdefault(reason, [])
        found += examples[: _MAX_EXAMPLES - len(found)]


@dataclass(frozen=True, slots=True)
class _Job:
    path: Path
    begin: int
    end: int
    """Lines that start in these bytes."""
    has_tokens: bool


@dataclass(slots=True)
class _Bad:
    line: int
    """From 0 within the chunk."""
    message: str
    hint: str
    reason: str


@dataclass(slots=True)
class _Part:
    """What one chunk holds."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    multi: list[bool] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    bad: list[_Bad] = field(default_factory=list)
    bad_counts: Counter[str] = field(default_factory=Counter)
    num_lines: int = 0
    num_filled: int = 0
    sha256: bytes = b""


def scan(
    files: Sequence[PlainFile], workers: Workers, progress: Progress, *, skip_bad: bool
) -> Candidates:
    """Find the dialogues of some files.

    Args:
        files: What to read.
        workers: Processes.
        progress: Where to report.
        skip_bad: Count lines that are no dialogue instead of stopping at the first. Those that
            lack just the text of a message are always counted.

    Raises:
        InputError: A line is no dialogue; file and line are named.
    """
    ends = [file.path.stat().st_size for file in files]
    jobs = [
        (index, _Job(file.path, begin, min(begin + _CHUNK_BYTES, end), file.has_tokens))
        for index, (file, end) in enumerate(zip(files, ends, strict=True))
        for begin in range(0, end, _CHUNK_BYTES)
    ]
    gathered = _Gathered(tuple(files), skip_bad)
    with task(progress, "read dialogues", sum(ends), "bytes"):
        results = workers.map(_scan_chunk, (job for _, job in jobs))
        for (index, job), part in zip(jobs, results, strict=True):
            gathered.add(index, part)
            progress.advance(job.end - job.begin)
    return gathered.finish()


class _Gathered:
    """Joins the parts in order; here line numbers become those of the file."""

    def __init__(self, files: tuple[PlainFile, ...], skip_bad: bool) -> None:
        self._files, self._skip_bad = files, skip_bad
        self._arrays: list[tuple[npt.NDArray[np.generic], ...]] = []
        self._types: dict[str, int] = {}
        self._rejected = Rejected()
        self._digest = hashlib.sha256()
        self._num_filled = self._lines_before = 0
        self._last_file = -1

    def add(self, index: int, part: _Part) -> None:
        if index != self._last_file:
            self._last_file, self._lines_before = index, 0
            self._digest.update(b"file")
        self._reject(index, part)
        codes = np.array([self._code(name) for name in part.types] or [0], np.int32)
        kinds = codes[np.array(part.kinds, np.int64)]
        files = np.full(len(part.offsets), index, np.uint16)
        sizes, multi = np.array(part.sizes, np.int32), np.array(part.multi, np.bool_)
        self._arrays.append((files, np.array(part.offsets, np.int64), sizes, kinds, multi))
        self._lines_before += part.num_lines
        self._num_filled += part.num_filled
        self._digest.update(part.sha256)

    def _code(self, name: str) -> int:
        if len(self._types) >= _MAX_TYPES and name not in self._types:
            name = OTHER
        return self._types.setdefault(name, len(self._types))

    def _reject(self, index: int, part: _Part) -> None:
        name = self._files[index].name
        for bad in part.bad:
            where = f"`{name}` line {self._lines_before + bad.line + 1}"
            if bad.reason != EMPTY and not self._skip_bad:
                raise BadDialogue(where + bad.message, hint=bad.hint, reason=bad.reason)
        for reason, count in part.bad_counts.items():
            lines = (self._lines_before + b.line + 1 for b in part.bad if b.reason == reason)
            self._rejected.add(reason, count, [f"`{name}` line {line}" for line in lines])

    def finish(self) -> Candidates:
        empty = tuple(np.empty(0, t) for t in (np.uint16, np.int64, np.int32, np.int32, np.bool_))
        columns = [np.concatenate(parts) for parts in zip(*(self._arrays or [empty]), strict=True)]
        names = ("file", "offset", "size", "kind", "is_multi")
        arrays: dict[str, Any] = dict(zip(names, columns, strict=True))
        return Candidates(
            files=self._files,
            **arrays,
            types=list(self._types),
            num_lines=self._num_filled,
            rejected=self._rejected,
            sha256=self._digest.hexdigest(),
        )


def _scan_chunk(job: _Job) -> _Part:
    """Read the lines that start in a chunk; runs in a worker."""
    part, digest = _Part(), hashlib.sha256()
    for offset, line in _lines(job):
        number = part.num_lines
        part.num_lines += 1
        digest.update(line)
        if not line.strip():
            continue
        part.num_filled += 1
        try:
            found = TokenLine.from_json(line) if job.has_tokens else parse_line(line, "")
        except BadDialogue as err:
            part.bad_counts[err.reason] += 1
            if part.bad_counts[err.reason] <= _MAX_EXAMPLES:
                part.bad.append(_Bad(number, str(err), err.hint or "", err.reason))
            continue
        part.offsets.append(offset)
        part.sizes.append(len(line))
        part.kinds.append(part.types.setdefault(found.source, len(part.types)))
        part.multi.append(found.is_multi_turn)
    part.sha256 = digest.digest()
    return part


def _lines(job: _Job) -> Iterator[tuple[int, bytes]]:
    with job.path.open("rb") as stream:
        if job.begin:
            stream.seek(job.begin - 1)
            stream.readline()  # the end of a line that starts in the chunk before
        while (offset := stream.tell()) < job.end and (line := stream.readline()):
            yield offset, line
