"""`minillm inspect RUN`: how far a run is, how it went, and how to go on."""

import math
import tomllib
from pathlib import Path
from typing import Any

from minillm import paths
from minillm.data.inspect_report import Bars, Report, Table
from minillm.data.tokenizer import fingerprint
from minillm.errors import InputError
from minillm.train.inspect_model import inspect_model
from minillm.train.metrics_file import FILE, read_metrics

_BARS = 10
_PROVENANCE = ("minillm", "commit", "torch", "device", "started")


def inspect_run(run: Path, *, verify: bool = False) -> Report:
    """Describe a run folder; the model that it has is a part of the report.

    Args:
        run: A folder with a `run.toml`.
        verify: Also look at every weight of that model.
    """
    report = Report(run.as_posix(), "run")
    settings = _read_settings(run, report)
    origin = settings.pop("provenance", {})
    rows = _read_rows(run, report)
    stage = _stage(run, origin, settings)
    trained = [row for row in rows if row.get("kind") == "train"]
    is_done = paths.is_complete(run / "final")
    report.facts = {
        "stage": stage,
        "model": str(settings.get("model", "?")),
        "state": "finished" if is_done else "not finished",
        "step": max((row.get("step", 0) for row in rows), default=0),
        **_progress(trained),
        **_evaluations([row for row in rows if row.get("kind") == "eval"]),
        **{name: origin[name] for name in _PROVENANCE if origin.get(name)},
        "data_sha256": origin.get("data_sha256", "?"),
        "fingerprint": origin.get("tokenizer_sha256", "?"),
    }
    _find_bad_losses(trained, report)
    if trained:
        report.bars.append(_curve(trained))
    newest = _checkpoints(run, report)
    model = run / "final" if is_done else newest
    if model is not None:
        report.parts.append(inspect_model(model, verify=verify))
        _check_tokenizer(model, origin, report)
    if is_done:
        report.facts["next"] = f"minillm chat --model {run}"
    elif newest is not None:
        report.facts["resume"] = f"minillm {stage} --resume {run}"
    else:
        report.facts["resume"] = f"minillm {stage} --resume {run} (from step 0: no checkpoint yet)"
    return report


def _read_settings(run: Path, report: Report) -> dict[str, Any]:
    try:
        return tomllib.loads((run / paths.RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        report.problems.append(f"`{paths.RUN_FILE}` is not valid TOML: {err}")
        return {}


def _stage(run: Path, origin: dict[str, Any], settings: dict[str, Any]) -> str:
    words = str(origin.get("argv", "")).split()
    known = [word for word in words[1:2] if word in ("pretrain", "sft")]
    return known[0] if known else run.name.partition("-")[0] or str(settings.get("stage", "?"))


def _read_rows(run: Path, report: Report) -> list[dict[str, Any]]:
    place = run / FILE
    if not place.is_file():
        report.notes.append("it has no `metrics.jsonl` yet")
        return []
    try:
        rows = read_metrics(run)
    except (OSError, UnicodeDecodeError) as err:
        report.problems.append(f"`metrics.jsonl` cannot be read: {err}")
        return []
    num_lines = sum(1 for line in place.read_bytes().splitlines() if line.strip())
    if num_lines > len(rows) + 1:  # one torn line at the end is what a kill leaves
        report.problems.append(
            f"`metrics.jsonl` line {len(rows) + 1} is not JSON, {num_lines - len(rows) - 1} "
            "lines after it are lost"
        )
    return rows


def _progress(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}
    last = rows[-1]
    found = {"last_loss": last.get("loss")}
    found |= {name: last.get(name) for name in ("tokens", "tokens_per_s", "lr")}
    return {name: value for name, value in found.items() if value is not None}


def _evaluations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rated = [row for row in rows if math.isfinite(row.get("bpb", math.nan))]
    if not rated:
        return {}
    best, last = min(rated, key=lambda row: row["bpb"]), rated[-1]
    return {
        "best_bits_per_byte": f"{best['bpb']:.4f} (step {best['step']:,})",
        "last_evaluation": {
            "step": last["step"],
            **{name: last[name] for name in ("loss", "ppl", "bpb") if name in last},
        },
    }


def _find_bad_losses(rows: list[dict[str, Any]], report: Report) -> None:
    bad = [row for row in rows if not math.isfinite(row.get("loss", 0.0))]
    if bad:
        report.problems.append(
            f"the loss is not finite in {len(bad)} lines of the log, first at step {bad[0]['step']}"
        )


def _curve(rows: list[dict[str, Any]]) -> Bars:
    """Return the mean training loss of each tenth of the log."""
    good = [row for row in rows if math.isfinite(row.get("loss", math.nan))]
    bars = []
    for part in range(min(_BARS, len(good))):
        size = len(good) / min(_BARS, len(good))
        piece = good[round(part * size) : round((part + 1) * size)]
        mean = sum(row["loss"] for row in piece) / len(piece)
        bars.append((f"to step {piece[-1]['step']:,}", round(mean, 4)))
    return Bars("training loss", {}, bars)


def _checkpoints(run: Path, report: Report) -> Path | None:
    """List the checkpoints; return the newest complete one."""
    rows, newest = [], None
    folders = sorted(run.glob("checkpoints/step-*"))
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        is_whole = paths.is_complete(folder)
        rows.append([folder.name, f"{size / 1e6:,.1f} MB", is_whole])
        newest = folder if is_whole else newest
        if not is_whole:
            report.problems.append(f"`{folder.relative_to(run)}` was not written to its end")
    if rows:
        report.tables.append(Table("checkpoints", ["name", "size", "complete"], rows))
    left = sorted(run.glob("checkpoints/.step-*.part"))
    if left:
        report.notes.append(
            f"`{left[0].relative_to(run)}` is being written, or is what a kill left; the next "
            "save removes it"
        )
    if (run / "final").is_dir() and not paths.is_complete(run / "final"):
        report.problems.append("`final` was not written to its end")
    return newest


def _check_tokenizer(model: Path, origin: dict[str, Any], report: Report) -> None:
    wanted = origin.get("tokenizer_sha256")
    try:
        found = fingerprint(model)
    except InputError:  # reported with the model
        return
    if wanted and found != wanted:
        report.problems.append(
            f"it was trained with tokenizer {str(wanted)[:12]}…, but `{model.name}` holds "
            f"{found[:12]}…"
        )
