"""A run as its folder tells it: what was trained, how far it is, and its numbers.

Runs that were stopped, or whose files are damaged, tell what they can; what is missing is in
`notes`.
"""

import json
import math
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minillm import paths
from minillm.data.manifest import Manifest, manifest_path
from minillm.errors import InputError, MinillmError
from minillm.models.base import ParamCount, flops_per_token, param_count
from minillm.models.summary import build_on_meta, load_config
from minillm.train.metrics_file import FILE

Floats = npt.NDArray[np.float64]
AXES = ("step", "tokens", "seconds", "flops")
"""What a curve can be drawn over."""


@dataclass(kw_only=True)
class RunRecord:
    """What is known of a run."""

    path: Path
    settings: dict[str, Any]
    origin: dict[str, str]
    """The `[provenance]` of its run file."""
    training: list[dict[str, Any]]
    """Lines of `metrics.jsonl`, in order, each step once."""
    evaluations: list[dict[str, Any]]
    is_finished: bool
    params: ParamCount | None = None
    flops: float = 0.0
    """Of a token in training; 0 when unknown."""
    vocab_size: int = 0
    architecture: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """What was trained: a name, or the architecture of what a fine-tuning began with."""
        name = str(self.settings.get("model", ""))
        return name if name.partition(":")[0] == self.architecture else self.architecture or name

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(max((row["step"] for row in self.training + self.evaluations), default=0))

    @property
    def speed(self) -> float:
        """Tokens per second of training, over the whole run."""
        tokens, seconds = (self.axis(name)[-1] for name in ("tokens", "seconds"))
        return float(tokens / seconds) if seconds else 0.0

    @property
    def mfu(self) -> float:
        """Mean of the lines; 0 when it was not measured."""
        found = [row["mfu"] for row in self.training if "mfu" in row]
        return float(np.mean(found)) if found else 0.0

    @property
    def memory_bytes(self) -> int:
        """The most memory that was logged."""
        return int(max((row.get("memory_bytes", 0) for row in self.training), default=0))

    @cached_property
    def _axes(self) -> dict[str, Floats]:
        """Each axis at the beginning of the run and at every training line."""
        steps, tokens, seconds, flops = [0.0], [0.0], [0.0], [0.0]
        for row in self.training:
            more = row.get("tokens", tokens[-1]) - tokens[-1]
            rate = row.get("tokens_per_s", 0.0)
            steps.append(row["step"])
            tokens.append(tokens[-1] + more)
            # runs before these were logged have the speed of each line
            seconds.append(row.get("seconds", seconds[-1] + (more / rate if rate else 0.0)))
            flops.append(row.get("flops", tokens[-1] * self.flops))
        return dict(zip(AXES, map(np.array, (steps, tokens, seconds, flops)), strict=True))

    def axis(self, name: str) -> Floats:
        """Return an axis of `AXES` at the beginning, and at each training line."""
        return self._axes[name]

    def curve(self, key: str, axis: str, *, held_out: bool) -> tuple[Floats, Floats]:
        """Return places on `axis` and values of `key`, from training or evaluation lines."""
        rows = self.evaluations if held_out else self.training
        rows = [row for row in rows if math.isfinite(row.get(key, math.nan))]
        places = np.interp([row["step"] for row in rows], self.axis("step"), self.axis(axis))
        return places, np.array([row[key] for row in rows], dtype=float)

    def value_at(self, key: str, axis: str, place: float) -> float:
        """Return an evaluation's `key` at a place of `axis`, between two of them if need be.

        NaN where the run has no two evaluations around that place.
        """
        places, values = self.curve(key, axis, held_out=True)
        if not len(places) or not places[0] <= place <= places[-1] * (1 + 1e-9):
            return math.nan
        return float(np.interp(place, places, values))

    def last(self, key: str) -> float:
        """Return `key` of the last evaluation that has it; NaN without one."""
        values = self.curve(key, "step", held_out=True)[1]
        return float(values[-1]) if len(values) else math.nan

    def first(self, key: str) -> float:
        """Return `key` of the first evaluation that has it; NaN without one."""
        values = self.curve(key, "step", held_out=True)[1]
        return float(values[0]) if len(values) else math.nan


