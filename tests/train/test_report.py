"""Reports on one run and on several, finished, stopped and damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.errors import InputError
from minillm.settings import ReportCompareConfig
from minillm.train.report import _notes, report
from minillm.train.run_record import read_run

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a run folder of 100 steps of 1,000 tokens."""

    def write(name: str, model: str, *, rate: float = 500.0, bpb: float = 1.0, **kw: Any) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        steps = kw.pop("steps", 100)
        origin = {"tokenizer_sha256": "t", "data_sha256": "d", "device": "a CPU"} | kw
        lines = [f'model = "{model}"', "[batch]", "sequence_length = 128", "[provenance]"]
        lines += [f'{key} = "{value}"' for key, value in origin.items()]
        (run / "run.toml").write_text("\n".join(lines), encoding="utf-8")
        rows: list[dict[str, Any]] = []
        for step in range(0, steps + 1, 10):
            value = bpb + 2 * (1 - step / 100)  # a straight line down to `bpb`
            if step:
                rows.append(
                    {
                        "kind": "train", "step": step, "loss": value * 2, "tokens": step * 1000,
                        "seconds": step * 1000 / rate, "tokens_per_s": rate, "lr": 1e-3,
                        "grad_norm": 0.5, "mfu": 0.25, "memory_bytes": 2_000_000_000,
                    }
                )  # fmt: skip
            if step % 20 == 0:
                rows.append(
                    {"kind": "eval", "step": step, "loss": value * 2, "ppl": 9.0, "bpb": value}
                )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
        return run

    return write


def cells(text: str, title: str) -> list[list[str]]:
    """Return the rows of the Markdown table below a heading, without its two top lines."""
    lines = text.split(f"## {title}")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_runs_are_compared_at_the_same_tokens_time_and_flops(write: Write, tmp_path: Path) -> None:
    slow = write("slow", "mini_llama3:tiny", rate=500.0, bpb=1.0)
    fast = write("fast", "mini_qwen3_next:tiny", rate=1000.0, bpb=1.2)
    path = report(ReportCompareConfig(runs=(slow, fast), out=tmp_path / "out"))
    assert path == tmp_path / "out" / "report.md"
    text = path.read_text(encoding="utf-8")
    flops = [read_run(run).flops for run in (slow, fast)]
    assert flops[0] < flops[1]
    # both end at 100k tokens; the fast one after 100 s, when the slow one is half way; the slow
    # one's FLOPs are spent by the other at the share that its tokens cost less
    share = flops[0] / flops[1]
    assert cells(text, "Bits per byte at the same cost") == [
        ["slow", "1.0000", "2.0000", "1.0000"],
        ["fast", "1.2000", "1.2000", f"{1.2 + 2 * (1 - share):.4f}"],
    ]
    (slow_row, fast_row) = cells(text, "At the end")
    assert slow_row[:4] == ["slow", "100 (not finished)", "100.0k", "3m20s"]
    assert fast_row[8:] == ["1.0k", "25%", "2.0 GB"]
    picture = imread(path.with_name("curves.png"))
    assert picture.shape[:2] == (825, 1430)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[-1])}) > 50


def test_parameters_come_from_the_model(write: Write) -> None:
    record = read_run(write("a", "mini_deepseekv3:tiny"))
    assert record.params is not None
    assert record.params.total > record.params.active
    assert any("usual vocabulary" in note for note in record.notes)
    assert record.architecture == "mini_deepseekv3"


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"device": "a GPU"}, "The devices differ: times are not comparable."),
        ({"data_sha256": "x"}, "The data differ, and so may the text that was validated on."),
        (
            {"data_sha256": "x", "tokenizer_sha256": "x"},
            "The tokenizers differ: compare bits per byte, and neither loss nor perplexity.",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(write: Write, other: dict[str, str], warning: str) -> None:
    records = [read_run(write(name, "mini_llama3:tiny")) for name in "ab"]
    for record in records:
        record.notes.clear()
    assert _notes(records, "ab") == ""
    records[1].origin |= other
    assert _notes(records, "ab") == f"## Note\n\n- {warning}\n\n"


def test_of_damaged_runs_the_rest_is_shown(write: Write, tmp_path: Path) -> None:
    whole = write("whole", "mini_llama3:tiny")
    torn = write("torn", "mini_llama3:tiny")
    rows = (torn / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows[3:5] = ['{"kind": "train", "st', "7", json.dumps({"kind": "train", "step": 15})]
    rows.append(json.dumps({"kind": "train", "step": 110, "loss": float("nan"), "tokens": 110_000}))
    (torn / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (torn / "run.toml").write_text("model = [", encoding="utf-8")
    empty = write("empty", "no_such_model", steps=0)
    (empty / "metrics.jsonl").unlink()
    config = ReportCompareConfig(runs=(whole, torn, empty), out=tmp_path / "out")
    text = report(config).read_text(encoding="utf-8")
    for line in (
        "- whole: not finished: stopped at step 100, or still running",
        "- torn: 2 lines of `metrics.jsonl` cannot be read and are left out",
        "- torn: `run.toml` cannot be read: ",
        "- torn: the loss is not finite in 1 of 11 lines, first at step 110",
        "- empty: it has no `metrics.jsonl`: there is nothing to draw",
        "- empty: it has no readable `config.json`: parameters and FLOPs are not known",
    ):
        assert line in text, text
    assert "at the same cost" not in text
    for run in (torn, empty):  # alone as well
        assert report(ReportCompareConfig(runs=(run,))) == run / "report.md"
        assert imread(run / "curves.png").size


def test_runs_without_seconds_have_the_time_of_their_speed(write: Write) -> None:
    run = write("old", "mini_llama3:tiny", rate=500.0)
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("seconds", None)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_run(run).axis("seconds")[-1] == pytest.approx(200.0)


def test_experts_are_drawn_where_they_were_measured(write: Write) -> None:
    run = write("moe", "mini_deepseekv3:tiny")
    row = {"kind": "eval", "step": 101, "expert_load": {"layer_1": [1, 1], "layer_2": [0.5, 1.5]}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    text = report(ReportCompareConfig(runs=(run,))).read_text(encoding="utf-8")
    assert "![experts](experts.png)" in text
    assert imread(run / "experts.png").shape[1] == 770


def test_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run below `runs/`"):
        report(ReportCompareConfig())
    with pytest.raises(InputError, match="no run at"):
        report(ReportCompareConfig(runs=(tmp_path,)))
    assert not (tmp_path / "reports").exists()


def test_the_command_writes_below_reports_and_says_where(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(write(f"runs/{name}", "mini_llama3:tiny")) for name in "ab"]
    result = CliRunner().invoke(app, ["report", *runs, runs[0]])
    assert result.exit_code == 0, result.output
    assert result.stdout == "reports/a-vs-b/report.md\n"  # each run once
    assert (tmp_path / "reports" / "a-vs-b" / "curves.png").is_file()
