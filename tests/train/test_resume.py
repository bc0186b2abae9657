"""A run that was killed goes on as if it had not been: same losses, same weights, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.data.sft import prepare_sft
from minillm.files import sha256_file
from minillm.log import Silent
from minillm.settings import PrepareSftConfig
from minillm.train.metrics import read_metrics

STEPS = 24
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other help nobody here


def command(corpus: Path, run: Path) -> list[str]:
    words = (
        f"pretrain --model mini_llama3:nano --data {corpus}/tokens/text.bin --out {run} "
        f"--tokenizer {corpus}/tokenizer --steps {STEPS} --batch-tokens 256 --sequence-length 64 "
        "--micro-batch 2 --log-every 2 --eval-every 6 --save-every 5 --eval-tokens 128 "
        "--sample-tokens 4 --device cpu --precision fp32"
    )
    return [sys.executable, "-m", "minillm", *words.split()]


def finish(words: list[str]) -> None:
    """Run a command that nobody disturbs, without the seconds that a process needs to begin."""
    done = CliRunner().invoke(app, words[3:])
    assert done.exit_code == 0, done.output


def start(words: list[str]) -> "subprocess.Popen[str]":
    # a script's background job ignores SIGINT, and so would the command
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heed
    )


def curve(run: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(run)]


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
            return
        time.sleep(0.01)
    pytest.fail(f"never reached step {step}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(command(corpus, run))
    return run


def disturb(words: list[str], run: Path, kinds: Sequence[tuple[int, int, int]]) -> None:
    """Run a command, stop it by each signal at its step, and let it finish."""
    stage = words[3]
    for number, step, code in kinds:
        process = start(words)
        wait_for_step(run, step, process)
        process.send_signal(number)
        _, talk = process.communicate(timeout=60)
        assert process.returncode == code, talk
        if number != signal.SIGKILL:
            assert f"minillm {stage} --resume {run}" in talk
        words = [sys.executable, "-m", "minillm", stage, "--resume", str(run)]
    finish(words)


def assert_equal_to_the_bit(run: Path, whole: Path, steps: int) -> None:
    assert curve(run) == curve(whole)
    for name in (
        "final/model.safetensors",
        f"checkpoints/step-{steps:07d}/trainer_state.safetensors",
    ):
        assert sha256_file(run / name) == sha256_file(whole / name), name


def test_a_stopped_run_continues_to_the_bit(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kinds = [(signal.SIGTERM, 6, 143), (signal.SIGINT, 12, 130), (signal.SIGKILL, 18, -9)]
    disturb(command(corpus, run), run, kinds)
    assert_equal_to_the_bit(run, whole, STEPS)


@pytest.fixture(scope="module")
def dialogues(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet of the bundled dialogues, packed into rows of 256 tokens."""
    out = tmp_path_factory.mktemp("sft") / "sft.parquet"
    cfg = PrepareSftConfig(
        out=out, tokenizer=corpus / "tokenizer", sequence_length=256, max_dialogues=200
    )
    prepare_sft(cfg, Silent())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("architecture", ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"])
def test_every_architecture_and_optimizer_continues_to_the_bit(
    architecture: str, optimizer: str, corpus: Path, dialogues: Path, tmp_path: Path
) -> None:
    def words(stage: str, run: Path, *extra: str) -> list[str]:
        made = command(corpus, run)
        made[3] = stage
        place = made.index("--model")
        made[place : place + 6] = [*extra, "--out", str(run)]
        if stage == "sft":
            place = made.index("--tokenizer")
            del made[place : place + 2]
            made[made.index("--sequence-length") + 1] = "256"
        return [*made, "--optimizer", optimizer]

    tokens = ("--data", f"{corpus}/tokens/text.bin", "--model", f"{architecture}:tiny")
    tuned = ("--data", str(dialogues), "--model", str(tmp_path / "pretrain-whole" / "final"))
    for stage, extra in (("pretrain", tokens), ("sft", tuned)):
        whole, run = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-run"
        disturb(words(stage, whole, *extra), whole, [])
        step = 2 * random.randrange(1, STEPS // 2)  # every second one is logged
        # shown with -s, and when it fails
        print(f"{architecture}, {stage}, {optimizer}: killed at step {step}")  # noqa: T201
        disturb(words(stage, run, *extra), run, [(signal.SIGKILL, step, -9)])
        assert_equal_to_the_bit(run, whole, STEPS)


def test_the_curve_holds_every_logged_step_once(whole: Path) -> None:
    steps = [step for kind, step, _ in curve(whole) if kind == "train"]
    assert steps == list(range(2, STEPS + 1, 2))
    assert [step for kind, step, _ in curve(whole) if kind == "eval"] == [0, 6, 12, 18, 24]


def test_a_half_written_checkpoint_is_never_taken(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(run)], check=True)
    newest = run / "checkpoints" / f"step-{STEPS:07d}"
    (newest / "COMPLETE").unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    again = [sys.executable, "-m", "minillm", "pretrain", "--resume", str(run)]
    finish(again)
    assert sha256_file(run / "final/model.safetensors") == sha256_file(
        whole / "final/model.safetensors"
    )


@pytest.mark.parametrize(
    ("flag", "says"), [("--lr=0.5", "`optim.lr` was 0.0"), ("--seed=7", "`seed` was 0")]
)
def test_resume_refuses_a_change_that_would_break_it(whole: Path, flag: str, says: str) -> None:
    done = CliRunner().invoke(app, ["pretrain", "--resume", str(whole), flag])
    assert done.exit_code == 2
    assert says in done.stderr
    assert "hint:" in done.stderr


def test_run_toml_repeats_the_run(corpus: Path, whole: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "minillm", "pretrain"]
    finish([*start, "--config", str(whole / "run.toml"), "--out", str(tmp_path / "run")])
    assert curve(tmp_path / "run") == curve(whole)


def test_the_report_has_the_numbers_of_the_log(whole: Path) -> None:
    last = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][-1]
    report = (whole / "report.md").read_text(encoding="utf-8")
    assert f"{last['bpb']:.4f}" in report
    assert (whole / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
