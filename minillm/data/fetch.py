"""Fetch one file over HTTP so that it is whole and right, or not there.

Bytes go to a part file that a later run continues with a `Range` request; only after size and
checksum agree with the hub's listing does the part file get its real name. The price is that a
continued file is read once more from the disk, to hash what was already there.
"""

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import requests
from requests.adapters import HTTPAdapter

from minillm.errors import RunError, SetupError
from minillm.files import fsync_folder, named_os_errors
from minillm.log import logger

CHUNK_BYTES = 256 * 1024  # the most that Ctrl-C or a cut connection loses
TIMEOUT_S = (10.0, 30.0)  # to connect; between two reads
TRIES = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 600.0  # a hub's rate window is five minutes
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class StoppedError(Exception):
    """Another file failed or the user pressed Ctrl-C: leave without a word."""


class UnreachableError(RunError):
    """No answer, or none of use, after every try."""


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

    def update(self, chunk: bytes) -> None:
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


@dataclass(slots=True)
class Patience:
    """Waits between tries, longer each time, and gives up after `TRIES` failures in a row."""

    url: str
    stop: threading.Event
    failures: int = 0
    farthest: int = 0

    def wait(self, reason: str, asked_s: float | None = None) -> None:
        """Sleep before the next try, as long as the server asked for, if it did.

        Raises:
            UnreachableError: This was the last try.
            StoppedError: The download was stopped meanwhile.
        """
        self.failures += 1
        if self.failures >= TRIES:
            raise UnreachableError(
                f"{reason} from `{self.url}`, {TRIES} times in a row",
                hint="run the same command again later: it continues where it stopped",
            )
        backoff_s = FIRST_WAIT_S * 2 ** (self.failures - 1) * random.uniform(0.75, 1.25)
        delay_s = min(backoff_s if asked_s is None else asked_s, LONGEST_WAIT_S)
        if delay_s > 10:
            logger.warning("%s from `%s`: waiting %.0f s", reason, self.url, delay_s)
        if self.stop.wait(delay_s):
            raise StoppedError

    def reached(self, size_bytes: int) -> None:
        """Forget earlier failures once more has arrived than ever before."""
        if size_bytes > self.farthest:
            self.farthest, self.failures = size_bytes, 0


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Return how long a server wants us to wait: `Retry-After`, else the end of `RateLimit`."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    window = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(window[1]) if window else None


