"""`minillm download` from the outside: catalog, dry run, codes, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from tests.data.loopback_hub import SLOW_CHUNK, Fault, LoopbackHub, running_hub

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
    monkeypatch.setattr("minillm.data.fetch.FIRST_WAIT_S", 0.01)
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


def test_ctrl_c_keeps_what_has_arrived(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults["sft_data_zh.jsonl"] = [Fault("slow")]
    out = tmp_path / "data"
    part = out / ".downloads/deepctrl-jsonl/parts/sft_data_zh.jsonl.part"
    command = [sys.executable, "-m", "minillm", "download", "6", "--out", str(out)]
    # a script's background job ignores SIGINT, and so would the command
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > SLOW_CHUNK):
            assert time.monotonic() < deadline, "no bytes arrived"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "the same command continues" in said
    assert "Traceback" not in said
    kept = part.stat().st_size

    hub.forget()
    assert download("6", "--out", out).exit_code == 0
    assert (out / "dialogues/sft_data_zh.jsonl").read_bytes() == hub.repos[JSONL][
        "sft_data_zh.jsonl"
    ]
    assert [request.range for request in hub.bodies()] == [f"bytes={kept}-"]
