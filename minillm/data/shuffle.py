"""Merge token files with their documents in one random order, in bounded memory.

Two passes, both in sequence, however large the files: the first deals the documents out to random
buckets on the disk; the second takes one bucket after the other into memory and writes its
documents in random order. Every order of all documents is equally likely, and the seed names one.

A document ends with a separator, or begins where `NAME.bin.docs` (uint64 document starts) says.
The price: the disk holds everything three times for a while.
"""

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from minillm.data.binfile import TokenFile
from minillm.data.manifest import Manifest, manifest_path, require_content
from minillm.errors import InputError
from minillm.files import atomic_write, named_os_errors, require_free_space
from minillm.log import Progress, Silent, task

_BUCKET_BYTES = 16_000_000
_MOST_BUCKETS = 512  # open at a time
_CHUNK_TOKENS = 1 << 20
_DOCS_SUFFIX = ".docs"

_Starts = npt.NDArray[np.int64]


def shuffle_documents(
    inputs: list[TokenFile], out: Path, seed: int, progress: Progress | None = None
) -> Manifest:
    """Write the documents of all files in random order; the manifest is written last.

    Args:
        inputs: The parts, of one tokenizer and dtype.
        out: The .bin to write.
        seed: Of the order.
        progress: Told the bytes read and written.

    Raises:
        InputError: A part is not what its manifest says, or its `.docs` are not document starts.
        SetupError: The disk has no room.
    """
    progress = progress or Silent()
    size_bytes = sum(part.manifest.size_bytes for part in inputs)
    require_free_space(out.parent, 2 * size_bytes, f"`{out.name}`")
    draw = np.random.Generator(np.random.PCG64(seed))
    num_buckets = min(_MOST_BUCKETS, -(-size_bytes // _BUCKET_BYTES))
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        named_os_errors(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch,
        task(progress, f"shuffle {out.name}", 2 * size_bytes, "bytes"),
    ):
        buckets = [Path(scratch) / f"{index}" for index in range(num_buckets)]
        num_documents = _deal(inputs, buckets, draw, progress)
        whole = hashlib.sha256()
        with atomic_write(out) as to:
            for bucket in buckets:
                for piece in _shuffled(bucket, inputs[0].tokens.dtype, draw):
                    to.write(piece)
                    whole.update(piece)
                    progress.advance(len(piece))
            manifest_path(out).unlink(missing_ok=True)  # an old one must not vouch for the new
    merged = dataclasses.replace(
        inputs[0].manifest,
        num_tokens=sum(part.manifest.num_tokens for part in inputs),
        num_documents=num_documents,
        text_bytes=sum(part.manifest.text_bytes for part in inputs),
        parts=(),
        sha256=whole.hexdigest(),
        sources=tuple(dict.fromkeys(s for part in inputs for s in part.manifest.sources)),
        made_from="",
    )
    merged.write(manifest_path(out))
    return merged


def _deal(
    inputs: list[TokenFile], buckets: list[Path], draw: np.random.Generator, progress: Progress
) -> int:
    """Write each document and its length to a random bucket; return how many there are."""
    num_documents = 0
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(bucket.open("wb")) for bucket in buckets]
        sizes = [stack.enter_context(_sizes_of(bucket).open("wb")) for bucket in buckets]
        for part in inputs:
            require_content(part.path, part.manifest)
            for begin, ends in _documents(part):
                starts = np.concatenate([[begin], ends[:-1]])
                chosen = np.minimum(draw.random(len(ends)) * len(buckets), len(buckets) - 1)
                _write(part, starts, ends, chosen.astype(np.int64), streams, sizes)
                num_documents += len(ends)
                progress.advance(int(ends[-1] - begin) * part.tokens.itemsize)
    return num_documents


def _write(
    part: TokenFile,
    starts: _Starts,
    ends: _Starts,
    chosen: npt.NDArray[np.int64],
    streams: Sequence[IO[bytes]],
    sizes: Sequence[IO[bytes]],
) -> None:
    first = int(starts[0])
    block = _read(part, first, int(ends[-1]))
    raw, width = block.data.cast("B"), block.itemsize
    low, high = (starts - first) * width, (ends - first) * width
    order = np.argsort(chosen, kind="stable")
    bounds = np.searchsorted(chosen[order], np.arange(len(streams) + 1))
    for index in np.unique(chosen):
        mine = order[bounds[index] : bounds[index + 1]]
        pairs = zip(low[mine].tolist(), high[mine].tolist(), strict=True)
        streams[index].write(b"".join([raw[a:b] for a, b in pairs]))
        sizes[index].write((ends - starts)[mine].astype("<i8").tobytes())


def _sizes_of(bucket: Path) -> Path:
    return bucket.with_suffix(".sizes")


def _shuffled(
    bucket: Path, dtype: "np.dtype[np.integer]", draw: np.random.Generator
) -> Iterator[bytes]:
    """Yield a bucket's documents in random order, and remove it."""
    raw = memoryview(bucket.read_bytes())
    ends = np.cumsum(np.fromfile(_sizes_of(bucket), dtype="<i8")) * dtype.itemsize
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    order = draw.permutation(len(ends))
    pairs = zip(starts[order].tolist(), ends[order].tolist(), strict=True)
    yield b"".join([raw[a:b] for a, b in pairs])
    bucket.unlink()
    _sizes_of(bucket).unlink()


def _documents(part: TokenFile) -> Iterator[tuple[int, _Starts]]:
    """Yield where some documents begin and the ends of each, in order, chunk by chunk."""
    docs = part.path.with_name(part.path.name + _DOCS_SUFFIX)
    known = _read_starts(docs, len(part)) if docs.is_file() else None
    begin = position = 0
    while position < len(part):
        until = min(position + _CHUNK_TOKENS, len(part))
        if known is None:
            is_end = _read(part, position, until) == part.manifest.separator_id
            ends = np.flatnonzero(is_end) + position + 1
        else:
            low, high = np.searchsorted(known, [position + 1, until + 1])
            ends = np.asarray(known[low:high], dtype=np.int64)
        position = until
        if position == len(part) and known is not None:
            ends = np.append(ends, position)
        elif position == len(part) and (len(ends) == 0 or ends[-1] != position):
            raise InputError(
                f"`{part.path}` does not end with the separator, so its last document would run "
                "into another",
                hint="merge without `--shuffle-documents`",
            )
        if len(ends):
            yield begin, ends
            begin = int(ends[-1])


def _read(part: TokenFile, begin: int, end: int) -> npt.NDArray[np.integer]:
    """Read some tokens; unlike pages of the memory map they are gone when they are used."""
    dtype = part.tokens.dtype
    return np.fromfile(part.path, dtype, end - begin, offset=begin * dtype.itemsize)


def _read_starts(docs: Path, num_tokens: int) -> "np.memmap[tuple[int], np.dtype[np.uint64]]":
    size = docs.stat().st_size
    starts = np.memmap(docs, dtype="<u8", mode="r") if size and size % 8 == 0 else None
    if (
        starts is None
        or starts[0] != 0
        or starts[-1] >= num_tokens
        or (np.any(starts[1:] <= starts[:-1]))
    ):
        raise InputError(
            f"`{docs}` does not hold the starts of documents, rising from 0, as uint64",
            hint=f"remove it, and documents end at the separator: `rm {docs}`",
        )
    return starts
