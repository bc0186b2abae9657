"""What the user sees: tables and progress on stderr, results on stdout.

Colour follows `NO_COLOR` and whether the stream is a terminal (Rich decides both). When stderr is
piped, bars become one plain line every few seconds, and fewer as the work goes on.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from minillm.cli.run_view import curve_line, number_line
from minillm.files import human_bytes, human_count, human_time

PLAIN_EVERY_S = 5.0
PLAIN_RARELY_S = 60.0
SLOW = 20  # rates below have a decimal
EXACT = 1_000_000  # below, counts are shown to the digit
AT_ONCE_S = 0.1  # what is reported so early was there before: a run that goes on

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Talk: one line on stderr."""
    err.print(text, markup=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a result table on stdout; numbers go right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def result_table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table: with lines on a terminal, aligned columns where stdout is piped.

    The first column and those in `left` go left, the others right.
    """
    table = Table(header_style="bold", pad_edge=out.is_terminal, collapse_padding=True)
    if not out.is_terminal:
        table.box = None
    for name in columns:
        is_left = name in (columns[0], *left)
        table.add_column(name, justify="left" if is_left else "right", overflow="fold")
    return table


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print names and values on stdout."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _cell(value))
    out.print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


class _Display(RichProgress):
    """A bar with lines below it."""

    lines: Sequence[Text] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar, then the lines."""
        yield from super().get_renderables()
        yield from self.lines


class Bar:
    """The `Progress` of the command line."""

    def __init__(self) -> None:
        self._live: _Display | None = None
        self._id = TaskID(0)
        self._what, self._unit = "", ""
        self._total: float | None = None
        self._done, self._started, self._last_line, self._note = 0.0, 0.0, 0.0, ""
        self._before = 0.0
        self._losses: list[float] = []

    def start(self, what: str, total: float | None, unit: str) -> None:
        """Begin a task."""
        self._what, self._unit, self._total = what, unit, total
        self._done, self._before, self._note, self._losses = 0.0, 0.0, "", []
        self._started = self._last_line = time.monotonic()
        if err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20))
            state = TextColumn("{task.fields[state]}", markup=False)
            self._live = _Display(*columns, state, console=err, refresh_per_second=4)
            self._id = self._live.add_task(what, total=total, state="")
            self._live.start()

    def advance(self, amount: float) -> None:
        """Report more units done."""
        self._done += amount
        now = time.monotonic()
        if now - self._started < AT_ONCE_S:
            self._before += amount
        pause = min(max(PLAIN_EVERY_S, (now - self._started) / 100), PLAIN_RARELY_S)
        if self._live is not None:
            self._live.update(self._id, completed=self._done, state=self._state())
        elif now - self._last_line >= pause:
            self._last_line = now
            say(f"{self._what}: {self._state()}")

    def note(self, text: str) -> None:
        """Show a short status beside the bar."""
        self._note = text

    def numbers(self, values: Mapping[str, float]) -> None:
        """Show the numbers of a run: below the bar with a curve, or in the plain line."""
        self._losses.append(values["loss"])
        if self._live is None:
            self._note = f"loss {values['loss']:.3f}  {number_line(values)}"
            return
        width, is_ascii = err.width, err.options.ascii_only
        self._live.lines = [
            Text(text, no_wrap=True, overflow="ellipsis")
            for text in (
                curve_line(self._losses, width, is_ascii=is_ascii),
                f"  {number_line(values)}",
            )
        ]

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        say(text)

    def finish(self) -> None:
        """End the task with a last line."""
        if self._live is not None:
            self._live.update(self._id, completed=self._done, state=self._state())
            self._live.stop()
            self._live = None
        else:
            say(f"{self._what}: {self._state()}")

    def _state(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-6)
        if not self._total and not self._done:  # nothing is counted, such as what a library does
            return human_time(seconds) + (f"  {self._note}" if self._note else "")
        rate = (self._done - self._before or self._done) / seconds
        parts = [self._amount(self._done)]
        if self._total:
            if self._unit != "bytes" and self._total < EXACT:
                parts[0] = f"{self._done:,.0f}/{self._total:,.0f} {self._unit}"
            else:
                parts[0] += f"/{self._amount(self._total)}"
        if 0 < rate < 1 and self._unit != "bytes":
            parts.append(f"{1 / rate:.1f} s/{self._unit.removesuffix('s')}")
        elif 0 < rate < SLOW and self._unit != "bytes":
            parts.append(f"{rate:.1f} {self._unit}/s")
        else:
            parts.append(f"{self._amount(rate)}/s")
        if self._total and rate > 0 and self._done < self._total:
            parts.append(f"ETA {human_time((self._total - self._done) / rate)}")
        else:
            parts.append(human_time(seconds))
        return "  ".join([*parts, self._note] if self._note else parts)

    def _amount(self, value: float) -> str:
        return human_bytes(value) if self._unit == "bytes" else f"{human_count(value)} {self._unit}"


def progress() -> Any:
    """Return the progress display for a command."""
    return Bar()


def show_run(run: Path, outcome: Any, then: str, stage: str) -> None:
    """Say how a training run ended, and what to type next."""
    state = outcome.state
    if outcome.exit_code:
        say(f"stopped and saved at step {state.step}")
        say(f"hint: `minillm {stage} --resume {run}` continues it")
        return
    facts: dict[str, object] = {"model": f"{run / 'final'}", "report": f"{run / 'report.md'}"}
    if state.last_eval:
        first, last = state.first_eval, state.last_eval
        facts["validation loss"] = f"{first['loss']:.3f} → {last['loss']:.3f}"
        facts["bits per byte"] = f"{first['bpb']:.3f} → {last['bpb']:.3f}"
    facts["speed"] = f"{human_count(state.tokens / max(state.train_seconds, 1e-9))} tokens/s"
    facts["next"] = then
    show_facts(run.name, facts)
