"""Stop politely: the first SIGINT or SIGTERM asks, the second ends the program at once."""

import signal
import threading
import time
from types import FrameType
from typing import Any

TIME_UP = 75
"""Exit code of a run whose `--max-time` is over: EX_TEMPFAIL, "try again later" (sysexits.h)."""

CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM, TIME_UP)


class StopRequest:
    """While active, remembers what asked to stop: a signal, or the clock.

    >>> with StopRequest() as stop:
    ...     stop.exit_code
    0

    Args:
        time_s: Ask after that many seconds; 0 is never.
    """

    def __init__(self, time_s: float = 0.0) -> None:
        self._code = 0
        self._deadline = time.monotonic() + time_s if time_s else float("inf")
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # a background job of a script
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._deadline = float("inf")

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._code:
            raise KeyboardInterrupt(number)
        self._code = 128 + number

    @property
    def exit_code(self) -> int:
        """0: go on. 130 for Ctrl-C and 143 for SIGTERM, as shells report them; 75: time is up."""
        if not self._code and time.monotonic() >= self._deadline:
            self._code = TIME_UP
        return self._code

    @exit_code.setter
    def exit_code(self, code: int) -> None:
        self._code = code
