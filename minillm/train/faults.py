"""What can go wrong in a step, and what a run does then."""

import json
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from safetensors.numpy import save_file

from minillm.data.windows import Rows
from minillm.errors import RunError
from minillm.settings import OptimConfig
from minillm.train.distributed import whole
from minillm.train.job import Job
from minillm.train.optim import pick_lr
from minillm.train.state import TrainState
from minillm.train.step import Gradients

Action = Literal["skip", "rewind"]

MAX_BAD_STEPS = 10
"""More steps that are left out than this, and something is wrong that leaving out does not help."""

_HIGH_RATE = 10
"""From so many times the usual rate on, the rate is what is wrong."""

_SPIKE_SIGMAS = 6.0
_SPIKE_DECAY = 0.98
_SPIKE_AFTER = 50


def handle_nonfinite(
    job: Job, state: TrainState, micro: Sequence[Rows], found: Gradients
) -> Action:
    """Write down what made a step's gradient infinite or NaN, and say how to go on.

    `RUN/nonfinite/step-N/` gets the rows of each process and the norms of all gradients.

    Raises:
        RunError: `--on-nonfinite stop`, or too many such steps.
    """
    step = state.step + 1
    folder = job.run / "nonfinite" / f"step-{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for index, rows in enumerate(micro):
        arrays[f"{index}.input_ids"] = rows.input_ids
        arrays[f"{index}.shift_labels"] = rows.shift_labels
        if rows.position_ids is not None:
            arrays[f"{index}.position_ids"] = rows.position_ids
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(plain, folder / f"rows-{job.world.rank}.safetensors")
    norms = {
        name: float(whole(torch.linalg.vector_norm(parameter.grad)))
        for name, parameter in job.model.named_parameters()
        if parameter.grad is not None
    }
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if job.world.is_main:
        shown = {name: norm if math.isfinite(norm) else str(norm) for name, norm in norms.items()}
        loss, norm = str(found.loss), str(found.norm)  # JSON has no NaN
        values = {"step": step, "loss": loss, "norm": norm, "bad": bad, "norms": shown}
        text = json.dumps(values, indent=1)
        (folder / "report.json").write_text(text, encoding="utf-8")
    what = f"step {step}: loss is {found.loss:.4f}, gradient norm {found.norm:.3g}"
    if job.optim.on_nonfinite == "stop":
        raise RunError(f"{what}; rows and gradients are in `{folder}`", hint=_way_out(job))
    if len(state.skipped) >= MAX_BAD_STEPS:
        raise RunError(
            f"{what}; {MAX_BAD_STEPS} steps have been left out already, the last in `{folder}`",
            hint=f"leaving out does not help: start again with {_lower_rates(job)}",
        )
    return job.optim.on_nonfinite


def _way_out(job: Job) -> str:
    """Return the hint for a run that stops: leave the step out, or, of a high rate, begin anew."""
    optim, usual = job.optim, OptimConfig(optimizer=job.optim.optimizer)
    shares = [pick_lr(job.model, optim) / pick_lr(job.model, usual)]
    if optim.optimizer == "muon":
        shares.append(optim.muon_lr / usual.muon_lr)
    if max(shares) > _HIGH_RATE:
        return (
            f"the rate is {max(shares):.0g} times the usual: start again with {_lower_rates(job)}"
        )
    return (
        f"`minillm {job.stage} --resume {job.run} --on-nonfinite rewind` goes on from the last "
        f"checkpoint without such steps; if they return, start again with {_lower_rates(job)}"
    )


def _lower_rates(job: Job) -> str:
    """Return flags with half the rates, or half the usual ones where those are lower."""
    optim, usual = job.optim, OptimConfig(optimizer=job.optim.optimizer)
    rate = min(pick_lr(job.model, optim), pick_lr(job.model, usual)) / 2
    flags = f"--lr {rate:.2g}"
    if optim.optimizer == "muon":
        flags += f" --muon-lr {min(optim.muon_lr, usual.muon_lr) / 2:.2g}"
    return f"`{flags}`"


def is_spike(state: TrainState, loss: float) -> bool:
    """Tell whether a loss is far above what the last steps had, and remember it.

    Far: more than six standard deviations over the running mean; both are exponential averages
    with a memory of about 50 steps.
    """
    deviation = loss - state.spike_mean
    is_far = (
        state.step > _SPIKE_AFTER and deviation > _SPIKE_SIGMAS * math.sqrt(state.spike_var) > 0
    )
    if state.step <= 1:
        state.spike_mean = loss
    elif not is_far:
        state.spike_mean += (1 - _SPIKE_DECAY) * deviation
        state.spike_var = _SPIKE_DECAY * (state.spike_var + (1 - _SPIKE_DECAY) * deviation**2)
    return is_far


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a smaller batch might fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
