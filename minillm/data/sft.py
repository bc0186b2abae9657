"""`minillm prepare-sft`: dialogues to a parquet of token rows, packed or one dialogue a row.

A dialogue longer than a row is dropped, counted and reported, never cut: half an answer would
teach the model to stop in mid-sentence. The price: all tokens are held in memory, 8 bytes each.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from minillm import paths
from minillm.data.chat import ChatEncoder
from minillm.data.dialogues import Dialogue, find_dialogue_files, read_file
from minillm.data.foreign_chat import TemplateEncoder, make_encoder
from minillm.data.identity import identity_dialogues
from minillm.data.packing import pack
from minillm.data.sft_rows import METADATA_KEY, SftRow, SftRows
from minillm.data.tokenizer import fingerprint, load_tokenizer, resolve_tokenizer
from minillm.data.windows import IGNORE
from minillm.errors import InputError
from minillm.files import atomic_write
from minillm.log import Progress, task
from minillm.settings import PrepareSftConfig

__all__ = ["SftReport", "SftRow", "SftRows", "prepare_sft"]

_BATCH_ROWS = 1024
_INTS = pa.list_(pa.int32())


@dataclass(frozen=True, slots=True)
class SftReport:
    """What `prepare_sft` read, dropped and wrote."""

    path: Path
    num_read: int
    """Dialogues in the files."""
    num_identity: int
    """Dialogues made of the identity templates."""
    num_sampled_out: int
    """Left out by `max_dialogues`."""
    num_too_long: int
    """Dropped, longer than a row."""
    longest: int
    """Tokens of the longest dialogue, dropped or not."""
    num_dialogues: int
    """Written."""
    num_rows: int
    sequence_length: int
    num_tokens: int
    num_label_tokens: int
    fill: float
    """Share of `num_rows * sequence_length` that is tokens."""
    by_source: dict[str, int]
    """Dialogues written, by source."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One dialogue, encoded; int32 arrays of its length."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    source: str


def prepare_sft(cfg: PrepareSftConfig, progress: Progress) -> SftReport:
    """Write the SFT parquet of some dialogues and a persona.

    The result depends on data, settings and tokenizer alone: same input, same rows.

    Args:
        cfg: The settings.
        progress: Where to report.

    Raises:
        InputError: Data or tokenizer are missing or malformed, or no dialogue is short enough.
    """
    started = time.monotonic()
    folder = resolve_tokenizer(cfg.tokenizer)
    tokenizer = load_tokenizer(folder)
    files = find_dialogue_files(paths.resolve(cfg.data, paths.BUNDLED_DIALOGUES))
    rng = random.Random(cfg.seed)
    read = _Counted(_read(files, progress))
    chosen = _sample(read, cfg.max_dialogues, rng)
    persona = [
        Dialogue(item["messages"], item["source"])
        for item in identity_dialogues(cfg.persona, cfg.seed)
    ]
    kept, num_too_long, longest = _encode_all(
        make_encoder(tokenizer), _chain(chosen, persona), cfg.sequence_length
    )
    if not kept:
        _refuse_empty(cfg, num_too_long, longest)
    rng.shuffle(kept)
    rows = _rows(kept, cfg, rng)
    counts = {
        "num_dialogues": len(kept),
        "num_tokens": sum(len(tokens.ids) for tokens in kept),
        "num_label_tokens": sum(int((tokens.labels != IGNORE).sum()) for tokens in kept),
    }
    facts = {
        "format_version": 1,
        "tokenizer_sha256": fingerprint(folder),
        "vocab_size": len(tokenizer),
        "sequence_length": cfg.sequence_length,
        "packed": cfg.pack,
        "seed": cfg.seed,
    }
    _write(cfg.out, rows, cfg.pack, facts | counts, progress)
    return SftReport(
        path=cfg.out,
        num_read=read.count,
        num_identity=len(persona),
        num_sampled_out=read.count + len(persona) - len(kept) - num_too_long,
        num_too_long=num_too_long,
        longest=longest,
        num_rows=len(rows),
        sequence_length=cfg.sequence_length,
        fill=counts["num_tokens"] / (len(rows) * cfg.sequence_length),
        by_source=dict(Counter(tokens.source or "unnamed" for tokens in kept).most_common()),
        seconds=time.monotonic() - started,
        **counts,
    )


class _Counted:
    """An iterable that counts what passed."""

    def __init__(self, items: Iterable[Dialogue]) -> None:
        self._items, self.count = items, 0

    def __iter__(self) -> Iterator[Dialogue]:
        for item in self._items:
            self.count += 1
            yield item


