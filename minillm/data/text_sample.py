"""A random sample of any corpus in one pass and bounded memory, with the source of each text.

Every text gets a random number, and the texts with the smallest numbers are kept as long as they
fit: a sample of the whole corpus in which each text has the same chance. A longer text is cut into
pieces first, so that one huge document neither fills the sample nor empties it. The texts that
come next in this order were not chosen, and serve as held-out text.
"""

import heapq
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.documents import find_files, open_parquet, read_file, stem_of, total_bytes
from minillm.data.recipes import Recipe
from minillm.errors import InputError
from minillm.log import Progress, task

HELD_OUT_BYTES = 2_000_000

_PIECE_CHARS = 1 << 16
_LINE_END = re.compile(r"\n+")
_SOURCE = "source"


@dataclass(frozen=True, slots=True)
class Text:
    """A document or a piece of one."""

    text: str
    source: str
    size: int
    """In bytes of UTF-8."""


@dataclass(slots=True)
class TextSample:
    """What was read, in the order of the corpus."""

    chosen: list[Text] = field(default_factory=list)
    held_out: list[Text] = field(default_factory=list)
    """Text that is not in `chosen`, at random; empty if all of the corpus is."""
    num_documents: int = 0
    """In the corpus."""
    corpus_bytes: int = 0

    @property
    def text_bytes(self) -> int:
        """Bytes of `chosen`."""
        return sum(text.size for text in self.chosen)


def read_sample(
    place: Path, text_column: str, max_bytes: int, seed: int, progress: Progress
) -> TextSample:
    """Read all documents below `place` and keep a sample of at most `max_bytes`.

    Args:
        place: File or folder of parquet, jsonl or txt.
        text_column: Name of the text column or JSON key.
        max_bytes: Bound in bytes of UTF-8; 0: keep everything.
        seed: Of the random numbers.
        progress: Told about the bytes on disk.

    Raises:
        InputError: A file is broken, lacks the column, or there is no document in any of them.
    """
    files = find_files(place)
    sample, held = TextSample(), _Smallest(max_bytes + HELD_OUT_BYTES if max_bytes else 0)
    draw = random.Random(f"{seed} sample")
    with task(progress, "read text", total_bytes(files), "bytes"):
        for file in files:
            for texts, sources, read_bytes in _read(file, text_column):
                for text, source in zip(texts, sources, strict=True):
                    sample.num_documents += 1
                    for piece in _pieces(text):
                        size = len(piece.encode())
                        sample.corpus_bytes += size
                        held.add(draw.random(), Text(piece, source, size))
                progress.advance(read_bytes)
    if not sample.num_documents:
        raise InputError(
            f"no document with any text in `{place}`",
            hint="use other files, or the text in the package: `--data bundled`",
        )
    sample.chosen, sample.held_out = held.split(max_bytes)
    return sample


def _read(file: Path, column: str) -> Iterator[tuple[list[str], list[str], float]]:
    """Yield texts, their sources, and the bytes on disk; without a column, a file is a source."""
    name = stem_of(file)
    has_source = False
    if file.suffix.lower() == ".parquet":
        with open_parquet(file, column) as opened:
            schema = opened.schema_arrow
            has_source = column != _SOURCE and _SOURCE in schema.names
            has_source = has_source and "string" in str(schema.field(_SOURCE).type)
    if not has_source:
        for batch in read_file(file, Recipe.of_column(column)):
            yield batch.texts, [name] * len(batch.texts), batch.read_bytes
        return
    both = Recipe((_SOURCE, column), around=("", "\0", ""), optional=frozenset((_SOURCE,)))
    for batch in read_file(file, both):
        pairs = [text.partition("\0") for text in batch.texts]
        kept = [(text, source) for source, _, text in pairs if text and not text.isspace()]
        yield [text for text, _ in kept], [source or name for _, source in kept], batch.read_bytes


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after the ends of lines, where a pre-token ends too, or wherever it must."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        line_end = text.rfind("\n", start + _PIECE_CHARS // 2, end)
        if line_end >= 0 and (run := _LINE_END.match(text, line_end)):
            end = run.end()
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class _Smallest:
    """The texts with the smallest numbers, as many as fit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._heap: list[tuple[float, int, Text]] = []
        self._bound, self._bytes, self._num_seen = 2.0, 0, 0

    def add(self, number: float, text: Text) -> None:
        """Take a text, unless a smaller number was already left out."""
        self._num_seen += 1
        if number >= self._bound:
            return
        heapq.heappush(self._heap, (-number, self._num_seen, text))
        self._bytes += text.size
        while self._max_bytes and self._bytes > self._max_bytes:
            negative, _, left_out = heapq.heappop(self._heap)
            self._bound = -negative
            self._bytes -= left_out.size

    def split(self, max_bytes: int) -> tuple[list[Text], list[Text]]:
        """Return the texts that fit into `max_bytes` (0: all) and the others, in reading order."""
        chosen: list[tuple[int, Text]] = []
        others: list[tuple[int, Text]] = []
        size = 0
        for _, place, text in sorted(self._heap, key=lambda item: (-item[0], item[1])):
            size += text.size
            (chosen if not max_bytes or size <= max_bytes else others).append((place, text))
        return (
            [text for _, text in sorted(chosen, key=lambda item: item[0])],
            [text for _, text in sorted(others, key=lambda item: item[0])],
        )
