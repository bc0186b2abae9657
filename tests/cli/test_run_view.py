"""The display of a run: curve and numbers, on a terminal of 80 columns and piped."""

import math
import re
import subprocess
import sys

import pexpect
import pytest

from minillm.cli.console import Bar
from minillm.cli.run_view import curve_line, number_line, sparkline

NUMBERS = {
    "loss": 3.2141, "tokens_per_s": 412_345.0, "mfu": 0.384, "lr": 1e-3, "grad_norm": 0.4217,
    "memory_bytes": 12_345_678_901,
}  # fmt: skip
RUN = f"""
import time
from minillm.cli.console import progress
from minillm.log import task
bar = progress()
with task(bar, "pretrain", 2000, "steps"):
    bar.advance(1000)  # a resumed run
    for step in range(20):
        time.sleep(0.1)
        bar.advance(1)
        bar.numbers({NUMBERS!r} | {{"loss": 9.0 - step / 4}})
    bar.line("step 1020: validation loss 3.3")
"""


def test_sparkline_is_the_shape_of_the_values() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 8, 8, 0, 0], 3) == "▁█▁"
    assert sparkline([5, 5], 4) == "▁▁"
    assert sparkline([math.nan, 1, math.inf, 2], 4) == "▁█"
    assert sparkline([1, 2], 2, is_ascii=True) == "_#"
    assert sparkline([], 4) == ""
    assert len(sparkline(range(1000), 37)) == 37


@pytest.mark.parametrize("count", [1, 2, 5, 3000])
def test_lines_fit_into_80_columns(count: int) -> None:
    losses = [10.4 - step / 1000 for step in range(count)]
    assert len(curve_line(losses, 80)) <= 80
    assert curve_line(losses, 80).startswith(f"  loss {losses[-1]:.3f}")
    assert number_line(NUMBERS) == "412.3k tok/s  MFU 38%  lr 1.0e-03  grad 0.42  12.3 GB"
    assert len(number_line(NUMBERS)) <= 78
    assert number_line({"loss": 1.0}) == ""


def test_on_a_terminal_three_lines_are_redrawn_in_place() -> None:
    process = pexpect.spawn(
        sys.executable, ["-c", RUN], dimensions=(24, 80), encoding="utf-8", timeout=60
    )
    process.expect(pexpect.EOF)
    raw = process.before
    assert "\x1b[2J" not in raw  # the screen is never cleared
    assert "\x1b[1A" in raw  # the cursor goes up, lines are written over
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 80
    assert "step 1020: validation loss 3.3" in lines
    bar, curve, numbers = [line for line in lines if line.strip()][-3:]
    # 20 steps in 2 s, the 1000 of before do not count: 980 to go are about 100 s
    assert (found := re.search(r" 1,020/2,000 steps {2}(\d+)\.\d steps/s {2}ETA 1m(\d+)s", bar)), (
        bar
    )
    assert 5 <= int(found[1]) <= 10
    assert curve.startswith("  loss 4.250  █")
    assert curve.rstrip().endswith("4.250 to 9.000")
    assert numbers.strip() == number_line(NUMBERS)


def test_piped_there_are_only_plain_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    note, last = done.stderr.splitlines()
    assert note == "step 1020: validation loss 3.3"
    assert last.startswith("pretrain: 1,020/2,000 steps")
    assert last.endswith(f"loss 4.250  {number_line(NUMBERS)}")


def test_what_counts_nothing_shows_only_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.start("learn merges", None, "tokens")
    bar.finish()
    bar.start("count", None, "tokens")
    bar.advance(5)
    bar.finish()
    merging, counting = capsys.readouterr().err.splitlines()
    assert merging == "learn merges: 0 s"
    assert counting.startswith("count: 5 tokens")
