"""Numbers of a run, as they come: `metrics.jsonl`, TensorBoard events, an experiment tracker.

A model may measure vectors beside scalars, e.g. `expert_load/layer_3`: one number for each expert
of a layer. Of those the file keeps the largest and smallest of all layers, and at evaluations the
whole, rounded; TensorBoard shows every layer, and a heat map.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from minillm.files import named_os_errors, write_text
from minillm.train.heatmap import draw_heatmap
from minillm.train.metrics_file import FILE
from minillm.train.metrics_file import read_metrics as read_metrics
from minillm.train.state import TrainState
from minillm.train.trackers import open_tracker

Vectors = Mapping[str, list[float]]

IDLE = 0.01
"""Of two loads the ratio is taken; an expert that gets nothing counts as this."""


class MetricLog:
    """Append metric lines; on resume, first drop the lines after the checkpoint's step.

    A killed run has logged steps that its last checkpoint does not hold. They are computed again,
    bit for bit, so the file of a resumed run has each step once.

    Args:
        run: The run's folder.
        state: Where the run is.
        tracker: Experiment tracker to send the numbers to as well, or `none`.
    """

    def __init__(self, run: Path, state: TrainState, tracker: str = "none") -> None:
        self._path = run / FILE
        if self._path.is_file():
            last = {"train": state.step, "eval": state.eval_step}
            rows = [row for row in read_metrics(run) if row["step"] <= last[row["kind"]]]
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = self._path.open("a", encoding="utf-8")
        threading.excepthook = _leave_out_os_errors
        purge = state.step + 1 if state.step else None
        self._board = SummaryWriter(str(run), purge_step=purge)
        self._tracker = open_tracker(tracker, run)
        self._vectors: Vectors = {}

    def write(
        self, kind: str, step: int, values: Mapping[str, float], vectors: Vectors | None = None
    ) -> None:
        """Log one line of `kind` (`train` or `eval`).

        Args:
            kind: `train` or `eval`.
            step: Optimizer steps done.
            values: Numbers by name.
            vectors: Numbers by name and place, `group/place`; the last ones given are drawn at the
                next evaluation.
        """
        row = {"kind": kind, "step": step, **values}
        scalars = {f"{kind}/{name}": value for name, value in values.items()}
        if vectors:
            self._vectors = vectors
            row |= _extremes(vectors)
            scalars |= _spreads(vectors)
        if kind == "eval":
            for group, table in _tables(self._vectors).items():
                row[group] = {
                    place: [round(n, 3) for n in numbers] for place, numbers in table.items()
                }
                image = draw_heatmap(table, f"{group.replace('_', ' ')}, step {step:,}")
                self._board.add_image(group, image, step, dataformats="HWC")
        with named_os_errors(self._path):
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        self._tracker.log(step, scalars)

    def write_text(self, tag: str, step: int, text: str) -> None:
        """Log a sample to TensorBoard."""
        self._board.add_text(tag, text, step)

    def close(self) -> None:
        """Flush all."""
        with named_os_errors(self._path):
            self._stream.close()
            self._board.close()
        self._tracker.finish()


def _leave_out_os_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread when the disk is full: `write` says so."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def split_metrics(metrics: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the scalars and the vectors that a model measured, copied from the device at once."""
    if not metrics:
        return {}, {}
    flat = torch.cat([value.detach().float().flatten() for value in metrics.values()]).tolist()
    scalars: dict[str, float] = {}
    vectors: dict[str, list[float]] = {}
    start = 0
    for name, value in metrics.items():
        part = flat[start : start + value.numel()]
        start += value.numel()
        if value.ndim == 0:
            scalars[name] = part[0]
        else:
            vectors[name] = part
    return scalars, vectors


def _tables(vectors: Vectors) -> dict[str, dict[str, list[float]]]:
    """Return vectors by group and place; what is zero everywhere was not measured yet."""
    tables: dict[str, dict[str, list[float]]] = {}
    for name, numbers in vectors.items():
        group, _, place = name.partition("/")
        tables.setdefault(group, {})[place] = numbers
    return {name: table for name, table in tables.items() if any(map(any, table.values()))}


def _extremes(vectors: Vectors) -> dict[str, float]:
    """Return the largest and the smallest number of each group, over all places."""
    found = {}
    for group, table in _tables(vectors).items():
        found[f"{group}_max"] = max(max(numbers) for numbers in table.values())
        found[f"{group}_min"] = min(min(numbers) for numbers in table.values())
    return found


def _spreads(vectors: Vectors) -> dict[str, float]:
    """Return largest, smallest, and their ratio, for each place of each group."""
    found = {}
    for group, table in _tables(vectors).items():
        for place, numbers in table.items():
            low, high = min(numbers), max(numbers)
            found[f"{group}_max/{place}"] = high
            found[f"{group}_min/{place}"] = low
            found[f"{group}_max_to_min/{place}"] = high / max(low, IDLE)
    return found
