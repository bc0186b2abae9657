"""Progress of several transfers at once: bytes of each file and of them all.

A transfer runs in its own thread and counts into its own `FileMeter`; the display behind is told
under one lock. A display that can draw a bar per file says so by having `FileProgress`'s methods.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from minillm.log import Progress


@runtime_checkable
class FileProgress(Protocol):
    """What a display with a bar per file offers besides `Progress`."""

    def begin_file(self, name: str, size_bytes: int) -> int:
        """Open a bar; returns its key."""

    def advance_file(self, key: int, amount: int) -> None:
        """Move a bar."""

    def end_file(self, key: int) -> None:
        """Close a bar."""


class FileMeter:
    """Counts the bytes of one file."""

    def __init__(self, meter: "Meter", key: int | None) -> None:
        self._meter, self._key = meter, key

    def advance(self, amount: int) -> None:
        """Bytes arrived; negative when they had to be thrown away."""
        self._meter.tell(self._key, amount, is_new=True)

    def found(self, amount: int) -> None:
        """Bytes of an earlier run were read again; they do not count into the total."""
        self._meter.tell(self._key, amount, is_new=False)


class Meter:
    """Passes the counts of all files on to one display.

    Args:
        progress: The display, whose task counts the bytes of all files.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._files = progress if isinstance(progress, FileProgress) else None

    @contextmanager
    def file(self, name: str, size_bytes: int) -> Iterator[FileMeter]:
        """Count one file for the block."""
        with self._lock:
            key = None if self._files is None else self._files.begin_file(name, size_bytes)
        try:
            yield FileMeter(self, key)
        finally:
            with self._lock:
                if self._files is not None and key is not None:
                    self._files.end_file(key)

    def tell(self, key: int | None, amount: int, *, is_new: bool) -> None:
        """Move the bars."""
        with self._lock:
            if is_new:
                self._progress.advance(amount)
            if self._files is not None and key is not None:
                self._files.advance_file(key, amount)
