"""`report.md`: what a run was, how it went, and its curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm import charts
from minillm.device import describe, peak_memory_bytes
from minillm.files import human_bytes, human_count, human_time, write_text
from minillm.models.base import param_count
from minillm.train.job import Job
from minillm.train.metrics import read_metrics
from minillm.train.state import TrainState

CURVES = "curves.png"


def write_report(job: Job, state: TrainState, settings: Mapping[str, Any]) -> None:
    """Write `report.md` and `curves.png` into the run's folder."""
    rows = read_metrics(job.run)
    draw_curves(rows, job.run / CURVES)
    count = param_count(job.model)
    speed = state.tokens / max(state.train_seconds, 1e-9)
    facts = {
        "model": f"`{job.model.config.model_type}`, {count.total:,} parameters "
        f"({count.embedding:,} in embeddings)",
        "hardware": f"{describe(job.device)}, compute in {str(job.dtype).removeprefix('torch.')}",
        "steps": f"{state.step:,} of {job.total_steps:,}",
        "tokens": f"{state.tokens:,} in {human_time(state.train_seconds)} "
        f"({human_count(speed)} tokens/s)",
        "memory": f"{human_bytes(peak_memory_bytes(job.device))} at most",
        **_evaluations(state),
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    knobs = "".join(f"{line}\n" for line in _flatten(settings))
    text = (
        f"# {job.run.name}\n\n| | |\n|---|---|\n{table}\n![curves]({CURVES})\n\n"
        f"All numbers are in `metrics.jsonl`; `run.toml` repeats the run.\n\n"
        f"## Settings\n\n```text\n{knobs}```\n"
    )
    write_text(job.run / "report.md", text)


def _evaluations(state: TrainState) -> dict[str, str]:
    first, last = state.first_eval, state.last_eval
    if not last:
        return {}
    fall = 1 - last["bpb"] / first["bpb"]
    return {
        "validation loss": f"{first['loss']:.4f} → {last['loss']:.4f} nats per token",
        "validation perplexity": f"{first['ppl']:.1f} → {last['ppl']:.2f}",
        "bits per byte": f"{first['bpb']:.4f} → {last['bpb']:.4f} ({fall:.0%} lower)",
    }


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value}")
    return lines


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, learning rate and speed over steps as one PNG."""
    training = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "eval"]
    with charts.figure(9, 6) as figure:
        (loss, bpb), (rate, speed) = figure.subplots(2, 2)
        _line(loss, training, "loss", "training")
        _line(loss, held_out, "loss", "validation", marker="o")
        loss.legend()
        _titled(loss, "loss (nats per token)")
        _line(bpb, held_out, "bpb", "validation", marker="o")
        _titled(bpb, "bits per byte (validation)")
        _line(rate, training, "lr", "learning rate")
        _titled(rate, "learning rate (AdamW)")
        _line(speed, training, "tokens_per_s", "tokens/s")
        speed.set_ylim(bottom=0)
        _titled(speed, "tokens per second")
        charts.save_png(figure, path)


def _line(axes: Any, rows: list[dict[str, Any]], key: str, label: str, marker: str = "") -> None:
    steps = [row["step"] for row in rows if key in row]
    axes.plot(steps, [row[key] for row in rows if key in row], label=label, marker=marker, ms=3)


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
