"""Files that are whole or not there: atomic writes, hashes, locks, free space."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from minillm.errors import InputError, RunError, SetupError

PART_SUFFIX = ".part"


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb", *, is_durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` only if the block succeeds.

    The bytes are fsynced before the rename, so after a power cut `path` is the old or the new
    file, never half of one. If the block raises, the temporary file is removed.

    Args:
        path: The file to make.
        mode: As for `open`.
        is_durable: False spares the fsync, where a hash will find what a power cut damaged.

    Raises:
        SetupError: The disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        with named_os_errors(path):
            with part.open(mode) as stream:
                yield stream
                stream.flush()
                if is_durable:
                    os.fsync(stream.fileno())
            part.replace(path)
            if is_durable:
                fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path, is_durable=is_durable) as stream:
        stream.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path, *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` only if the block succeeds.

    An earlier `path` is replaced whole. Its place is empty for the moment between two renames, but
    never holds half of anything.

    Args:
        path: The folder to make.
        ours: Tells whether a file that lies in `path` already is one we may replace.

    Raises:
        InputError: `path` is a file, or holds files that are not ours.
        RunError: Another process is making the same folder.
        SetupError: The disk is full or the folder cannot be written.
    """
    _require_ours(path, ours)
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    old = path.with_name(f".{path.name}.old")
    with folder_lock(part):
        for leftover in part.iterdir():
            _remove(leftover)
        try:
            with named_os_errors(path):
                yield part
                fsync_tree(part)
                _remove(old)
                if path.exists():
                    path.rename(old)
                part.rename(path)
                fsync_folder(path.parent)
        finally:
            _remove(part)
            _remove(old)


def _require_ours(path: Path, ours: Callable[[Path], bool]) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"`{path}` is a file, a folder is wanted", hint="choose another `--out`")
    foreign = [entry for entry in sorted(path.glob("*")) if not ours(entry)]
    if foreign:
        raise InputError(
            f"`{path}` holds `{foreign[0].name}`, which this command did not make",
            hint="choose another `--out`, or empty that folder yourself",
        )


def _remove(path: Path) -> None:
    """Delete a file or a folder tree; nothing there is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable; does nothing where the system cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Fsync every file below `folder`, then the folders."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)


@contextlib.contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into a SetupError that names `path`."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            free = human_bytes(free_bytes(path))
            raise SetupError(
                f"the disk is full while writing `{path}` ({free} free)",
                hint=f"free some space (`df -h {_existing(path)}`) and run the same command again",
            ) from err
        if err.errno == errno.EFBIG:  # FAT32 ends at 4 GB; so does `ulimit -f` somewhere
            raise SetupError(
                f"the file system or a limit of this account takes no larger `{path}`",
                hint="choose a folder on another disk (FAT32 ends at 4 GB), or raise `ulimit -f`",
            ) from err
        if err.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise SetupError(
                f"cannot write `{path}`: {err.strerror}",
                hint=f"choose a folder you may write to, or `chmod u+w {_existing(path)}`",
            ) from err
        raise


def _existing(path: Path) -> Path:
    """Return the nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that `folder` is on, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def require_free_space(folder: Path, need_bytes: int, what: str) -> None:
    """Refuse to begin when `folder`'s disk cannot hold `need_bytes`.

    Raises:
        SetupError: Less than `need_bytes` are free.
    """
    free = free_bytes(folder)
    if free < need_bytes:
        raise SetupError(
            f"{what} needs {human_bytes(need_bytes)} in `{folder}`, {human_bytes(free)} are free",
            hint=f"free some space (`df -h {_existing(folder)}`) or choose another folder",
        )


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder` (created if needed) for the block.

    Raises:
        RunError: Another process holds it.
    """
    import fcntl

    with named_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another process is writing `{folder}`",
                hint="wait for it, or choose another output folder",
            ) from None
        yield
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sample_sha256(path: Path, blocks: int = 256, block_bytes: int = 4096) -> str:
    """Hash the size of a file and blocks spread evenly over it, its ends among them.

    Quick at any size: it tells another file from this one, not every change of a byte.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for index in range(blocks):
            stream.seek(max(0, size - block_bytes) * index // (blocks - 1))
            digest.update(stream.read(block_bytes))
    return digest.hexdigest()


def human_bytes(size: float) -> str:
    """Return e.g. `1.5 MB`, in powers of 1000.

    >>> human_bytes(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_count(count: float) -> str:
    """Return e.g. `1.2M`, in powers of 1000.

    >>> human_count(1_234_567)
    '1.2M'
    """
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def human_time(seconds: float) -> str:
    """Return e.g. `45 s`, `3m05s`, `2h07m`.

    >>> human_time(185)
    '3m05s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
