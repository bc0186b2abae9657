"""`minillm prepare-sft` from the command line."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app


def test_it_works_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["prepare-sft"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "data" / "sft.parquet").is_file()
    assert "dropped, too long" in result.output
    assert re.search(r"everyday\W+4,023\W+\d+\.\d%", result.output)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "sft-fill.png",
        "sft-lengths.png",
        "sft.parquet",
    ]


def test_the_mask_of_a_row_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "sft.parquet"
    args = ["prepare-sft", "--out", str(out), "--no-charts", "--no-identity"]
    assert CliRunner().invoke(app, args).exit_code == 0
    before = out.read_bytes()
    result = CliRunner().invoke(app, ["prepare-sft", "--out", str(out), "--show-mask", "3"])
    assert result.exit_code == 0, result.output
    assert "pairs that see each other" in result.output
    assert (tmp_path / "sft-mask-3.png").is_file()
    assert out.read_bytes() == before
    result = CliRunner().invoke(app, ["prepare-sft", "--out", str(out), "--show-mask", "99999"])
    assert result.exit_code == 3
    assert "none is number 99999" in result.output


def test_left_out_lines_are_counted_and_named(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    good = '{"instruction": "问", "input": "", "output": "答", "history": [], "type": "数学"}\n'
    data.write_text(good + "{broken\n" + good.replace("答", "") + good, encoding="utf-8")
    args = ["prepare-sft", "--data", str(data), "--out", str(tmp_path / "s.parquet")]
    args += ["--no-identity", "--no-charts"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 3
    assert "line 2: not JSON" in result.output
    assert "--skip-bad" in result.output
    result = CliRunner().invoke(app, [*args, "--skip-bad"])
    assert result.exit_code == 0, result.output
    assert re.search(r"left out, not JSON\W+1\b", result.output)
    assert re.search(r"left out, empty message\W+1\b", result.output)
    assert f"left out, not JSON: `{data}` line 2" in result.output
    assert re.search(r"数学\W+2\W+100.0%", result.output)


def test_dropped_dialogues_come_with_a_hint(tmp_path: Path) -> None:
    out = tmp_path / "sft.parquet"
    args = ["prepare-sft", "--out", str(out), "--sequence-length", "32", "--no-identity"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "keeps every dialogue" in result.output


def test_a_bad_line_is_an_input_error(tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": []}\n')
    result = CliRunner().invoke(app, ["prepare-sft", "--data", str(data)])
    assert result.exit_code == 3
    assert "line 1: `messages` must be a list" in result.output
    assert "hint:" in result.output
