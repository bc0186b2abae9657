"""What a run does when a step goes wrong, the clock runs out, or memory does."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from minillm.errors import ConfigError, InputError, RunError
from minillm.log import Silent
from minillm.models import registry
from minillm.paths import is_complete, latest_run
from minillm.settings import BatchConfig, OptimConfig, PretrainConfig, ReportConfig
from minillm.settings.checks import duration_s
from minillm.train.faults import is_spike
from minillm.train.loop import Outcome
from minillm.train.metrics import read_metrics
from minillm.train.pretrain import pretrain
from minillm.train.signals import TIME_UP
from minillm.train.state import TrainState

STEPS = 10


class Listener(Silent):
    """Remembers the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def settings(corpus: Path, **optim: Any) -> PretrainConfig:
    return PretrainConfig(
        model="mini_llama3:tiny",
        data=corpus / "tokens" / "text.bin",
        tokenizer=corpus / "tokenizer",
        steps=STEPS,
        optim=OptimConfig(**optim),
        batch=BatchConfig(
            batch_tokens=256, sequence_length=64, micro_batch=0, device="cpu", precision="fp32"
        ),
        report=ReportConfig(
            log_every=1, eval_every=STEPS, save_every=4, eval_tokens=128, sample_tokens=0
        ),
    )


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of milliseconds: these tests take many."""
    build = registry.build_config
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(
        registry, "build_config", lambda name, **fields: build(name, **fields | sizes | heads)
    )


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the n-th gradient of the first norm a NaN, once each."""
    build = registry.build_model

    def at(*numbers: int) -> None:
        calls = iter(range(1, 1000))

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.nan if next(calls) in numbers else gradient

        def build_poisoned(config: Any) -> Any:
            model = build(config)
            model.get_parameter("model.norm.weight").register_hook(hook)
            return model

        monkeypatch.setattr(registry, "build_model", build_poisoned)

    return at


def go(cfg: PretrainConfig, run: Path, *, resume: bool = False) -> tuple[Outcome, list[str]]:
    listener = Listener()
    _, outcome = pretrain(cfg, listener, out=run, resume=resume)
    return outcome, listener.lines


def train_steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run) if row["kind"] == "train"]


def test_a_bad_gradient_stops_before_the_update(
    corpus: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(6)
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"step 6: loss is \d.*gradient norm nan") as error:
        go(settings(corpus), run)
    assert "--on-nonfinite rewind" in str(error.value.hint)
    assert sorted(p.name for p in run.glob("checkpoints/*")) == ["step-0000004"]
    report = json.loads((run / "nonfinite" / "step-0000006" / "report.json").read_text())
    assert report["bad"] == ["model.norm.weight"]
    rows = load_file(run / "nonfinite" / "step-0000006" / "rows-0.safetensors")
    assert rows["0.input_ids"].shape == (4, 64)


def test_skipping_leaves_out_one_step(
    corpus: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(6)
    outcome, lines = go(settings(corpus, on_nonfinite="skip"), tmp_path / "run")
    assert outcome.exit_code == 0
    assert outcome.state.skipped == [6]
    assert outcome.state.step == STEPS
    assert any("step 6" in line and "skip" in line for line in lines)
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(bool((abs(w) < 1e9).all()) for w in weights.values())


def test_rewinding_equals_never_having_taken_the_bad_step(
    corpus: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(6)
    outcome, _ = go(settings(corpus, on_nonfinite="rewind"), tmp_path / "rewound")
    poison(6)
    go(settings(corpus, on_nonfinite="skip"), tmp_path / "skipped")
    assert outcome.state.skipped == [6]
    # back to step 4, steps 5 and 7 onwards again: what `skip` computes without going back
    rows = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "rewound")}
    others = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "skipped")}
    assert rows == others
    assert len(train_steps(tmp_path / "rewound")) == len(set(train_steps(tmp_path / "rewound")))


