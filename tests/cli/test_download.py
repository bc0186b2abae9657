"""`minillm download` from the outside: catalog, dry run, codes, Ctrl-C."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from tests.data.loopback_hub import SLOW_CHUNK, LoopbackHub, running_hub

MINE = "wangkunqing/mini_llm_dataset"
JSONL = "deepctrl/deepctrl-sft-data"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        hub.repos[JSONL]["sft_data_zh.jsonl"] = os.urandom(20 * SLOW_CHUNK)
        yield hub


def download(*args: object) -> Any:
    return CliRunner().invoke(app, ["download", *map(str, args)])


def test_without_a_set_the_catalog_is_data_and_the_hint_is_talk() -> None:
    result = download()
    assert result.exit_code == 0
    assert "fineweb-20pct-bin" in result.stdout
    assert "hint:" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_an_unknown_set_exits_2_with_a_suggestion() -> None:
    result = download("deepctrl-bim")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: no published set is called `deepctrl-bim`",
        "hint: did you mean `deepctrl-bin`?",
    ]


def test_an_unreachable_hub_exits_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("minillm.data.web.FIRST_WAIT_S", 0.01)
    result = download("6", "--out", tmp_path)
    assert result.exit_code == 5
    assert "http://127.0.0.1:9" in result.stderr


def test_a_dry_run_shows_what_would_come(hub: LoopbackHub, tmp_path: Path) -> None:
    result = download("6", "--out", tmp_path / "data", "--dry-run")
    assert result.exit_code == 0
    assert "sft_data_zh.jsonl" in result.stdout
    assert "5.2 MB" in result.stdout
    assert not (tmp_path / "data").exists()


def test_a_run_file_names_the_sets_and_an_argument_beats_it(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    run = tmp_path / "run.toml"
    run.write_text('sets = ["6"]\ndry_run = true\n')
    assert "sft_data_zh" in download("--config", run, "--out", tmp_path / "data").stdout
    assert download("--config", run, "no-such-set").exit_code == 2