def _read(files: Sequence[Path], progress: Progress) -> Iterator[Dialogue]:
    sizes = [file.stat().st_size for file in files]
    with task(progress, "read dialogues", sum(sizes), "bytes"):
        for file, size in zip(files, sizes, strict=True):
            yield from read_file(file)
            progress.advance(size)


def _chain(*parts: Iterable[Dialogue]) -> Iterator[Dialogue]:
    for part in parts:
        yield from part


def _sample(items: Iterable[Dialogue], count: int, rng: random.Random) -> Iterable[Dialogue]:
    """Return `count` items, each as likely as any (algorithm R, Vitter 1985); all if 0."""
    if count <= 0:
        return items
    chosen: list[Dialogue] = []
    for index, item in enumerate(items):
        if index < count:
            chosen.append(item)
        elif (place := rng.randrange(index + 1)) < count:
            chosen[place] = item
    return chosen


def _encode_all(
    encoder: ChatEncoder | TemplateEncoder, dialogues: Iterable[Dialogue], sequence_length: int
) -> tuple[list[_Tokens], int, int]:
    """Return the dialogues that fit a row, the number of others, and the longest in tokens."""
    kept: list[_Tokens] = []
    num_too_long = longest = 0
    for dialogue in dialogues:
        encoded = encoder.encode(dialogue.messages)
        size = len(encoded.token_ids)
        longest = max(longest, size)
        if size > sequence_length:
            num_too_long += 1
            continue
        ids = np.array(encoded.token_ids, dtype=np.int32)
        kept.append(_Tokens(ids, np.array(encoded.labels, dtype=np.int32), dialogue.source))
    return kept, num_too_long, longest


def _refuse_empty(cfg: PrepareSftConfig, num_too_long: int, longest: int) -> None:
    if not num_too_long:
        raise InputError(
            f"no dialogue in `{cfg.data}`", hint="use the ones in the package: `--data bundled`"
        )
    raise InputError(
        f"all {num_too_long} dialogues are longer than `--sequence-length {cfg.sequence_length}`",
        hint=f"the longest has {longest} tokens: `--sequence-length {longest}`",
    )


def _rows(
    kept: Sequence[_Tokens], cfg: PrepareSftConfig, rng: random.Random
) -> list[list[_Tokens]]:
    """Return the dialogues of each row, in shuffled order."""
    if not cfg.pack:
        return [[tokens] for tokens in kept]
    packed = pack([len(tokens.ids) for tokens in kept], cfg.sequence_length)
    rows = [[kept[index] for index in row] for row in packed]
    rng.shuffle(rows)
    return rows


def _write(
    path: Path,
    rows: Sequence[Sequence[_Tokens]],
    packed: bool,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the parquet, whole or not at all."""
    last = "sample_lengths" if packed else "attention_mask"
    lists = [(name, _INTS) for name in ("token_ids", "labels", "position_ids")]
    columns = [*lists, ("length", pa.int32()), (last, _INTS), ("type", pa.string())]
    schema = pa.schema(columns, metadata={METADATA_KEY: json.dumps(facts).encode()})
    with (
        task(progress, "write rows", len(rows), "rows"),
        atomic_write(path) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for first in range(0, len(rows), _BATCH_ROWS):
            part = rows[first : first + _BATCH_ROWS]
            writer.write_table(pa.table([*_columns(part, packed)], schema=schema))
            progress.advance(len(part))


def _columns(rows: Sequence[Sequence[_Tokens]], packed: bool) -> Iterator[pa.Array]:
    """Yield the columns of some rows, in the order of the schema."""
    sizes = [[len(tokens.ids) for tokens in row] for row in rows]
    lengths = [sum(row) for row in sizes]
    flat = [tokens for row in rows for tokens in row]
    positions = [np.arange(len(tokens.ids), dtype=np.int32) for tokens in flat]
    yield _lists([tokens.ids for tokens in flat], lengths)
    yield _lists([tokens.labels for tokens in flat], lengths)
    yield _lists(positions, lengths)
    yield pa.array(lengths, pa.int32())
    if packed:
        yield pa.array(sizes, _INTS)
        yield pa.array(["packed"] * len(rows))
    else:
        yield _lists([np.ones(sum(lengths), dtype=np.int32)], lengths)
        yield pa.array([row[0].source for row in rows])


def _lists(parts: Sequence[npt.NDArray[np.int32]], lengths: Sequence[int]) -> pa.Array:
    """Return a column of lists of these lengths, cut from the joined parts."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts)))
