"""The display of a download: counts stay right with many threads, and per-file bars are drawn."""

import io
import threading

import pytest
from rich.console import Console

from minillm.cli import console
from minillm.cli.transfers import Transfers
from minillm.data.meter import FileProgress, Meter
from minillm.data.threads import run_all


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(console, "err", terminal)
    return stream


def test_a_bar_for_the_whole_and_one_for_each_file(screen: io.StringIO) -> None:
    bars = Transfers()
    assert isinstance(bars, FileProgress)
    bars.start("download x", 6_000_000, "bytes")
    meter = Meter(bars)
    with meter.file("4_5/a-name-that-is-longer-than-its-column.parquet", 9_000_000) as file:
        file.found(3_000_000)
        file.advance(2_000_000)
        bars._live.refresh()  # type: ignore[union-attr]
    with meter.file("small", 10) as file:
        file.advance(10)
    bars.finish()
    seen = screen.getvalue()
    assert "longer-than-its-column.parquet" in seen
    assert "5.0 MB/9.0 MB" in seen  # what was there already counts for the file
    assert "2.0 MB/6.0 MB" in seen  # but not for the whole
    assert "2 files" in seen
    assert "small" not in seen


def test_counts_of_many_threads_add_up() -> None:
    class Sum:
        total = 0

        def advance(self, amount: float) -> None:
            before = self.total
            threading.Event().wait(0)  # let another thread run in between
            self.total = before + int(amount)

    told = Sum()
    meter = Meter(told)  # type: ignore[arg-type]

    def job() -> None:
        with meter.file("x", 50) as file:
            for _ in range(50):
                file.advance(1)

    run_all([job] * 8, 8, lambda: None)
    assert told.total == 400


def test_the_first_error_stops_the_rest() -> None:
    ran, halted = [], threading.Event()

    def fail() -> None:
        raise ValueError("first")

    def wait() -> None:
        halted.wait(10)
        ran.append("waiting job ended")

    def late() -> None:
        ran.append("late job")

    with pytest.raises(ValueError, match="first"):
        run_all([wait, fail, *[late] * 20], 2, halted.set)
    assert ran.count("waiting job ended") == 1
    assert "late job" not in ran
