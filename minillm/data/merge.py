"""Merge token files into one, by the kernel's own copy where the system has one.

The bytes go from file to file without passing through Python; afterwards the result is read once,
which yields its sha256 and proves each part against its manifest. Nothing is left of a merge that
did not end. The price: the disk holds parts and whole at the same time.
"""

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from minillm import paths
from minillm.data.binfile import Manifest, TokenFile, manifest_path
from minillm.data.tokenizer import load_tokenizer, resolve_tokenizer
from minillm.errors import InputError
from minillm.files import atomic_write, require_free_space
from minillm.log import Progress, Silent, task
from minillm.settings import MergeBinConfig

_CHUNK_BYTES = 1 << 26
_HASH_BYTES = 1 << 20


def merge_bin(cfg: MergeBinConfig, progress: Progress | None = None) -> Manifest:
    """Merge all .bin files of a folder, in the order of their names.

    Returns:
        The manifest of the merged file.

    Raises:
        InputError: No .bin there, a broken one, or two made with different tokenizers.
    """
    tokenizer = None
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(resolve_tokenizer(cfg.tokenizer))
    inputs = [TokenFile.open(path, tokenizer=tokenizer) for path in _find_inputs(cfg)]
    return merge_files(inputs, cfg.out, progress)


def _find_inputs(cfg: MergeBinConfig) -> list[Path]:
    hint = "make some with `minillm tokenize --data bundled`, or name their folder: `--data FOLDER`"
    if cfg.data.is_file():
        return [cfg.data]
    if not cfg.data.is_dir():
        if cfg.data == paths.TOKENS:
            raise InputError(f"no token files: `{cfg.data}` does not exist", hint=hint)
        raise InputError(f"no file or folder at `{cfg.data}`", hint=hint)
    out = cfg.out.absolute()
    found = sorted(path for path in cfg.data.glob("*.bin") if path.absolute() != out)
    if not found:
        raise InputError(f"no .bin file in `{cfg.data}`", hint=hint)
    return found


def merge_files(
    inputs: list[TokenFile],
    out: Path,
    progress: Progress | None = None,
    *,
    sources: tuple[str, ...] = (),
    made_from: str = "",
) -> Manifest:
    """Concatenate token files; the manifest is written last.

    Args:
        inputs: The parts, in order; at least one.
        out: The .bin to write.
        progress: Told the bytes copied.
        sources: Of the manifest; default: those of the parts.
        made_from: Of the manifest.

    Raises:
        InputError: The parts differ in tokenizer or dtype, or one is not what its manifest says.
        SetupError: The disk has no room.
    """
    progress = progress or Silent()
    _require_alike(inputs)
    size_bytes = sum(part.manifest.size_bytes for part in inputs)
    require_free_space(out.parent, size_bytes, f"`{out.name}`")
    with task(progress, f"merge {out.name}", size_bytes, "bytes"), atomic_write(out, "w+b") as to:
        for part in inputs:
            _copy(part, to, progress)
        sha256 = _prove(inputs, to)
        manifest_path(out).unlink(missing_ok=True)  # an old one must not vouch for the new
    given = sources or tuple(dict.fromkeys(s for part in inputs for s in part.manifest.sources))
    merged = dataclasses.replace(
        inputs[0].manifest,
        num_tokens=sum(part.manifest.num_tokens for part in inputs),
        num_documents=sum(part.manifest.num_documents for part in inputs),
        text_bytes=sum(part.manifest.text_bytes for part in inputs),
        sha256=sha256,
        sources=given,
        made_from=made_from,
    )
    merged.write(manifest_path(out))
    return merged


def _require_alike(inputs: list[TokenFile]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        a, b = first.manifest, other.manifest
        if a.tokenizer_sha256 != b.tokenizer_sha256:
            raise InputError(
                f"`{first.path}` was made with tokenizer {a.tokenizer_sha256[:12]}…, but "
                f"`{other.path}` with {b.tokenizer_sha256[:12]}…",
                hint="make them with one tokenizer: `minillm tokenize --tokenizer FOLDER`",
            )
        if (a.dtype, a.facts) != (b.dtype, b.facts):
            raise InputError(
                f"`{first.path}` holds {a.dtype} with separator {a.separator_id}, but "
                f"`{other.path}` {b.dtype} with {b.separator_id}",
                hint="make them again with `minillm tokenize`",
            )


def _prove(inputs: list[TokenFile], merged: IO[bytes]) -> str:
    """Read the merged file once, compare each part with its manifest, and return the sha256."""
    whole = hashlib.sha256()
    merged.seek(0)
    for part in inputs:
        own = hashlib.sha256()
        left = part.manifest.size_bytes
        while left:
            piece = merged.read(min(left, _HASH_BYTES))
            if not piece:
                raise _changed(part)
            own.update(piece)
            whole.update(piece)
            left -= len(piece)
        if own.hexdigest() != part.manifest.sha256:
            raise InputError(
                f"`{part.path}` has sha256 {own.hexdigest()[:12]}…, its manifest says "
                f"{part.manifest.sha256[:12]}…",
                hint="make it again with `minillm tokenize`",
            )
    return whole.hexdigest()


def _copy(part: TokenFile, to: IO[bytes], progress: Progress) -> None:
    """Append a file's bytes with the fastest call that works here."""
    ways = [_copy_in_kernel, _send, _read_and_write]
    with part.path.open("rb", buffering=0) as source:
        left = part.manifest.size_bytes
        while left:
            try:
                done = ways[0](source.fileno(), to.fileno(), min(left, _CHUNK_BYTES))
            except OSError as err:
                if len(ways) == 1 or err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                ways.pop(0)  # not across these file systems, or not on this system
                continue
            if done == 0:
                raise _changed(part)
            left -= done
            progress.advance(done)


def _changed(part: TokenFile) -> InputError:
    return InputError(
        f"`{part.path}` became shorter while it was read",
        hint="run the same command again when nothing writes that file",
    )


def _copy_in_kernel(source: int, target: int, count: int) -> int:
    call: Callable[[int, int, int], int] | None = getattr(os, "copy_file_range", None)
    if call is None:
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return call(source, target, count)


def _send(source: int, target: int, count: int) -> int:
    call = getattr(os, "sendfile", None)
    if call is None:
        raise OSError(errno.ENOSYS, "no sendfile")
    return int(call(target, source, None, count))


def _read_and_write(source: int, target: int, count: int) -> int:
    data = os.read(source, min(count, _HASH_BYTES))
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)
