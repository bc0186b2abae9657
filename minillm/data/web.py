"""HTTP GET with time-outs, patience, and a way to make every transfer stop at once."""

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from minillm.errors import RunError, SetupError
from minillm.log import logger

TIMEOUT_S = (10.0, 30.0)  # to connect; between two reads
TRIES = 8  # waits add up to about a minute: a router restarts in that time
LIST_TRIES = 5
FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
LONGEST_WAIT_S = 600.0  # a hub's rate window is five minutes
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class StoppedError(Exception):
    """Another file failed or the user pressed Ctrl-C: leave without a word."""


class UnreachableError(RunError):
    """No answer, or none of use, after every try."""


@dataclass(slots=True)
class Patience:
    """Waits between tries, longer each time, and gives up after some failures in a row."""

    url: str
    stop: threading.Event
    tries: int = TRIES
    failures: int = 0
    farthest: int = 0

    def wait(self, reason: str, asked_s: float | None = None) -> None:
        """Sleep before the next try, as long as the server asked for, if it did.

        Raises:
            UnreachableError: This was the last try.
            StoppedError: The download was stopped meanwhile.
        """
        self.failures += 1
        if self.failures >= self.tries:
            raise UnreachableError(
                f"{reason} from `{self.url}`, {self.tries} times in a row",
                hint="run the same command again later: it continues where it stopped",
            )
        backoff_s = min(FIRST_WAIT_S * 2 ** (self.failures - 1), LONGEST_BACKOFF_S)
        backoff_s *= random.uniform(0.75, 1.25)
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
    _open: set[requests.Response] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Ask for raw bytes, so that sizes and checksums mean the file itself."""
        self.session.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=16))

    def halt(self) -> None:
        """Make every transfer end now, also one that waits for a silent server."""
        self.stop.set()
        for reply in list(self._open):
            with contextlib.suppress(Exception):  # it may be closing by itself
                reply.raw.shutdown()

    @contextlib.contextmanager
    def body(
        self, url: str, headers: Mapping[str, str], from_byte: int
    ) -> Iterator[requests.Response]:
        """Send one GET whose body `halt` can interrupt."""
        with self.get(url, headers, from_byte=from_byte) as reply:
            self._open.add(reply)
            try:
                yield reply
            finally:
                self._open.discard(reply)

    def get(
        self, url: str, headers: Mapping[str, str], *, from_byte: int = 0, stream: bool = True
    ) -> requests.Response:
        """Send one GET; `from_byte` > 0 asks for the rest of a file."""
        wanted = {"Range": f"bytes={from_byte}-"} if from_byte else {}
        return self.session.get(
            url, headers={**headers, **wanted}, timeout=TIMEOUT_S, stream=stream
        )

    def get_json(
        self, url: str, headers: Mapping[str, str], *, retry_too: Set[int] = frozenset()
    ) -> tuple[Any, requests.Response]:
        """Fetch and parse JSON, trying again on busy and broken answers.

        Args:
            url: Where it is.
            headers: Sent to the hub only, dropped on a redirect to another host.
            retry_too: Codes that are worth another try here, though they seldom are.

        Raises:
            UnreachableError: The hub does not answer, or not with JSON.
        """
        patience = Patience(url, self.stop, LIST_TRIES)
        while True:
            try:
                reply = self.get(url, headers, stream=False)
            except requests.RequestException as err:
                patience.wait(reason_of(err))
                continue
            if reply.status_code in RETRY_STATUS | retry_too:
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
            hint="set HF_TOKEN (for ModelScope: MODELSCOPE_API_TOKEN) to a token that may read it",
        )
    if code >= 400:
        raise UnreachableError(
            f"`{url}` is not there (HTTP {code})",
            hint="the set may have moved; `--hub` chooses another hub where a set is on two",
        )


def reason_of(err: requests.RequestException) -> str:
    """Say in a few words why there was no answer."""
    if isinstance(err, requests.Timeout):
        return "no answer in time"
    if isinstance(err, requests.exceptions.SSLError):
        return "no trusted TLS connection"
    return "no connection" if isinstance(err, requests.ConnectionError) else type(err).__name__
