"""`minillm prepare-sft` from the command line."""

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
    assert "everyday 4,023" in result.output


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
