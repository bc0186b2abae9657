"""Experiment trackers: imported only when asked for; what is sent arrives, offline."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm.errors import ConfigError, RunError, SetupError
from minillm.settings import PretrainConfig, ReportConfig
from minillm.train.metrics import MetricLog
from minillm.train.state import TrainState
from minillm.train.trackers import NoTracker, open_tracker

NAMES = ("wandb", "swanlab", "trackio")
RECORDER = """
import json, os
def _note(*words, **more):
    with open(os.environ["RECORD"], "a") as stream:
        stream.write(json.dumps([*words, more]) + "\\n")
def init(**options): _note("init", **options)
def log(values, step): _note("log", values, step=step)
def finish(): _note("finish")
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with settings."""
    folder = tmp_path / "pretrain-mini_llama3-1"
    folder.mkdir()
    (folder / "run.toml").write_text('model = "mini_llama3"\n[optim]\nlr = 0.001\n', "utf-8")
    return folder


def log_two_lines(run: Path, tracker: str, state: TrainState | None = None) -> None:
    log = MetricLog(run, state or TrainState(), tracker)
    log.write("train", 10, {"loss": 5.0, "lr": 1e-3}, {"expert_load/layer_1": [0.5, 1.5]})
    log.write("eval", 10, {"bpb": 2.0})
    log.close()


def test_a_run_imports_no_tracker() -> None:
    code = "import sys, minillm.train.loop, minillm.cli.pretrain; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'minillm.train.trackers'" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_before_anything_begins(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SetupError) as caught:
        PretrainConfig(report=ReportConfig(tracker=name))
    assert str(caught.value) == f"`--tracker {name}`: the package `{name}` is not installed"
    assert caught.value.hint == f"run `pip install {name}`, or leave `--tracker` out"


def test_unknown_and_none(run: Path) -> None:
    assert isinstance(open_tracker("none", run), NoTracker)
    with pytest.raises(ConfigError, match="there is no tracker `mlflow`"):
        open_tracker("mlflow", run)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_under_the_same_name(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(RECORDER, encoding="utf-8")
    record = tmp_path / "calls.jsonl"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("RECORD", str(record))
    log_two_lines(run, name)
    log_two_lines(run, name, TrainState(step=10, eval_step=10))
    monkeypatch.delitem(sys.modules, name)
    calls = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"] * 2
    assert calls[0] == calls[4]  # the same id
    options = calls[0][1]
    assert options["config"] == {"model": "mini_llama3", "optim": {"lr": 0.001}}
    assert options["resume"] == "allow"
    sent = {"train/loss": 5.0, "train/lr": 1e-3, "expert_load_max/layer_1": 1.5}
    assert sent.items() <= calls[1][1].items()
    assert calls[2][1:] == [{"eval/bpb": 2.0}, {"step": 10}]


def test_a_tracker_that_does_not_start_is_two_lines(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "def init(**options): raise ValueError('no login\\nmore')\n"
    (tmp_path / "wandb.py").write_text(bad, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(RunError, match=r"the tracker `wandb` does not start: no login$"):
        open_tracker("wandb", run)
    monkeypatch.delitem(sys.modules, "wandb")


# ------------------------------------------------------------------- the packages themselves

SEND = """
import sys
from pathlib import Path
from tests.train.test_trackers import log_two_lines
log_two_lines(Path(sys.argv[1]), sys.argv[2])
"""


def send(run: Path, name: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEND, str(run), name],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.eco
def test_trackio_has_the_numbers(run: Path, tmp_path: Path) -> None:
    send(run, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {row[1] for row in rows} == {10}
    assert all(row[0].startswith("pretrain-mini_llama3-1") for row in rows)
    values = {name: value for row in rows for name, value in json.loads(row[2]).items()}
    assert values["train/loss"] == 5.0
    assert values["eval/bpb"] == 2.0


def leveldb_records(log: bytes) -> list[bytes]:
    """Return the records of a log of LevelDB, whose header of 7 bytes has a length and a kind.

    All here are whole: kind 1.
    """
    records, at = [], 0
    while at + 7 <= len(log):
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        assert kind == 1
        records.append(log[at + 7 : at + 7 + size])
        at += 7 + size
    return records


@pytest.mark.eco
def test_wandb_has_the_numbers(run: Path) -> None:
    send(run, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    values = {}
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert values["train/loss"] == 5.0
    assert values["eval/bpb"] == 2.0
    assert values["_step"] == 10


@pytest.mark.eco
def test_swanlab_has_the_numbers(run: Path) -> None:
    send(run, "swanlab", SWANLAB_MODE="offline")
    held = b"".join(path.read_bytes() for path in run.glob("swanlog/**/*") if path.is_file())
    for name in (b"train/loss", b"eval/bpb", b"expert_load_max/layer_1"):
        assert name in held