def read_run(run: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        InputError: There is no run: neither `run.toml` nor `metrics.jsonl`.
    """
    if not (run / paths.RUN_FILE).is_file() and not (run / FILE).is_file():
        raise InputError(
            f"no run at `{run}`: it has neither `{paths.RUN_FILE}` nor `{FILE}`",
            hint=f"name a folder below `{paths.RUNS}/`",
        )
    notes: list[str] = []
    settings = _read_settings(run, notes)
    origin = settings.pop("provenance", {})
    origin = origin if isinstance(origin, dict) else {}
    rows = _read_rows(run, notes)
    is_finished = paths.is_complete(run / "final")
    record = RunRecord(
        path=run,
        settings=settings,
        origin=origin,
        training=[row for row in rows if row["kind"] == "train"],
        evaluations=[row for row in rows if row["kind"] == "eval"],
        is_finished=is_finished,
        notes=notes,
    )
    _measure_model(record)
    if not is_finished:
        notes.append(f"not finished: stopped at step {record.step:,}, or still running")
    bad = [row["step"] for row in record.training if not math.isfinite(row.get("loss", 0.0))]
    if bad:
        share = f"{len(bad)} of {len(record.training)} lines"
        notes.append(f"the loss is not finite in {share}, first at step {bad[0]:,}")
    return record


def _read_settings(run: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads((run / paths.RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"it has no `{paths.RUN_FILE}`: settings are not known")
    except (OSError, ValueError) as error:
        notes.append(f"`{paths.RUN_FILE}` cannot be read: {error}")
    return {}


def _read_rows(run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines that can be read; of a step that is there twice the later one."""
    try:
        text = (run / FILE).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        notes.append(f"it has no `{FILE}`: there is nothing to draw")
        return []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    num_bad = 0
    for line in text.splitlines():
        try:
            row = _clean(json.loads(line))
            key = (row["kind"], row["step"])
        except (ValueError, TypeError, KeyError, AttributeError):
            num_bad += 1
            continue
        found.pop(key, None)
        found[key] = row
    if num_bad:
        lines = "a line" if num_bad == 1 else f"{num_bad} lines"
        notes.append(
            f"{lines} of `{FILE}` cannot be read and {'is' * (num_bad == 1) or 'are'} left out"
        )
    return sorted(found.values(), key=lambda row: row["step"])


def _data_vocabulary(record: RunRecord) -> int:
    """Return the vocabulary of a run's data; 0 and a note when that is not known."""
    place = manifest_path(Path(str(record.settings.get("data", "?"))))
    if place.is_file():
        return Manifest.read(place).vocab_size
    record.notes.append("nothing is saved yet: parameters and FLOPs are at the usual vocabulary")
    return 0


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    """Return what of a line is as we write it: numbers, and tables of numbers."""
    kept = {name: value for name, value in row.items() if type(value) in (int, float, dict)}
    return kept | {"kind": str(row["kind"]), "step": int(row["step"])}


def _measure_model(record: RunRecord) -> None:
    """Count parameters and FLOPs; by the newest config in the folder, or by the model's name."""
    saved = [record.path / "final", *sorted(record.path.glob("checkpoints/step-*"), reverse=True)]
    sources = [str(folder) for folder in saved if (folder / "config.json").is_file()]
    batch = record.settings.get("batch")
    length = batch.get("sequence_length") if isinstance(batch, dict) else None
    length = length if isinstance(length, int) else 512
    for source in [*sources, str(record.settings.get("model", ""))]:
        try:
            config = load_config(source)
            if source not in sources:  # nothing is saved yet
                config.vocab_size = _data_vocabulary(record) or config.vocab_size
            model = build_on_meta(config)
        except (MinillmError, OSError, ValueError, KeyError, AttributeError):
            continue
        record.params = param_count(model)
        record.architecture = model.config.model_type
        record.vocab_size = model.config.vocab_size
        record.flops = flops_per_token(model, length)
        return
    record.notes.append("it has no readable `config.json`: parameters and FLOPs are not known")
