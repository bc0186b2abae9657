"""`minillm plan`: what a run would take, before it begins.

Arithmetic first: parameters, memory of weights, gradients and optimizer, FLOPs. Then, if asked
for, some steps on the device at hand with random tokens: which micro-batch fits and is fastest,
and what that means for the time of the whole run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.data.manifest import Manifest, manifest_path
from minillm.device import describe, pick_device, pick_dtype
from minillm.errors import InputError
from minillm.files import human_bytes, human_count, human_time
from minillm.log import Progress
from minillm.models import registry
from minillm.models.base import ParamCount, flop_parts, param_count
from minillm.models.summary import build_on_meta
from minillm.settings import BatchConfig, OptimConfig, PlanConfig
from minillm.train.job import Job
from minillm.train.optim import split_parameters
from minillm.train.probe import Probe, probe

TOKENS_PER_PARAM = 20
"""Tokens for each active parameter that use a budget of FLOPs best (Hoffmann et al. 2022)."""

_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take."""

    model: str
    params: ParamCount
    flops: Mapping[str, float]
    """FLOPs of a token in training by what they are spent on."""
    memory: Mapping[str, int]
    """Bytes of weights, gradients and optimizer."""
    tokens: int
    why_tokens: str
    batch: BatchConfig
    device: str
    price_per_hour: float = 0.0
    probe: Probe | None = None

    @property
    def seconds(self) -> float:
        """Time of the whole run; 0 without a probe."""
        return self.tokens / self.probe.tokens_per_s if self.probe else 0.0

    def facts(self) -> dict[str, str]:
        """Return names and values to show."""
        flops = sum(self.flops.values())
        parts = ", ".join(f"{name} {n / flops:.0%}" for name, n in self.flops.items())
        facts = {
            "parameters": _parameters(self.params),
            "FLOPs per token": f"{human_count(flops)} at {self.batch.sequence_length:,} tokens "
            f"({parts})",
            "tokens": f"{human_count(self.tokens)} ({self.why_tokens})",
            "steps": f"{_steps(self.tokens, self.batch):,} of "
            f"{human_count(self.batch.batch_tokens)} tokens",
            "FLOPs": f"{flops * self.tokens:.2e}",
            **{f"memory: {name}": human_bytes(size) for name, size in self.memory.items()},
        }
        if self.probe is None:
            return facts
        found = self.probe
        size = found.row_bytes * found.micro_rows
        facts["memory: activations"] = f"{human_bytes(size)} for {found.micro_rows} rows at a time"
        facts["memory: peak"] = human_bytes(found.peak_bytes)
        facts["device"] = f"{self.device}, compute in {found.dtype}"
        facts["micro-batch"] = found.choice
        facts["speed"] = f"{human_count(found.tokens_per_s)} tokens/s"
        if found.mfu:
            facts["speed"] += f", MFU {found.mfu:.0%}"
        facts["time"] = human_time(self.seconds)
        if self.price_per_hour:
            cost = self.seconds / 3600 * self.price_per_hour
            facts["cost"] = f"{cost:,.2f} (at {self.price_per_hour:g} an hour)"
        return facts


def plan(cfg: PlanConfig, progress: Progress) -> Plan:
    """Work out what a run would take.

    Args:
        cfg: What would be trained, and whether to try it.
        progress: Where to report during the probe.

    Raises:
        ConfigError: Unknown model or device.
        InputError: `cfg.data` is missing or no token file.
        RunError: Not even one row fits into memory.
    """
    sizes: dict[str, Any] = {}
    num_data = 0
    if cfg.data is not None:
        num_data, vocab_size = _measure_data(cfg.data)
        sizes = {"vocab_size": vocab_size} if vocab_size else {}
    config = registry.build_config(cfg.model, **sizes)
    device = pick_device(cfg.batch.device)
    dtype = pick_dtype(cfg.batch.precision, device)
    optim = OptimConfig(optimizer=cfg.optimizer)
    found = None
    if cfg.probe:
        torch.manual_seed(0)
        model = registry.build_model(config).to(device)  # type: ignore[arg-type]
        found = probe(model, optim, cfg.batch, device, dtype, progress)
    else:
        model = build_on_meta(config)
    count = param_count(model)
    if cfg.tokens:
        tokens, why = cfg.tokens, "--tokens"
    elif num_data:
        tokens, why = num_data, f"one pass over `{cfg.data}`"
    else:
        tokens, why = TOKENS_PER_PARAM * count.active, f"{TOKENS_PER_PARAM} per active parameter"
    return Plan(
        model=cfg.model,
        params=count,
        flops=flop_parts(model, cfg.batch.sequence_length),
        memory=memory_parts(model, optim),
        tokens=tokens,
        why_tokens=why,
        batch=cfg.batch,
        device=describe(device),
        price_per_hour=cfg.price_per_hour,
        probe=found,
    )


def memory_parts(model: PreTrainedModel, optim: OptimConfig) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state, all fp32.

    AdamW keeps two numbers for each parameter, Muon one for each of its matrices.
    """
    matrices, others = (sum(p.numel() for p in part) for part in split_parameters(model))
    per_matrix = 1 if optim.optimizer == "muon" else 2
    return {
        "weights": _FP32 * sum(p.numel() for p in model.parameters()),
        "gradients": _FP32 * (matrices + others),
        "optimizer": _FP32 * (per_matrix * matrices + 2 * others),
    }


def summary_lines(job: Job) -> list[str]:
    """Return what a run takes, in three lines, for the beginning of its output."""
    count = param_count(job.model)
    flops = sum(flop_parts(job.model, job.batch.sequence_length).values())
    memory = memory_parts(job.model, job.optim)
    sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items())
    tokens = job.total_steps * job.step_rows * job.batch.sequence_length
    return [
        f"{job.model.config.model_type}: {_parameters(count)}, on {describe(job.device)}",
        f"memory: {sizes}, and activations",
        f"{job.total_steps:,} steps, {human_count(tokens)} tokens of {human_count(flops)} FLOPs, "
        f"{tokens * flops:.2e} in all",
    ]


def _measure_data(data: Path) -> tuple[int, int]:
    """Return tokens and vocabulary of a token file; without a manifest the latter is unknown."""
    if not data.is_file():
        raise InputError(
            f"no token file at `{data}`", hint="leave `--data` out, or make it: `minillm tokenize`"
        )
    place = manifest_path(data)
    if place.is_file():
        manifest = Manifest.read(place)
        return manifest.num_tokens, manifest.vocab_size
    return data.stat().st_size // 2, 0  # as published: 16 bits a token


def _steps(tokens: int, batch: BatchConfig) -> int:
    return max(1, round(tokens / batch.batch_tokens))


def _parameters(count: ParamCount) -> str:
    if count.active == count.total:
        return f"{human_count(count.total)} ({human_count(count.embedding)} in embeddings)"
    return f"{human_count(count.total)}, {human_count(count.active)} of them for one token"
