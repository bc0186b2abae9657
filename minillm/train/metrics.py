"""Numbers of a run, as they come: `metrics.jsonl` and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from minillm.files import write_text
from minillm.train.state import TrainState

FILE = "metrics.jsonl"


class MetricLog:
    """Append metric lines; on resume, first drop the lines after the checkpoint's step.

    A killed run has logged steps that its last checkpoint does not hold. They are computed again,
    bit for bit, so the file of a resumed run has each step once.
    """

    def __init__(self, run: Path, state: TrainState) -> None:
        self._path = run / FILE
        if self._path.is_file():
            last = {"train": state.step, "eval": state.eval_step}
            rows = [row for row in read_metrics(run) if row["step"] <= last[row["kind"]]]
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = self._path.open("a", encoding="utf-8")
        purge = state.step + 1 if state.step else None
        self._board = SummaryWriter(str(run), purge_step=purge)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log one line of `kind` (`train` or `eval`)."""
        row = {"kind": kind, "step": step, **values}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def write_text(self, tag: str, step: int, text: str) -> None:
        """Log a sample to TensorBoard."""
        self._board.add_text(tag, text, step)

    def close(self) -> None:
        """Flush both."""
        self._stream.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; a line cut off by a kill is left out."""
    rows = []
    for line in (run / FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
