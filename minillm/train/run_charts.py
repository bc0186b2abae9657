"""Curves of runs as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, LogFormatter

from minillm import charts
from minillm.train.run_record import Floats, RunRecord

_SMOOTH = 60  # points that a curve is smoothed to
_EXTRAS = ("mtp_loss", "sequence_aux_loss", "router_loss")
_HOUR, _MINUTE = 3_600.0, 60.0


def draw_run(record: RunRecord, path: Path) -> None:
    """Draw loss, bits per byte, learning rate, speed, gradient norm and what else was measured."""
    with charts.figure(12, 6) as figure:
        loss, bpb, rate, speed, norm, extra = figure.subplots(2, 3).flat
        _line(loss, record, "loss", "training")
        _line(loss, record, "loss", "validation", held_out=True)
        _titled(loss, "loss (nats per token)")
        _line(bpb, record, "bpb", "validation", held_out=True)
        _titled(bpb, "bits per byte (validation)")
        _line(rate, record, "lr", "learning rate")
        _titled(rate, "learning rate (AdamW)")
        _line(speed, record, "tokens_per_s", "tokens/s")
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter(EngFormatter(sep=""))
        _titled(speed, "tokens per second")
        _line(norm, record, "grad_norm", "gradient norm")
        norm.set_yscale("log")
        for set_formatter in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
            set_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))  # no `$` of mathtext
        _titled(norm, "gradient norm before clipping")
        for key in _EXTRAS:
            _line(extra, record, key, key.replace("_", " "))
        _line(extra, record, "expert_load_max", "busiest expert (1 = even)")
        _line(extra, record, "expert_load_min", "idlest expert (1 = even)")
        if extra.lines:
            extra.set_ylim(0, 1.5 * extra.get_ylim()[1])  # room for the names
            _titled(extra, "further losses, balance of experts")
        else:
            _line(extra, record, "mfu", "MFU")
            extra.set_ylim(bottom=0)
            _titled(extra, "MFU")
        charts.save_png(figure, path)


def draw_experts(record: RunRecord, path: Path) -> bool:
    """Draw the load of the experts of each layer over the run; return whether there is any."""
    rows = [row for row in record.evaluations if isinstance(row.get("expert_load"), dict)]
    if not rows:
        return False
    layers = list(rows[-1]["expert_load"])
    shape = [len(load) for load in rows[-1]["expert_load"].values()]
    rows = [r for r in rows if [len(load) for load in r["expert_load"].values()] == shape]
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    with charts.figure(3 * columns + 1, 2.2 * lines + 0.6) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, layer in zip(panels.flat, layers, strict=False):
            known = [row for row in rows if layer in row["expert_load"]]
            table = np.array([row["expert_load"][layer] for row in known])
            axes.plot([row["step"] for row in known], table, lw=1)
            axes.axhline(1.0, color="black", lw=0.8, ls=":")
            axes.set_title(layer.replace("_", " "))
        for axes in list(panels.flat)[len(layers) :]:
            axes.set_visible(False)
        figure.suptitle("load of each expert (1 = even) over steps")
        charts.save_png(figure, path)
    return True


def draw_comparison(records: Sequence[RunRecord], labels: Sequence[str], path: Path) -> None:
    """Draw training loss and validation bits per byte over tokens, time and FLOPs."""
    longest = max(float(record.axis("seconds")[-1]) for record in records)
    unit, word = next(
        (size, word)
        for size, word in ((_HOUR, "hours"), (_MINUTE, "minutes"), (1.0, "seconds"))
        if longest > 2 * size or size == 1.0
    )
    axes_shown = (("tokens", 1.0, "tokens"), ("seconds", unit, word), ("flops", 1.0, "FLOPs"))
    with charts.figure(13, 7.5) as figure:
        panels = figure.subplots(2, 3, sharey="row")
        for row, (key, held_out, title) in enumerate(
            (("loss", False, "training loss (nats per token)"), ("bpb", True, "bits per byte"))
        ):
            for axes, (axis, scale, name) in zip(panels[row], axes_shown, strict=True):
                for record, label in zip(records, charts.readable(labels), strict=True):
                    places, values = record.curve(key, axis, held_out=held_out)
                    marker = "o" if held_out else ""
                    axes.plot(
                        *_smooth(places / scale, values, held_out), label=label, marker=marker, ms=3
                    )
                axes.set_title(f"{title} over {name}" if axis == "tokens" else f"over {name}")
                axes.set_xlabel(name)
                if axis != "seconds":
                    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            _focus(panels[row][0])
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
        charts.save_png(figure, path)


def _line(axes: Any, record: RunRecord, key: str, label: str, *, held_out: bool = False) -> None:
    places, values = record.curve(key, "step", held_out=held_out)
    if len(values):
        axes.plot(places, values, label=label, marker="o" if held_out else "", ms=3)


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    if len(axes.lines) > 1:
        axes.legend(fontsize=8)


def _smooth(places: Floats, values: Floats, is_exact: bool) -> tuple[Floats, Floats]:
    """Return means over equal parts of a long curve."""
    if is_exact or len(values) <= _SMOOTH:
        return places, values
    parts = np.array_split(np.arange(len(values)), _SMOOTH)
    means = [(float(places[part].mean()), float(values[part].mean())) for part in parts]
    return np.array([p for p, _ in means]), np.array([v for _, v in means])


def _focus(axes: Any) -> None:
    """Leave the steep beginning out of the picture, where it would hide the differences."""
    curves = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
    if not curves:
        return
    low = min(float(np.min(curve)) for curve in curves)
    high = max(float(np.max(curve[len(curve) // 10 :])) for curve in curves)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
