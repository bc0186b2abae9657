"""What a run would take: sums done by hand, and a probe that really trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.data.manifest import Manifest
from minillm.errors import ConfigError, InputError, RunError
from minillm.log import Silent
from minillm.models import registry, train_kernels
from minillm.models.summary import build_on_meta, load_config
from minillm.settings import BatchConfig, OptimConfig, PlanConfig
from minillm.train import probe as probe_module
from minillm.train.optim import build_optimizers
from minillm.train.plan import memory_parts, plan, summary_lines
from minillm.train.probe import RandomSource, activation_bytes, probe

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def small(name: str = "mini_llama3:tiny", **overrides: Any) -> Any:
    torch.manual_seed(0)
    return registry.build_model(registry.build_config(name, **{**SMALL, **overrides}))


def test_arithmetic_needs_no_device_and_counts_what_is_asked_for(corpus: Path) -> None:
    data = corpus / "tokens" / "text.bin"
    manifest = Manifest.read(Path(f"{data}.json"))
    found = plan(PlanConfig(model="mini_llama3", data=data, probe=False), Silent())
    layers = found.params.total - manifest.vocab_size * 768
    assert found.params.total == layers + found.params.embedding
    assert found.tokens == manifest.num_tokens
    assert found.flops["attention"] == 12 * 12 * 768 * 512
    assert found.seconds == 0.0
    assert plan(PlanConfig(tokens=7, data=data, probe=False), Silent()).tokens == 7
    bare = plan(PlanConfig(model="mini_deepseekv3:tiny", probe=False), Silent())
    assert bare.tokens == 20 * bare.params.active


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", ["mini_llama3:tiny", "mini_deepseekv3:tiny"])
def test_memory_of_the_optimizer_is_what_it_holds_after_a_step(name: str, optimizer: Any) -> None:
    model = registry.build_model(registry.build_config(name, vocab_size=301))
    cfg = OptimConfig(optimizer=optimizer)
    expected = memory_parts(model, cfg)
    optimizers = build_optimizers(model, cfg, CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    held = sum(
        value.nbytes
        for each in optimizers
        for state in each.state.values()
        for value in state.values()
        if value.ndim  # not the counters of steps
    )
    assert held == expected["optimizer"]
    assert sum(p.nbytes for p in model.parameters()) == expected["weights"]
    assert sum(p.grad.nbytes for p in model.parameters()) == expected["gradients"]  # type: ignore[union-attr]


def make_job(model: Any, length: int) -> Any:
    class Job:
        """As much of a job as the measurement needs."""

        source = RandomSource(211, length)

        def tensors(self, rows: Any) -> dict[str, Any]:
            return {"x": torch.zeros(len(rows.input_ids), length, 32), "labels": torch.ones(1)}

        def autocast(self) -> Any:
            return torch.autocast("cpu", enabled=False)

        def loss_options(self, _: int) -> dict[str, Any]:
            return {}

    job: Any = Job()
    job.model = model
    return job


@pytest.mark.parametrize("has_kernels", [True, False])
def test_activations_are_the_tensors_that_wait_for_the_backward_pass(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `down(silu(gate(x)) * up(x))` wait: both inner products and their product; the silu too
    where it is an operation of its own."""
    if not has_kernels:
        monkeypatch.setattr(train_kernels, "load_kernels", lambda dtype: None)
    inner = 3 if train_kernels.load_kernels(torch.float32) else 4
    from minillm.models.shared_expert import SwiGLU

    class Model(SwiGLU):
        """Takes labels, as a language model does."""

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    model = Model(32, 64)
    # the input itself is kept as well, once, for both matrices
    assert activation_bytes(make_job(model, 16)) == 4 * 16 * (32 + inner * 64)


def test_probe_trains_and_chooses_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = BatchConfig(batch_tokens=256, sequence_length=32, precision="fp32")
    speeds = {1: 1.0, 2: 1.0, 4: 1.5, 8: 3.0}  # seconds: 2 is best by doubling, 4 better still
    real = probe_module._time_rows

    def timed(stepper: Any, rows: int, job: Any) -> float:
        real(stepper, rows, job)
        return speeds[rows]

    monkeypatch.setattr(probe_module, "_time_rows", timed)
    found = probe(model, OptimConfig(), batch, CPU, torch.float32, Silent())
    assert found.micro_rows == 4
    assert found.choice == (
        "4 rows; 8 fit, more are no faster (tokens/s by rows: 1: 32, 2: 64, 4: 85, 8: 85)"
    )
    assert found.tokens_per_s > 0
    assert found.peak_bytes > 10_000_000
    # the steps were real ones, at a rate of zero: the weights are as they were
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("limit", [4, 1])
def test_probe_ends_where_memory_does(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) >= limit and not watching[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **kwargs)

    model = small()
    real, watching = type(model).forward, [True]
    watch = probe_module.activation_bytes
    monkeypatch.setattr(type(model), "forward", forward)
    monkeypatch.setattr(
        probe_module,
        "activation_bytes",
        lambda job: (watch(job), watching.__setitem__(0, False))[0],
    )
    monkeypatch.setattr(probe_module, "NO_FASTER", 0.0)
    batch = BatchConfig(batch_tokens=256, sequence_length=32, precision="fp32")
    if limit == 1:
        with pytest.raises(RunError, match="out of memory with 1 rows of 32 tokens"):
            probe(model, OptimConfig(), batch, CPU, torch.float32, Silent())
        return
    found = probe(model, OptimConfig(), batch, CPU, torch.float32, Silent())
    assert "2 fit, more do not" in found.choice


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model"):
        plan(PlanConfig(model="mini_lama3"), Silent())
    with pytest.raises(InputError, match="no token file"):
        plan(PlanConfig(data=tmp_path / "x.bin"), Silent())
    with pytest.raises(ConfigError, match="--tokens"):
        PlanConfig(tokens=-1)


def test_summary_of_a_run_is_three_lines_of_80_columns() -> None:
    model = build_on_meta(load_config("mini_deepseekv3:tiny"))

    class Job:
        """As much of a job as the lines need."""

        total_steps, step_rows, device = 50, 8, CPU
        batch = BatchConfig(sequence_length=128)
        optim = OptimConfig()

    job: Any = Job()
    job.model = model
    first, second, third = lines = summary_lines(job)
    assert first.startswith("mini_deepseekv3: ")
    assert "of them for one token, on " in first
    assert second.startswith("memory: weights ")
    assert third.startswith("50 steps, 51.2k tokens of ")
    assert max(map(len, lines)) <= 80


def test_the_command_shows_time_and_cost_on_stdout(corpus: Path) -> None:
    words = (
        f"plan --model mini_llama3:tiny --data {corpus}/tokens/text.bin --tokens 1000000 "
        "--price-per-hour 3600 --batch-tokens 128 --sequence-length 64 --device cpu"
    )
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "--tokens" in result.stdout
    rows = dict(
        [cell.strip() for cell in line.strip("│").split("│", 1)]
        for line in result.stdout.splitlines()
        if line.count("│") > 1
    )
    assert rows["cost"].endswith("(at 3600 an hour)")
    assert float(rows["cost"].split()[0].replace(",", "")) > 0
    assert "micro-batch 1: " in result.stderr
    assert "next: minillm pretrain --model mini_llama3:tiny --data" in result.stderr
