"""Fetch one file so that it is whole and right, or not there.

Bytes go to a part file that a later run continues with a `Range` request; only after size and
checksum agree with the hub's listing does the part file get its real name. The price is that a
continued file is read once more from the disk, to hash what was already there.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import requests

from minillm.data.meter import FileMeter
from minillm.data.web import (
    RETRY_STATUS,
    Patience,
    StoppedError,
    Web,
    asked_wait_s,
    reason_of,
    refuse_status,
)
from minillm.errors import InputError, RunError
from minillm.files import fsync_folder, human_bytes, named_os_errors
from minillm.log import logger

CHUNK_BYTES = 256 * 1024  # the most that Ctrl-C or a cut connection loses


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a hub's listing.

    Attributes:
        path: POSIX path inside the repository.
        digest: `sha256:HEX`, or `git:HEX` (git's blob id), or empty if the hub tells neither.
    """

    path: str
    size_bytes: int
    digest: str
    url: str


class Hasher:
    """Compute a digest of the kind that a listing gives."""

    def __init__(self, like: str, size_bytes: int) -> None:
        self._kind = "git" if like.startswith("git:") else "sha256"
        if self._kind == "git":
            self._hash = hashlib.sha1(f"blob {size_bytes}\0".encode(), usedforsecurity=False)
        else:
            self._hash = hashlib.sha256()

    def update(self, chunk: bytes | memoryview) -> None:
        """Add bytes."""
        self._hash.update(chunk)

    def digest(self) -> str:
        """Return `KIND:HEX` of the bytes so far."""
        return f"{self._kind}:{self._hash.hexdigest()}"


def digest_file(path: Path, like: str, progress: Callable[[int], None] = lambda _: None) -> str:
    """Return a file's digest, of the same kind as `like`."""
    hasher = Hasher(like, path.stat().st_size)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
            progress(len(chunk))
    return hasher.digest()


def fetch(
    web: Web,
    remote: RemoteFile,
    part: Path,
    target: Path,
    headers: Mapping[str, str],
    meter: FileMeter,
) -> None:
    """Make `target` the file that the hub lists, continuing `part` if it is there.

    Args:
        web: Connection and stop signal.
        remote: What to fetch.
        part: File of unfinished bytes, on the same disk as `target`.
        target: Where the verified file goes.
        headers: Sent to the hub only, dropped on a redirect to another host.
        meter: Counts the bytes that arrive.

    Raises:
        RunError: The hub does not answer, or sends other bytes than it lists.
        SetupError: The disk is full or the folder cannot be written.
        StoppedError: `web.stop` was set; `part` keeps what has arrived.
    """
    make_folders(part, target)
    # A part file from before the hub's file changed gives wrong bytes once: then start clean.
    for is_last in (False, True):
        found = _fill(web, remote, part, headers, meter)
        if found == remote.digest or not remote.digest:
            break
        part.unlink()
        meter.advance(-remote.size_bytes)
        if is_last:
            raise RunError(
                f"`{remote.url}` sent {found}, its listing says {remote.digest}",
                hint="nothing was kept; run the same command again, or choose another `--hub`",
            )
    if not remote.digest:
        logger.warning("the hub gives no checksum of `%s`: only its size was checked", remote.path)
    accept(part, target)


def bring(
    source: Path,
    remote: RemoteFile,
    part: Path,
    target: Path,
    stop: threading.Event,
    meter: FileMeter,
) -> None:
    """Make `target` the listed file by copying `source`, checked like one from the hub.

    Raises:
        InputError: `source` is not the file that the hub lists.
        SetupError: The disk is full or the folder cannot be written.
        StoppedError: `stop` was set; `part` keeps what was copied.
    """
    wrong = InputError(
        f"`{source}` is not the file that the hub lists as {human_bytes(remote.size_bytes)}, "
        f"{remote.digest}",
        hint="it was not taken; fetch it again, or leave out `--from` to download it",
    )
    if source.stat().st_size != remote.size_bytes:
        raise wrong
    make_folders(part, target)
    for is_last in (False, True):  # the part may be of another download: then once more
        with (
            named_os_errors(part),
            part.open("ab+", buffering=0) as stream,
            source.open("rb") as given,
        ):
            begun = Part(stream, remote, stop, meter)
            given.seek(begun.size)
            while chunk := given.read(CHUNK_BYTES):
                _leave_if(stop)
                begun.append(chunk)
        if begun.size == remote.size_bytes and remote.digest in ("", begun.hasher.digest()):
            break
        part.unlink()
        meter.advance(-begun.size)
        if is_last:
            raise wrong
    accept(part, target)