def test_bad_weights_are_neither_kept_nor_gone_back_to(
    corpus: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    """The checkpoint of step 8 gives two bad steps: it is the weights, and that of 4 is taken."""
    poison(9, 10)
    outcome, lines = go(settings(corpus, on_nonfinite="rewind"), tmp_path / "run")
    assert outcome.state.skipped == [9, 10]
    assert [line[-8:-1] for line in lines if line.startswith("back to")] == ["0000008", "0000004"]
    assert train_steps(tmp_path / "run") == list(range(1, 9))
    poison(8)
    go(settings(corpus, on_nonfinite="skip"), tmp_path / "skip")
    saved = sorted(path.name for path in (tmp_path / "skip").glob("checkpoints/*"))
    assert saved == ["step-0000004", "step-0000010"]


def test_a_rate_that_is_absurd_is_named(
    corpus: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(2)
    with pytest.raises(RunError) as error:
        go(settings(corpus, muon_lr=2e9), tmp_path / "run")
    assert error.value.hint == (
        "the rate is 1e+11 times the usual: start again with `--lr 0.047 --muon-lr 0.01`"
    )


def test_rows_that_do_not_fit_are_halved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(settings(corpus), tmp_path / "whole")
    build = registry.build_model

    def build_small(config: Any) -> Any:
        model = build(config)

        def refuse(_: Any, args: Any, kwargs: Any) -> None:
            if model.training and len(kwargs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    monkeypatch.setattr(registry, "build_model", build_small)
    outcome, lines = go(settings(corpus), tmp_path / "run")
    assert [line for line in lines if "out of memory" in line] == [
        "out of memory: 2 rows at a time instead of 4",
        "out of memory: 1 row at a time instead of 2",
    ]
    assert outcome.state.micro_rows == 1
    mine, others = (
        [row["loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert mine == pytest.approx(others, abs=1e-5)  # the same global batch


def test_memory_that_runs_out_anywhere_is_said(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation takes fewer rows; an update, which cannot, ends the run in two lines."""
    build = registry.build_model

    def build_small(config: Any) -> Any:
        model = build(config)

        def refuse(_: Any, args: Any, kwargs: Any) -> None:
            if not model.training and len(kwargs["input_ids"]) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    monkeypatch.setattr(registry, "build_model", build_small)
    outcome, lines = go(settings(corpus), tmp_path / "eval")
    assert lines.count("out of memory: 1 row at a time instead of 2") == 1  # and stays so
    assert outcome.state.step == STEPS

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("minillm.train.step.Stepper.update", fail)
    with pytest.raises(RunError, match="out of memory at step 1 with 1 row at a time") as error:
        go(settings(corpus), tmp_path / "update")
    assert "--micro-batch 1 --activation-checkpointing" in str(error.value.hint)


def test_time_is_up(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(corpus)
    limited = replace(cfg, report=replace(cfg.report, max_time="0.001s"))
    outcome, _ = go(limited, tmp_path / "run")
    assert outcome.exit_code == TIME_UP
    assert not is_complete(tmp_path / "run" / "final")
    # a clock that jumps, back or forth, changes nothing: only `time.monotonic` decides
    monkeypatch.setattr("time.time", lambda: -1e9)
    outcome, _ = go(cfg, tmp_path / "run", resume=True)
    assert outcome.exit_code == 0
    assert outcome.state.step == STEPS


def test_the_latest_run_is_the_last_begun(corpus: Path, tmp_path: Path) -> None:
    """Although the clock stood in the future when the one before began."""
    cfg = settings(corpus)
    cfg = replace(cfg, report=replace(cfg.report, max_time="0.001s"))
    first, second = tmp_path / "pretrain-x-2", tmp_path / "pretrain-x-1"
    go(cfg, first)
    ahead = time.time() + 86_400
    os.utime(first / "run.toml", (ahead, ahead))
    go(cfg, second)
    assert latest_run(tmp_path, "pretrain") == second


def test_best_is_kept(corpus: Path, tmp_path: Path) -> None:
    cfg = settings(corpus)
    report = replace(cfg.report, keep_best=True, eval_every=5)
    outcome, _ = go(replace(cfg, report=report), tmp_path / "run")
    assert is_complete(tmp_path / "run" / "best")
    values = [r["bpb"] for r in read_metrics(tmp_path / "run") if r["kind"] == "eval" and r["step"]]
    assert outcome.state.best_bpb == min(values)


def test_a_run_with_other_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    cfg = settings(corpus)
    short = replace(cfg, report=replace(cfg.report, max_time="0.001s"))
    go(short, tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "other")
    tokens = tmp_path / "other" / "tokens" / "text.bin"
    tokens.with_name("text.bin.json").unlink()
    tokens.write_bytes(tokens.read_bytes()[:-2])
    changed = replace(cfg, data=tokens)
    with pytest.raises(ConfigError, match="`data` was"):
        go(changed, tmp_path / "run", resume=True)
    in_place = corpus / "tokens" / "text.bin"
    kept = in_place.read_bytes()
    try:
        in_place.write_bytes(kept[:-2] + b"\x05\x00")
        with pytest.raises(InputError, match=r"`.*text.bin` is not what `.*run` began with"):
            go(cfg, tmp_path / "run", resume=True)
    finally:
        in_place.write_bytes(kept)


def test_a_flipped_bit_in_a_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole, _ = go(settings(corpus), run)
    newest = run / "checkpoints" / "step-0000010"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    weights.write_bytes(content)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "tra')  # as a kill leaves it
    with pytest.raises(InputError, match=r"step-0000010.*`model.safetensors` is not") as error:
        go(settings(corpus), run, resume=True)
    assert f"rm -r {newest}" in str(error.value.hint)
    shutil.rmtree(newest)
    outcome, _ = go(settings(corpus), run, resume=True)
    assert outcome.state.last_eval == whole.state.last_eval
    assert train_steps(run) == list(range(1, STEPS + 1))


def test_spikes_are_seen() -> None:
    state = TrainState()
    seen = []
    for step in range(1, 201):
        state.step = step
        loss = 3.0 + 0.01 * math.sin(step) + (2.0 if step == 150 else 0.0)
        if is_spike(state, loss):
            seen.append(step)
    assert seen == [150]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("4h", 14_400), ("1h30m", 5_400), ("90s", 90), ("45", 45), ("1d", 86_400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["4 hours", "h", "-1s", "1m1h", "soon"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="not a duration"):
        duration_s(text)
