"""Talk goes to stderr: logging, and one progress protocol for every long step.

Code below the `cli` never prints. It reports through a `Progress`, which draws a bar on a
terminal, prints a plain line now and then when piped, and is silent by default.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger("minillm")


class Progress(Protocol):
    """What a long step tells about itself."""

    def start(self, what: str, total: float | None, unit: str) -> None:
        """Begin a task of `total` units (`None`: unknown), e.g. ("tokenize", 1e6, "bytes")."""

    def advance(self, amount: float) -> None:
        """Report `amount` more units done."""

    def note(self, text: str) -> None:
        """Show a short status beside the bar."""

    def numbers(self, values: Mapping[str, float]) -> None:
        """Show what a training run measures, as in a line of `metrics.jsonl`."""

    def line(self, text: str) -> None:
        """Print a line that stays."""

    def finish(self) -> None:
        """End the task."""


class Silent:
    """A Progress that shows nothing."""

    def start(self, what: str, total: float | None, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def numbers(self, values: Mapping[str, float]) -> None:
        """Ignore."""

    def line(self, text: str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


@contextmanager
def task(progress: Progress, what: str, total: float | None, unit: str) -> Iterator[None]:
    """Run a block as one progress task, finished even if it raises."""
    progress.start(what, total, unit)
    try:
        yield
    finally:
        progress.finish()
