"""A few steps of training on the device at hand: which micro-batch fits, and how fast it is."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.windows import Rows
from minillm.device import keep_freed_memory, peak_flops, peak_memory_bytes
from minillm.errors import RunError
from minillm.log import Progress
from minillm.models.base import flops_per_token
from minillm.settings import BatchConfig, OptimConfig, ReportConfig
from minillm.train.distributed import Parallel, World
from minillm.train.faults import is_out_of_memory
from minillm.train.job import Job
from minillm.train.optim import build_optimizers
from minillm.train.step import Stepper

NO_FASTER = 1.02
"""On a CPU a doubled micro-batch must bring this factor, or the search ends."""
LONGEST_S = 20.0
"""A micro-batch that takes longer ends the search."""
_SPARE = 0.8  # share of the free memory that a CPU may be filled to: beyond, it swaps
_TIMES = 2  # each size is timed that often, and the best counts
_LAST_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found."""

    micro_rows: int
    """The fastest micro-batch."""
    choice: str
    """What was tried, in words."""
    tokens_per_s: float
    """Of whole steps, with the update."""
    mfu: float
    """0 where the device's peak is not known."""
    row_bytes: int
    """Activations that wait for the backward pass, for each row."""
    peak_bytes: int
    dtype: str


class RandomSource:
    """Rows of random tokens, the same for the same index."""

    num_val = 0

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def __len__(self) -> int:
        """Any number."""
        return 1 << 30

    def rows(self, first: int, count: int) -> Rows:
        """Return `count` rows."""
        random = np.random.default_rng(first)
        ids = random.integers(0, self._vocab_size, (count, self._length + 1))
        return Rows(ids[:, :-1], ids[:, 1:], None)

    def val_rows(self, first: int, count: int) -> Rows:
        """Return `count` rows."""
        return self.rows(first, count)

    def prompts(self) -> Sequence[Sequence[int]]:
        """Return none."""
        return []


def probe(
    model: PreTrainedModel,
    optim: OptimConfig,
    batch: BatchConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Probe:
    """Train a few steps; the model is changed by it.

    Micro-batches double from one row until memory is full, the step is whole, or, on a CPU, it
    gets no faster. With `batch.micro_batch` only that one is tried. The search runs eagerly, which
    takes more memory than compiled; the speed is that of what the run would use.

    Raises:
        RunError: Not even one row fits into memory.
    """
    job = Job(
        stage="plan",
        run=Path(),
        model=model.train(),
        tokenizer=cast("Any", None),
        tokenizer_folder=Path(),
        byte_lengths=np.zeros(0, np.int32),
        source=RandomSource(model.config.vocab_size, batch.sequence_length),
        optim=optim,
        batch=batch,
        report=ReportConfig(),
        total_steps=1,
        device=device,
        dtype=dtype,
    )
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    if batch.activation_checkpointing:
        model.activation_checkpointing_enable()
    row_bytes = activation_bytes(job)
    optimizers = build_optimizers(model, optim, device, dtype)
    stepper = Stepper(job, Parallel(model, World(), "ddp", is_compiled=False), optimizers, 1)
    rates, why = _search(job, stepper, row_bytes, progress)
    best = max(rates, key=lambda rows: rates[rows])
    is_compiled = batch.compile == "on" or (batch.compile == "auto" and device.type == "cuda")
    if is_compiled:
        compiled = Parallel(model, World(), "ddp", is_compiled=True)
        stepper = Stepper(job, compiled, optimizers, best)
        _time_rows(stepper, best, job)  # compiles
    seconds = _time_step(stepper, best, job)
    rate = job.step_rows * batch.sequence_length / seconds
    peak = peak_flops(device, dtype)
    shown = ", ".join(f"{rows}: {rate:,.0f}" for rows, rate in rates.items())
    return Probe(
        micro_rows=best,
        choice=f"{best} rows; {max(rates)} fit{why} (tokens/s by rows: {shown})",
        tokens_per_s=rate,
        mfu=rate * flops_per_token(model, batch.sequence_length) / peak if peak else 0.0,
        row_bytes=row_bytes,
        peak_bytes=peak_memory_bytes(device),
        dtype=str(dtype).removeprefix("torch."),
    )


def activation_bytes(job: Job) -> int:
    """Return what one more row keeps for the backward pass, by watching two forward passes."""
    own = {t.untyped_storage().data_ptr() for t in [*job.model.parameters(), *job.model.buffers()]}
    sizes = []
    for rows in (1, 2):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        given = job.tensors(job.source.rows(0, rows))
        watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with watch, job.autocast():
            output = job.model(**given, **job.loss_options(given["labels"].numel()))
        sizes.append(sum(kept.values()))
        del output
    return sizes[1] - sizes[0]


def _search(
    job: Job, stepper: Stepper, row_bytes: int, progress: Progress
) -> tuple[dict[int, float], str]:
    """Return tokens per second by rows of a micro-batch, and why the search ended."""
    is_cpu = job.device.type == "cpu"
    rates: dict[int, float] = {}
    rows = min(job.batch.micro_batch, job.step_rows) or 1
    while True:
        if is_cpu and rates and rows * row_bytes > _SPARE * psutil.virtual_memory().available:
            return rates, ", more would fill the memory"
        seconds = _try_rows(stepper, rows, job, is_first=not rates)
        if seconds is None:
            stepper.clear()
            return rates, ", more do not"
        rates[rows] = rows * job.batch.sequence_length / seconds
        progress.line(f"micro-batch {rows}: {rates[rows]:,.0f} tokens/s")
        if job.batch.micro_batch:
            return rates, ", as given"
        if is_cpu and rates[rows] < rates.get(rows // 2, 0.0) * NO_FASTER:
            return rates, ", more are no faster"
        if seconds > LONGEST_S:
            return rates, ", more take long"
        if 2 * rows > job.step_rows:
            return rates, ", a whole step"
        rows *= 2


def _try_rows(stepper: Stepper, rows: int, job: Job, *, is_first: bool) -> float | None:
    """Return the seconds of a micro-batch; None if it does not fit into memory.

    Raises:
        RunError: Not even the first fits.
    """
    try:
        if is_first:
            _time_rows(stepper, rows, job)  # first-time costs
        return min(_time_rows(stepper, rows, job) for _ in range(_TIMES))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not is_first:
            return None
    raise RunError(
        f"out of memory with {rows} rows of {job.batch.sequence_length} tokens",
        hint="try `--micro-batch 1 --activation-checkpointing`, or a smaller `--model`",
    )


def _time_rows(stepper: Stepper, rows: int, job: Job) -> float:
    """Return the seconds of forward and backward of one micro-batch."""
    start = _now(job.device)
    stepper.backward([job.source.rows(0, rows)], lambda: False)
    seconds = _now(job.device) - start
    stepper.clear()
    return seconds


def _time_step(stepper: Stepper, rows: int, job: Job) -> float:
    """Return the seconds of a whole step: its micro-batches and one update."""
    micro, update = [], []
    for _ in range(_LAST_STEPS):
        start = _now(job.device)
        stepper.backward([job.source.rows(0, rows)], lambda: False)
        middle = _now(job.device)
        stepper.update(0.0)  # at a rate of zero the work is the same
        micro.append(middle - start)
        update.append(_now(job.device) - middle)
    return sorted(micro)[1] * job.step_rows / rows + sorted(update)[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
