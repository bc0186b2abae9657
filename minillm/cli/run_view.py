"""What a run looks like while it trains: a curve of its loss, and its numbers, in 80 columns."""

import itertools
import math
from collections.abc import Mapping, Sequence

from minillm.files import human_bytes, human_count

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*%#"
MIN_CURVE = 2  # values below which there is no curve to draw


def sparkline(values: Sequence[float], width: int, *, is_ascii: bool = False) -> str:
    """Draw a curve in one line: each column the mean of its share of the values.

    >>> sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8)
    '█▇▆▅▄▃▂▁'

    Args:
        values: In order; those that are not finite are left out.
        width: Columns at most.
        is_ascii: For terminals that have no block characters.
    """
    values = [value for value in values if math.isfinite(value)]
    width = min(width, len(values))
    if width < 1:
        return ""
    ends = [len(values) * column // width for column in range(width + 1)]
    means = [
        sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)
    ]  # every column has one: there are no more columns than values
    low, high = min(means), max(means)
    marks = _ASCII if is_ascii else _BLOCKS
    top = len(marks) - 1
    return "".join(marks[round((mean - low) / ((high - low) or 1) * top)] for mean in means)


def curve_line(values: Sequence[float], width: int, *, is_ascii: bool = False) -> str:
    """Return the loss now, and its curve since the beginning, within `width` columns."""
    head = f"  loss {values[-1]:.3f}"
    if len(values) < MIN_CURVE:
        return head
    finite = [value for value in values if math.isfinite(value)]
    tail = f"  {min(finite):.3f} to {max(finite):.3f}" if finite else ""
    curve = sparkline(values, width - len(head) - len(tail) - 2, is_ascii=is_ascii)
    return f"{head}  {curve}{tail}"


def number_line(values: Mapping[str, float]) -> str:
    """Return speed, MFU, learning rate, gradient norm and memory, those that are there."""
    shown = {
        "tokens_per_s": lambda n: f"{human_count(n)} tok/s",
        "mfu": lambda n: f"MFU {n:.0%}",
        "lr": lambda n: f"lr {n:.1e}",
        "grad_norm": lambda n: f"grad {n:.2f}",
        "memory_bytes": human_bytes,
    }
    parts = [show(values[name]) for name, show in shown.items() if name in values]
    return "  ".join(parts)
