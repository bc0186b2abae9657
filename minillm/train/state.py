"""What a run knows besides weights and optimizer: where it is, and its random state."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class TrainState:
    """Position of a run. Everything here is saved and restored exactly.

    `samples` is the loader's whole state: the order is a function of (seed, index).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    window_loss: float = 0.0
    """Sum of the losses of the steps since the last metric line."""
    window_steps: int = 0
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    eval_step: int = -1
    """Step of `last_eval`."""
    train_seconds: float = 0.0
    micro_rows: int = 0
    """Rows of a forward pass; 0 before the first step. Memory may have made them fewer."""
    skipped: list[int] = field(default_factory=list)
    """Numbers of the steps that were left out because their gradient was not finite."""
    best_bpb: float = math.inf
    spike_mean: float = 0.0
    spike_var: float = 0.0
    """Running mean and variance of the loss, for the watch on spikes."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; floats survive exactly (repr round-trips)."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v != math.inf}  # JSON knows no infinity

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Restore what `to_json` gave."""
        return cls(**values)


def rng_tensors(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """Return the state of every random generator that training draws from."""
    tensors = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        tensors[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return tensors


def load_rng_tensors(tensors: dict[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Put back what `rng_tensors` gave; a process that was not there takes the first one's."""
    torch.set_rng_state(tensors.get(f"rng.cpu.{rank}", tensors["rng.cpu.0"]))
    on_gpu = tensors.get(f"rng.cuda.{rank}", tensors.get("rng.cuda.0"))
    if device.type == "cuda" and on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