@dataclass(slots=True)
class Web:
    """HTTP GET with time-outs and retries; one for all threads of a download.

    Attributes:
        stop: Set to make every transfer end at its next chunk.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    session: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        """Ask for raw bytes, so that sizes and checksums mean the file itself."""
        self.session.headers["Accept-Encoding"] = "identity"
        self.session.mount("https://", HTTPAdapter(pool_maxsize=16))

    def get(
        self, url: str, headers: Mapping[str, str], *, from_byte: int = 0, stream: bool = True
    ) -> requests.Response:
        """Send one GET; `from_byte` > 0 asks for the rest of a file."""
        wanted = {"Range": f"bytes={from_byte}-"} if from_byte else {}
        return self.session.get(
            url, headers={**headers, **wanted}, timeout=TIMEOUT_S, stream=stream
        )

    def get_json(self, url: str, headers: Mapping[str, str]) -> tuple[Any, requests.Response]:
        """Fetch and parse JSON, trying again on busy and broken answers.

        Raises:
            UnreachableError: The hub does not answer, or not with JSON.
        """
        patience = Patience(url, self.stop)
        while True:
            try:
                reply = self.get(url, headers, stream=False)
            except requests.RequestException as err:
                patience.wait(_reason(err))
                continue
            if reply.status_code in RETRY_STATUS:
                patience.wait(f"HTTP {reply.status_code}", asked_wait_s(reply.headers))
                continue
            refuse_status(reply, url)
            try:
                return reply.json(), reply
            except ValueError:
                raise UnreachableError(
                    f"`{url}` answered something that is not JSON",
                    hint="a proxy or the log-in page of a network may stand between: open the "
                    "address in a browser",
                ) from None


def refuse_status(reply: requests.Response, url: str) -> None:
    """Raise for an answer that no second try will change."""
    code = reply.status_code
    if code in (401, 403):
        raise SetupError(
            f"`{url}` is not for everybody (HTTP {code})",
            hint="set HF_TOKEN to a token that may read it (`hf auth login` does the same)",
        )
    if code >= 400:
        raise UnreachableError(
            f"`{url}` is not there (HTTP {code})",
            hint="the set may have moved; `--hub` chooses another hub where a set is on two",
        )


def _reason(err: requests.RequestException) -> str:
    if isinstance(err, requests.Timeout):
        return "no answer in time"
    if isinstance(err, requests.exceptions.SSLError):
        return "no trusted TLS connection"
    return "no connection" if isinstance(err, requests.ConnectionError) else type(err).__name__


def fetch(
    web: Web,
    remote: RemoteFile,
    part: Path,
    target: Path,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """Make `target` the file that the hub lists, continuing `part` if it is there.

    Args:
        web: Connection and stop signal.
        remote: What to fetch.
        part: File of unfinished bytes, on the same disk as `target`.
        target: Where the verified file goes.
        headers: Sent to the hub only, dropped on a redirect to another host.
        advance: Told each time bytes arrive; negative when they had to be thrown away.

    Raises:
        RunError: The hub does not answer, or sends other bytes than it lists.
        SetupError: The disk is full or the folder cannot be written.
        StoppedError: `web.stop` was set; `part` keeps what has arrived.
    """
    for folder in (part.parent, target.parent):
        with named_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    # A part file from before the hub's file changed gives wrong bytes once: then start clean.
    for is_last in (False, True):
        found = _fill(web, remote, part, headers, advance)
        if found == remote.digest or not remote.digest:
            break
        part.unlink()
        advance(-remote.size_bytes)
        if is_last:
            raise RunError(
                f"`{remote.url}` sent {found}, its listing says {remote.digest}",
                hint="nothing was kept; run the same command again, or choose another `--hub`",
            )
    if not remote.digest:
        logger.warning("the hub gives no checksum of `%s`: only its size was checked", remote.path)
    with named_os_errors(target):
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    fsync_folder(target.parent)


def _fill(
    web: Web,
    remote: RemoteFile,
    path: Path,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
) -> str:
    """Append to `path` until it has the listed size; return the digest of all its bytes."""
    patience = Patience(remote.url, web.stop)
    with named_os_errors(path), path.open("ab+", buffering=0) as stream:
        part = _Part(stream, remote, advance)
        while part.size < remote.size_bytes:
            try:
                with web.get(remote.url, headers, from_byte=part.size) as reply:
                    if reply.status_code in RETRY_STATUS:
                        reason, asked_s = f"HTTP {reply.status_code}", asked_wait_s(reply.headers)
                    else:
                        reason, asked_s = part.receive(reply, web.stop, patience), None
            except requests.RequestException as err:
                reason, asked_s = _reason(err), None
            if part.size < remote.size_bytes:
                patience.wait(reason, asked_s)
        return part.hasher.digest()


class _Part:
    """The bytes of one file that have arrived so far, and their running digest."""

    def __init__(self, stream: IO[bytes], remote: RemoteFile, advance: Callable[[int], None]):
        self._stream, self._remote, self._advance = stream, remote, advance
        self.hasher, self.size = Hasher(remote.digest, remote.size_bytes), 0
        stream.seek(0)
        while chunk := stream.read(1 << 20):
            self.hasher.update(chunk)
            self.size += len(chunk)
        if self.size > remote.size_bytes:
            self._restart()

    def _restart(self) -> None:
        self._stream.truncate(0)
        self._advance(-self.size)
        self.hasher, self.size = Hasher(self._remote.digest, self._remote.size_bytes), 0

    def receive(self, reply: requests.Response, stop: threading.Event, patience: Patience) -> str:
        """Append an answer's body; return what to say if bytes are still missing after it."""
        if reply.status_code == 416:  # the hub's file is shorter than the part: not the same file
            self._restart()
            return "HTTP 416"
        refuse_status(reply, self._remote.url)
        if not self._fits(reply):
            return "an answer of the wrong length"
        if reply.status_code == 200 and self.size:  # the server ignored the Range
            self._restart()
        for chunk in reply.iter_content(CHUNK_BYTES):
            if stop.is_set():
                raise StoppedError
            self._stream.write(chunk[: self._remote.size_bytes - self.size])
            self.hasher.update(chunk)
            self.size += len(chunk)
            self._advance(len(chunk))
            patience.reached(self.size)
            if self.size >= self._remote.size_bytes:
                break
        return "an answer cut short"

    def _fits(self, reply: requests.Response) -> bool:
        """Tell whether an answer can be the rest of the file, judging by its headers."""
        size = self._remote.size_bytes
        if reply.status_code == 206:
            return reply.headers.get("Content-Range") == f"bytes {self.size}-{size - 1}/{size}"
        return reply.headers.get("Content-Length", str(size)) == str(size)