def make_folders(*files: Path) -> None:
    """Make the folders that files will be in.

    Raises:
        SetupError: The disk is full or a folder cannot be written.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        with named_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)


def accept(part: Path, target: Path) -> None:
    """Give a verified part file its real name, durably."""
    with named_os_errors(target):
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    fsync_folder(target.parent)


def _fill(
    web: Web, remote: RemoteFile, path: Path, headers: Mapping[str, str], meter: FileMeter
) -> str:
    """Append to `path` until it has the listed size; return the digest of all its bytes."""
    patience = Patience(remote.url, web.stop)
    with named_os_errors(path), path.open("ab+", buffering=0) as stream:
        part = Part(stream, remote, web.stop, meter)
        while part.size < remote.size_bytes:
            try:
                with web.body(remote.url, headers, part.size) as reply:
                    if reply.status_code in RETRY_STATUS:
                        reason, asked_s = f"HTTP {reply.status_code}", asked_wait_s(reply.headers)
                    else:
                        reason, asked_s = part.receive(reply, patience), None
            except requests.RequestException as err:
                reason, asked_s = reason_of(err), None
            if part.size < remote.size_bytes:
                patience.wait(reason, asked_s)
        return part.hasher.digest()


class Part:
    """The bytes of one file that have arrived so far, and their running digest."""

    def __init__(
        self, stream: IO[bytes], remote: RemoteFile, stop: threading.Event, meter: FileMeter
    ) -> None:
        self._stream, self._remote, self._stop, self._meter = stream, remote, stop, meter
        self.hasher, self.size = Hasher(remote.digest, remote.size_bytes), 0
        stream.seek(0)
        while chunk := stream.read(1 << 20):
            _leave_if(stop)
            self.hasher.update(chunk)
            self.size += len(chunk)
            meter.found(len(chunk))
        if self.size > remote.size_bytes:
            self._restart(arrived=0)

    def _restart(self, arrived: int) -> None:
        """Throw the bytes away; the first `arrived` of them had been counted as to come."""
        self._stream.truncate(0)
        self._meter.advance(-arrived)
        self._meter.found(arrived - self.size)
        self.hasher, self.size = Hasher(self._remote.digest, self._remote.size_bytes), 0

    def receive(self, reply: requests.Response, patience: Patience) -> str:
        """Append an answer's body; return what to say if bytes are still missing after it."""
        if reply.status_code == 416:  # the hub's file is shorter than the part: not the same file
            self._restart(arrived=self.size)
            return "HTTP 416"
        refuse_status(reply, self._remote.url)
        if not self._fits(reply):
            return "an answer of the wrong length"
        if reply.status_code == 200 and self.size:  # the server ignored the Range
            self._restart(arrived=self.size)
        for chunk in reply.iter_content(CHUNK_BYTES):
            _leave_if(self._stop)
            self.append(chunk)
            patience.reached(self.size)
            if self.size >= self._remote.size_bytes:
                break
        _leave_if(self._stop)
        return "an answer cut short"

    def append(self, chunk: bytes) -> None:
        """Write bytes, but none beyond the listed size."""
        view = memoryview(chunk)[: self._remote.size_bytes - self.size]
        while view:  # an almost full disk takes a piece, then refuses the rest
            written = self._stream.write(view)
            self.hasher.update(view[:written])
            self.size += written
            self._meter.advance(written)
            view = view[written:]

    def _fits(self, reply: requests.Response) -> bool:
        """Tell whether an answer can be the rest of the file, judging by its headers."""
        size = self._remote.size_bytes
        if reply.status_code == 206:
            return reply.headers.get("Content-Range") == f"bytes {self.size}-{size - 1}/{size}"
        return reply.headers.get("Content-Length", str(size)) == str(size)


def _leave_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise StoppedError
