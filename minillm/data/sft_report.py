"""What `prepare-sft` read, left out and wrote, in numbers and as two pictures."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from minillm import charts
from minillm.data.sft_scan import Rejected

MAX_TYPES = 16
"""Types shown by name."""

_BINS = 64

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class SftReport:
    """What `prepare_sft` read, dropped and wrote."""

    path: Path
    num_read: int
    """Dialogues and other lines in the files."""
    num_identity: int
    """Dialogues made of the identity templates."""
    rejected: Rejected
    """Lines that are no dialogue, by reason."""
    num_sampled_out: int
    """Left out by `max_dialogues`."""
    num_never_encoded: int
    """Of these, those whose length is not known."""
    num_too_long: int
    """Dropped, longer than a row."""
    num_too_short: int
    """Dropped, shorter than `min_tokens`."""
    longest: int
    """Tokens of the longest dialogue that was encoded, dropped or not."""
    num_dialogues: int
    """Written."""
    num_multi_turn: int
    """Of these, those with several answers."""
    num_rows: int
    sequence_length: int
    packed: bool
    num_tokens: int
    num_label_tokens: int
    lengths: Ints
    """How many dialogues have 0, 1, … `sequence_length` tokens."""
    row_lengths: Ints
    """How many rows have."""
    by_type: dict[str, int]
    """Dialogues written, by type, the most frequent first."""
    charts: list[Path] = field(default_factory=list)
    """The pictures, beside the file."""
    seconds: float = 0.0

    @property
    def num_rejected(self) -> int:
        """Lines that are no dialogue."""
        return self.rejected.counts.total()

    @property
    def fill(self) -> float:
        """Share of `num_rows * sequence_length` that is tokens."""
        return self.num_tokens / (self.num_rows * self.sequence_length)


def draw_charts(report: SftReport) -> list[Path]:
    """Draw lengths and fill beside the parquet: `NAME-lengths.png`, `NAME-fill.png`."""
    stem = report.path.with_suffix("")
    places = [stem.with_name(f"{stem.name}-{what}.png") for what in ("lengths", "fill")]
    with charts.figure(11, 4.5) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_lengths(left, report)
        _draw_types(right, report)
        charts.save_png(figure, places[0])
    with charts.figure(11, 4) as figure:
        left, right = figure.subplots(1, 2)
        _draw_fill(left, report)
        _draw_shares(right, report)
        charts.save_png(figure, places[1])
    return places


def _binned(counts: Ints, num_bins: int) -> tuple[Ints, Ints]:
    """Return the left edges and the sums of about `num_bins` equal parts of `counts`."""
    width = max(1, len(counts) // num_bins)
    edges = np.arange(0, len(counts), width)
    return edges, np.add.reduceat(counts, edges)


def _draw_lengths(axes: Axes, report: SftReport) -> None:
    edges, sums = _binned(report.lengths, _BINS)
    axes.bar(edges, sums, width=edges[1] - edges[0], align="edge")
    below = np.cumsum(report.lengths)
    median = int(np.searchsorted(below, below[-1] / 2))
    mean = report.num_tokens / report.num_dialogues
    axes.axvline(median, color="C1", label=f"median {median}")
    axes.axvline(mean, color="C3", linestyle="--", label=f"mean {mean:.0f}")
    axes.set_title(f"Lengths of {report.num_dialogues:,} dialogues")
    axes.set_xlabel("tokens")
    axes.set_ylabel("dialogues")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _draw_types(axes: Axes, report: SftReport) -> None:
    names, counts = list(report.by_type), list(report.by_type.values())
    labels = charts.readable(names)[:MAX_TYPES]
    counts = counts[:MAX_TYPES]
    if len(names) > MAX_TYPES:
        labels.append(f"{len(names) - MAX_TYPES} more")
        counts.append(report.num_dialogues - sum(counts))
    bars = axes.barh(range(len(labels)), counts)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_title("Dialogues by type")


def _draw_fill(axes: Axes, report: SftReport) -> None:
    edges, sums = _binned(report.row_lengths, _BINS)
    length = report.sequence_length
    axes.bar(edges / length, sums, width=(edges[1] - edges[0]) / length, align="edge")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, 1 + 1 / _BINS)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"Fill of {report.num_rows:,} rows of {length:,} tokens")
    axes.set_xlabel("share of the row that is tokens")
    axes.set_ylabel("rows (logarithmic)")


def _draw_shares(axes: Axes, report: SftReport) -> None:
    alone = report.num_tokens / (report.num_dialogues * report.sequence_length)
    names, shares = ["one dialogue a row"], [alone]
    if report.packed:
        names.append("packed, as written")
        shares.append(report.fill)
    learned = report.num_label_tokens / report.num_tokens
    names = [f"{name}\n{share:.2%} full" for name, share in zip(names, shares, strict=True)]
    asked = [share * (1 - learned) for share in shares]
    axes.barh(names, [share * learned for share in shares], label="learned")
    axes.barh(names, asked, left=[share * learned for share in shares], label="asked")
    axes.barh(names, [1 - s for s in shares], left=shares, color="0.85", label="padding")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("What the places of a row hold")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
