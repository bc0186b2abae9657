"""Two processes are one run: the losses of one, its errors, and a way back to one process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.errors import ConfigError
from minillm.files import sha256_file
from minillm.settings import PretrainConfig
from minillm.train.distributed import World
from minillm.train.metrics import read_metrics
from minillm.train.run_folder import check_alike

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ARCHITECTURES = ("mini_llama3", "mini_deepseekv3", "mini_qwen3_next")


def command(corpus: Path, run: Path, steps: int, *extra: str) -> list[str]:
    words = (
        f"pretrain --data {corpus}/tokens/text.bin --out {run} --tokenizer {corpus}/tokenizer "
        f"--steps {steps} --batch-tokens 512 --sequence-length 64 --micro-batch 2 --log-every 1 "
        f"--eval-every {steps} --save-every 4 --eval-tokens 192 --sample-tokens 4 --device cpu "
        "--precision fp32"
    )
    return [sys.executable, "-m", "minillm", *words.split(), *extra]


def run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, check=False, env=ENV, timeout=600)


def finish(words: list[str]) -> None:
    done = run(words)
    assert done.returncode == 0, done.stderr


def finish_here(words: list[str]) -> None:
    """Run one process's command in this one, which has imported what it needs."""
    done = CliRunner().invoke(app, words[3:])
    assert done.exit_code == 0, done.output


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_a_run_of_two_goes_on_as_one(corpus: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    model = ("--model", "mini_deepseekv3:tiny")
    finish_here(command(corpus, one, 6, *model))
    killed = subprocess.Popen(
        command(corpus, two, 6, *model, "--nproc", "2"), env=ENV, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(two.glob("checkpoints/step-0000004/COMPLETE")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    killed.send_signal(signal.SIGTERM)
    talk = killed.communicate(timeout=120)[1]
    assert killed.returncode == 143, talk
    assert "Traceback" not in talk

    again = [sys.executable, "-m", "minillm", "pretrain", "--resume", str(two), "--nproc", "1"]
    finish_here(again)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_bad_input_is_said_once(corpus: Path, tmp_path: Path) -> None:
    words = command(corpus, tmp_path / "run", 2, "--model", "mini_llama3:tiny", "--nproc", "2")
    done = run([*words, "--batch-tokens", "320"])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "5 rows cannot be split over 2" in done.stderr


@dataclass(frozen=True)
class TwoMachines(World):
    """The second of them was started with other settings or data."""

    size: int = 2
    other: Mapping[str, Any] = field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        return [value, {**value, **self.other}]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "`seed` than process 0: 1, not 0"),
        (
            {"data_sample": "b" * 64},
            "`data_sample` than process 0: bbbbbbbbbbbb…, not aaaaaaaaaaaa…",
        ),
    ],
)
def test_machines_that_differ_are_refused(other: Mapping[str, Any], says: str) -> None:
    facts = {"data_sample": "a" * 64}
    check_alike(PretrainConfig(), facts, TwoMachines())
    with pytest.raises(ConfigError, match="process 1 of 2 has another " + re.escape(says)):
        check_alike(PretrainConfig(), facts, TwoMachines(other=other))


@pytest.mark.slow
def test_another_seed_on_another_machine_is_refused(corpus: Path, tmp_path: Path) -> None:
    words = command(corpus, tmp_path / "run", 2, "--model", "mini_llama3:nano")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        subprocess.Popen(
            [*words, "--seed", str(rank)],
            env={
                **ENV,
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        talk = machine.communicate(timeout=120)[1]
        assert machine.returncode == 2, talk
        assert "process 1 of 2 has another `seed` than process 0: 1, not 0" in talk


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_equal_one(
    architecture: str, parallel: str, corpus: Path, tmp_path: Path
) -> None:
    model = ("--model", f"{architecture}:tiny")
    finish_here(command(corpus, tmp_path / "one", 20, *model))
    spread = ("--nproc", "2", "--parallel", parallel)
    finish(command(corpus, tmp_path / "two", 20, *model, *spread))
    pairs = list(zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True))
    worst = max(abs(two - one) for two, one in pairs)
    # shown with -s, and when it fails
    line = f"{architecture}, {parallel}: max difference of {len(pairs)} losses {worst:.1e}"
    print(line)  # noqa: T201
    assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_killed_processes_continue_to_the_bit(
    optimizer: str, corpus: Path, tmp_path: Path
) -> None:
    extra = ("--model", "mini_qwen3_next:tiny", "--nproc", "2", "--optimizer", optimizer)
    finish(command(corpus, tmp_path / "whole", 12, *extra))
    process = subprocess.Popen(
        command(corpus, tmp_path / "run", 12, *extra), env=ENV, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 6,' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    talk = process.communicate(timeout=120)[1]
    assert process.returncode == 5
    assert "killed by signal 9" in talk
    finish([sys.executable, "-m", "minillm", "pretrain", "--resume", str(tmp_path / "run")])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "trainer_state.safetensors"):
        last = "checkpoints/step-0000012"
        whole, run_ = tmp_path / "whole" / last / name, tmp_path / "run" / last / name
        assert sha256_file(run_) == sha256_file(whole)
