"""`report.md`: what a run was, how it went, and its curves; and several runs beside each other."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm import paths
from minillm.device import describe
from minillm.errors import InputError
from minillm.files import human_bytes, human_count, human_time, named_os_errors, write_text
from minillm.settings import ReportCompareConfig
from minillm.train.job import Job
from minillm.train.run_charts import draw_comparison, draw_experts, draw_run
from minillm.train.run_record import RunRecord, read_run

REPORTS = Path("reports")
CURVES = "curves.png"
EXPERTS = "experts.png"
_LONGEST = 60  # characters of a folder's name


def report(cfg: ReportCompareConfig) -> Path:
    """Write the report of one run, or of several beside each other.

    Args:
        cfg: The runs; none means the newest one.

    Returns:
        The report, a Markdown file; its pictures are beside it.

    Raises:
        InputError: There is no such run.
    """
    runs = list({run.resolve(): run for run in cfg.runs}.values())
    if not runs:
        newest = paths.latest_run(paths.RUNS, "*")
        if newest is None:
            raise InputError(
                f"no run below `{paths.RUNS}/` to report on", hint="run `minillm pretrain`"
            )
        runs = [newest]
    records = [read_run(run) for run in runs]
    if len(records) == 1:
        return write_run_report(records[0], cfg.out or records[0].path)
    return write_comparison(records, cfg.out or REPORTS / _joint_name(records))


def write_report(job: Job) -> None:
    """Write `report.md` and its pictures into the folder of a run that has just ended."""
    dtype = str(job.dtype).removeprefix("torch.")
    hardware = f"{describe(job.device)}, compute in {dtype}"
    write_run_report(read_run(job.run), job.run, hardware=hardware)


def write_run_report(record: RunRecord, out: Path, *, hardware: str = "") -> Path:
    """Write the report of one run into the folder `out`."""
    hardware = hardware or record.origin.get("device", "?")
    with named_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        draw_run(record, out / CURVES)
        experts = f"![experts]({EXPERTS})\n\n" if draw_experts(record, out / EXPERTS) else ""
        facts = {
            "model": f"`{record.model}`, {_parameters(record)}",
            "hardware": hardware,
            "steps": f"{record.step:,}" + ("" if record.is_finished else " (not finished)"),
            "tokens": f"{int(record.axis('tokens')[-1]):,} in "
            f"{human_time(record.axis('seconds')[-1])} ({human_count(record.speed)} tokens/s"
            + (f", MFU {record.mfu:.0%})" if record.mfu else ")"),
            "memory": f"{human_bytes(record.memory_bytes)} at most",
            **_evaluations(record),
        }
        table = _table(["", ""], [[name, value] for name, value in facts.items()])
        knobs = "".join(f"{line}\n" for line in _flatten(record.settings))
        origin = "".join(f"{name} = {value}\n" for name, value in record.origin.items())
        write_text(
            out / "report.md",
            f"# {record.name}\n\n{table}\n{_notes([record], [record.name])}"
            f"![curves]({CURVES})\n\n{experts}{_evaluation_table(record)}"
            "All numbers are in `metrics.jsonl`; `run.toml` repeats the run.\n\n"
            f"## Settings\n\n```text\n{knobs}```\n\n## Origin\n\n```text\n{origin}```\n",
        )
    return out / "report.md"


def write_comparison(records: Sequence[RunRecord], out: Path) -> Path:
    """Write a report on several runs into the folder `out`."""
    labels = _labels(records)
    made_of, reached = [], []
    for record, label in zip(records, labels, strict=True):
        total, active = (record.params.total, record.params.active) if record.params else (0, 0)
        made_of.append(
            [
                label,
                f"`{record.model}`",
                *(human_count(n) if n else "?" for n in (total, active, record.vocab_size)),
                human_count(record.flops) if record.flops else "?",
                record.origin.get("device", "?"),
            ]
        )
        mfu = f"{record.mfu:.0%}" if record.mfu else "?"
        reached.append(
            [
                label,
                f"{record.step:,}" + ("" if record.is_finished else " (not finished)"),
                human_count(record.axis("tokens")[-1]),
                human_time(record.axis("seconds")[-1]),
                f"{record.axis('flops')[-1]:.2e}",
                *(_number(record.last(key)) for key in ("loss", "ppl", "bpb")),
                human_count(record.speed),
                mfu,
                human_bytes(record.memory_bytes) if record.memory_bytes else "?",
            ]
        )
    columns = ["run", "model", "parameters", "active", "vocabulary", "FLOPs per token", "device"]
    end = ["run", "steps", "tokens", "time", "FLOPs", "val. loss", "ppl", "bits per byte"]
    with named_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        draw_comparison(records, labels, out / CURVES)
        write_text(
            out / "report.md",
            f"# {' · '.join(labels)}\n\n{_table(columns, made_of)}\n## At the end\n\n"
            f"{_table([*end, 'tokens/s', 'MFU', 'memory'], reached)}\n"
            "Time is that of training alone, without evaluations and saving.\n\n"
            f"{_equal_table(records, labels)}{_notes(records, labels)}![curves]({CURVES})\n\n"
            "Each point of a training curve is a mean over a part of the run.\n",
        )
    return out / "report.md"


def _equal_table(records: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """Return bits per byte where all runs have had as many tokens, seconds and FLOPs."""
    known = [record for record in records if len(record.curve("bpb", "step", held_out=True)[1])]
    if len(known) < len(records):
        return ""
    titles, columns = [], []
    for axis, show in (
        ("tokens", human_count),
        ("seconds", human_time),
        ("flops", "{:.2e}".format),
    ):
        place = min(record.curve("bpb", axis, held_out=True)[0][-1] for record in records)
        name = "" if axis == "seconds" else {"flops": " FLOPs"}.get(axis, f" {axis}")
        titles.append(f"after {show(float(place))}{name}")
        columns.append([_number(record.value_at("bpb", axis, place)) for record in records])
    rows = [[label, *cells] for label, *cells in zip(labels, *columns, strict=True)]
    return f"## Bits per byte at the same cost\n\n{_table(['run', *titles], rows)}\n"


def _notes(records: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """Return what is to be known before the numbers are believed."""
    lines = [
        f"- {label}: {note}" if len(records) > 1 else f"- {note}"
        for record, label in zip(records, labels, strict=True)
        for note in record.notes
    ]
    tokenizers = {record.origin.get("tokenizer_sha256", "?") for record in records}
    if len(tokenizers) > 1:
        lines.append(
            "- The tokenizers differ: compare bits per byte, and neither loss nor perplexity."
        )
    elif len({record.origin.get("data_sha256", "?") for record in records}) > 1:
        lines.append("- The data differ, and so may the text that was validated on.")
    devices = {record.origin.get("device", "?") for record in records}
    if len(devices) > 1:
        lines.append("- The devices differ: times are not comparable.")
    return "## Note\n\n" + "\n".join(lines) + "\n\n" if lines else ""


def _parameters(record: RunRecord) -> str:
    if record.params is None:
        return "parameters not known"
    count = record.params
    active = f"{count.active:,} for one token, " if count.active != count.total else ""
    return f"{count.total:,} parameters ({active}{count.embedding:,} in embeddings)"


def _evaluations(record: RunRecord) -> dict[str, str]:
    first, last = (
        {key: find(key) for key in ("loss", "ppl", "bpb")} for find in (record.first, record.last)
    )
    if math.isnan(last["bpb"]):
        return {}
    fall = 1 - last["bpb"] / first["bpb"]
    return {
        "validation loss": f"{first['loss']:.4f} → {last['loss']:.4f} nats per token",
        "validation perplexity": f"{first['ppl']:.1f} → {last['ppl']:.2f}",
        "bits per byte": f"{first['bpb']:.4f} → {last['bpb']:.4f} ({fall:.0%} lower)",
    }


def _evaluation_table(record: RunRecord) -> str:
    steps = [row["step"] for row in record.evaluations if "bpb" in row]
    if not steps:
        return ""
    columns = [[f"{step:,}" for step in steps]]
    for axis, show in (("tokens", human_count), ("seconds", human_time)):
        columns.append([show(float(x)) for x in record.curve("bpb", axis, held_out=True)[0]])
    columns += [
        [_number(x) for x in record.curve(key, "step", held_out=True)[1]]
        for key in ("loss", "ppl", "bpb")
    ]
    rows = [list(row) for row in zip(*columns, strict=False)]
    titles = ["step", "tokens", "time", "val. loss", "ppl", "bits per byte"]
    return f"## Evaluations\n\n{_table(titles, rows)}\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}" if value < 100 else f"{value:,.0f}"


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run, all different."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else f"{record.path.resolve().parent.name}/{name} ({place})"
        for place, (name, record) in enumerate(zip(names, records, strict=True), 1)
    ]


def _joint_name(records: Sequence[RunRecord]) -> str:
    joint = "-vs-".join(record.name for record in records)
    if len(joint) <= _LONGEST:
        return joint
    key = hashlib.sha256(joint.encode()).hexdigest()[:8]
    return f"{len(records)}-runs-{key}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value}")
    return lines
