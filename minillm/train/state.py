"""What a run knows besides weights and optimizer: where it is, and its random state."""

import dataclasses
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

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; floats survive exactly (repr round-trips)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Restore what `to_json` gave."""
        return cls(**values)


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every random generator that training draws from."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def load_rng_tensors(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_tensors` gave."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
