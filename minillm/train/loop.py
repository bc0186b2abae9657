"""The one loop: micro-steps, finite check, clip, update, schedule, metrics, evaluate, save.

Pretraining and fine-tuning differ only in the rows they feed. A run stopped by a signal or a kill
continues bit for bit on a CPU: sample order, optimizer, random state and the running averages of
the log are all part of a checkpoint. Several processes run the same loop on parts of each step.
"""

import gc
import math
import time
from dataclasses import dataclass

from rich.cells import chop_cells
from torch.optim import Optimizer
from transformers.utils import logging as hf_logging

from minillm.device import peak_flops, peak_memory_bytes, release_freed_memory
from minillm.errors import RunError
from minillm.log import Progress, task
from minillm.models.base import MiniPreTrainedModel, flops_per_token
from minillm.settings.checks import duration_s
from minillm.train.checkpoint import (
    CheckpointWriter,
    check_files,
    good_checkpoint,
    load_optimizers,
    load_position,
    load_weights,
    newest_checkpoint,
)
from minillm.train.distributed import Parallel
from minillm.train.evaluate import evaluate, write_samples
from minillm.train.faults import handle_nonfinite, is_out_of_memory, is_spike
from minillm.train.job import Job
from minillm.train.metrics import MetricLog, split_metrics
from minillm.train.optim import build_optimizers
from minillm.train.schedule import lr_share
from minillm.train.signals import CODES, StopRequest
from minillm.train.state import TrainState
from minillm.train.step import Gradients, Stepper


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    exit_code: int
    """0 when finished; 130, 143 or 75 when stopped by Ctrl-C, SIGTERM or its time, after saving."""
    is_main: bool = True
    """Whether this process is the one that reports."""


def train(job: Job, progress: Progress, *, resume: bool) -> Outcome:
    """Run `job` to its last step, or until it is asked to stop; write checkpoints and `final/`.

    Raises:
        RunError: The loss or the gradient is not finite, or memory ran out; nothing was updated.
        SetupError: The disk is full; the last checkpoint is intact.
    """
    hf_logging.disable_progress_bar()  # a bar per saved file would break into ours
    model = job.model.train()
    if job.batch.activation_checkpointing:
        model.activation_checkpointing_enable()
    checkpoint = newest_checkpoint(job.run) if resume else None
    state = TrainState()
    if checkpoint is not None:
        check_files(checkpoint)
        state = load_position(checkpoint)
        load_weights(checkpoint, job)
    parallel = Parallel(model, job.world, job.parallel, is_compiled=_is_compiled(job))
    optimizers = build_optimizers(model, job.optim, job.device, job.dtype)
    if checkpoint is not None:
        load_optimizers(checkpoint, job, optimizers)
    gc.collect()
    gc.freeze()  # long-lived objects: the collector need not walk them between steps
    try:
        with (
            StopRequest(duration_s(job.report.max_time)) as stop,
            task(progress, job.stage, job.total_steps, "steps"),
        ):
            progress.advance(state.step)
            loop = _Loop(job, parallel, optimizers, state, progress, stop)
            try:
                loop.run()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise loop.no_memory() from None
            finally:
                loop.close()
    finally:
        gc.unfreeze()
    if not stop.exit_code:
        loop.writer.save_weights(job.run / "final")
    loop.writer.wait()
    return Outcome(loop.state, stop.exit_code, job.world.is_main)


def _is_compiled(job: Job) -> bool:
    wanted = job.batch.compile
    return wanted == "on" or (wanted == "auto" and job.device.type == "cuda")


class _Loop:
    """The state of one `train` call, so that the parts of a step can be read one by one."""

    def __init__(
        self,
        job: Job,
        parallel: Parallel,
        optimizers: list[Optimizer],
        state: TrainState,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.job, self.parallel, self.optimizers = job, parallel, optimizers
        self.state, self.progress, self.stop = state, progress, stop
        micro_rows = job.micro_rows
        if state.micro_rows and not job.batch.micro_batch:
            micro_rows = min(state.micro_rows, micro_rows)
        self.stepper = Stepper(job, parallel, optimizers, micro_rows)
        self.writer = CheckpointWriter(job)
        self.log = MetricLog(job.run, state, job.report.tracker) if job.world.is_main else None
        self.flops = flops_per_token(job.model, job.batch.sequence_length)
        self.peak = self.measure_peak()
        self.timer, self.timed_tokens = time.perf_counter(), 0
        self.is_first, self.last_norm = True, 0.0

    def run(self) -> None:
        """Step until done or asked to stop. A stop saves the last whole step."""
        job, state = self.job, self.state
        if state.eval_step != state.step and self.is_eval_due():
            self.evaluate()
        saved = state.step
        while self.state.step < job.total_steps and not self.is_stopped():
            if not self.step():
                break  # stopped inside a step: its gradients are dropped, it will be done again
            step = self.state.step
            is_last = step == job.total_steps
            if step % job.report.log_every == 0 or is_last:
                self.write_metrics()
                self.writer.check()
            is_new = step not in self.state.skipped  # else weights that may be bad push out good
            if (step % job.save_every == 0 and is_new) or is_last:
                self.save()  # before evaluating, which may fail
                saved = step
            if self.is_eval_due():
                self.evaluate()
                if is_last:
                    self.save()  # again, with the last evaluation in it
        if saved != self.state.step:
            self.save()

    def is_stopped(self) -> bool:
        """Agree with the other processes whether to stop."""
        asked = self.job.world.sum(*(float(self.stop.exit_code == code) for code in CODES))
        for code, votes in zip(CODES, asked, strict=True):
            if votes:
                self.stop.exit_code = code
        return bool(self.stop.exit_code)

    def is_eval_due(self) -> bool:
        """Evaluate at step 0, every so often, and at the end."""
        step = self.state.step
        return step % self.job.eval_every == 0 or step == self.job.total_steps

    def step(self) -> bool:
        """Do one optimizer step; return False if a signal came in the middle."""
        job, state = self.job, self.state
        if state.step + 1 in state.skipped:
            self.leave_out()
            return True
        started = time.perf_counter()
        found = self.backward()
        if found is None:
            return False
        if not found.is_finite:
            action = handle_nonfinite(job, state, self.stepper.rows(state.samples), found)
            self.stepper.clear()
            state.skipped.append(state.step + 1)
            self.progress.line(
                f"step {state.step + 1}: loss {found.loss:.4f}, "
                f"gradient norm {found.norm:.3g}: {action}"
            )
            if action == "rewind":
                self.rewind()
            else:
                self.leave_out()
            return True
        self.stepper.update(lr_share(state.step, job.total_steps, job.optim))
        state.step += 1
        state.samples += job.step_rows
        state.tokens += found.tokens
        state.window_loss += found.loss
        state.window_steps += 1
        state.train_seconds += time.perf_counter() - started
        self.timed_tokens += found.tokens
        self.last_norm = found.norm
        if is_spike(state, found.loss):
            self.progress.line(
                f"step {state.step}: loss jumped to {found.loss:.3f} from {state.spike_mean:.3f}"
            )
        self.progress.advance(1)
        return True

    def backward(self) -> Gradients | None:
        """Compute the gradients of the next step; the first time, with rows that fit into memory.

        Raises:
            RunError: Memory ran out.
        """
        stepper, state, model = self.stepper, self.state, self.job.model
        kept = {name: b.clone() for name, b in model.named_buffers()} if self.is_first else {}
        while True:
            try:
                micro = stepper.rows(state.samples)
                found = stepper.backward(micro, lambda: bool(self.stop.exit_code))
            except (RuntimeError, MemoryError) as error:
                rows = stepper.micro_rows
                if not is_out_of_memory(error):
                    raise
                if not self.is_first or self.job.world.size > 1 or rows == 1:
                    raise self.no_memory() from None
            else:
                self.is_first, state.micro_rows = False, stepper.micro_rows
                return found
            # outside of `except`, whose frame would keep the tensors of the failed attempt alive
            stepper.clear()
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
            stepper.micro_rows = rows // 2
            release_freed_memory()
            self.progress.line(f"out of memory: {_rows(rows // 2)} at a time instead of {rows}")

    def no_memory(self) -> RunError:
        """Say that memory ran out, and what needs less."""
        job, step, rows = self.job, self.state.step + 1, self.stepper.micro_rows
        less = f"`minillm {job.stage} --resume {job.run} --micro-batch {max(1, rows // 2)}"
        if not job.batch.activation_checkpointing:
            less += " --activation-checkpointing"
        hint = f"{less}` needs less"
        if rows == 1 and job.batch.activation_checkpointing:
            hint = "nothing smaller fits: choose a smaller `--model` or `--sequence-length`"
        return RunError(f"out of memory at step {step} with {_rows(rows)} at a time", hint=hint)

    def leave_out(self) -> None:
        """Count a step whose gradient was not finite, without its update."""
        self.state.step += 1
        self.state.samples += self.job.step_rows
        self.progress.advance(1)

    def rewind(self) -> None:
        """Go back to the last good checkpoint; without one, leave out the step alone."""
        self.writer.wait()
        checkpoint = good_checkpoint(self.job.run, self.state.skipped)
        if checkpoint is None:
            self.leave_out()
            return
        self.progress.line(f"back to `{checkpoint}`")
        skipped, before = self.state.skipped, self.state.step
        load_weights(checkpoint, self.job)
        load_optimizers(checkpoint, self.job, self.optimizers)
        self.state = load_position(checkpoint)
        self.state.skipped = skipped
        self.progress.advance(self.state.step - before)
        if self.log is not None:
            self.log.close()
            self.log = MetricLog(self.job.run, self.state, self.job.report.tracker)

    def write_metrics(self) -> None:
        """Log the mean loss since the last line, and the speed."""
        state, job = self.state, self.job
        if not state.window_steps:
            return  # all were left out
        seconds = max(time.perf_counter() - self.timer, 1e-9)
        rate = self.timed_tokens / seconds
        loss = state.window_loss / state.window_steps
        values = {
            "loss": loss,
            "ppl": math.exp(min(loss, 700.0)),
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "grad_norm": self.last_norm,
            "tokens": state.tokens,
            "seconds": state.train_seconds,
            "flops": state.tokens * self.flops,
            "tokens_per_s": rate,
            "memory_bytes": peak_memory_bytes(job.device),
        }
        vectors: dict[str, list[float]] = {}
        if isinstance(job.model, MiniPreTrainedModel):
            scalars, vectors = split_metrics(job.model.metrics)
            values |= scalars
        if self.peak:
            values["mfu"] = rate * self.flops / self.peak
        if self.log is not None:
            self.log.write("train", state.step, values, vectors)
        self.progress.numbers(values)
        state.window_loss, state.window_steps = 0.0, 0
        self.timer, self.timed_tokens = time.perf_counter(), 0

    def evaluate(self) -> None:
        """Validate and write samples; keep the first result to compare with."""
        paused = time.perf_counter()
        job, state = self.job, self.state
        values = self.measure()
        state.eval_step = state.step
        if values:
            state.first_eval = state.first_eval or values
            state.last_eval = values
            if self.log is not None:
                self.log.write("eval", state.step, values)
            self.progress.line(
                f"step {state.step}/{job.total_steps}: validation loss {values['loss']:.3f}, "
                f"ppl {values['ppl']:.1f}, {values['bpb']:.3f} bits per byte"
            )
            if job.report.keep_best and state.step and values["bpb"] < state.best_bpb:
                state.best_bpb = values["bpb"]
                self.writer.save_weights(job.run / "best")
        # with shards, every process must take part in a forward pass
        if state.step and (job.world.is_main or self.parallel.is_sharded):
            for number, (prompt, text) in enumerate(write_samples(job)):
                if self.log is not None:
                    self.log.write_text(f"sample/{number}", state.step, f"{prompt} → {text}")
                self.progress.line(sample_line(prompt, text))
        self.peak = self.measure_peak()
        self.timer += time.perf_counter() - paused  # speed is that of training alone

    def measure_peak(self) -> float:
        """Return the FLOP/s of all processes that MFU is a share of."""
        return peak_flops(self.job.device, self.job.dtype) * self.job.world.size

    def measure(self) -> dict[str, float]:
        """Evaluate, alone with fewer rows at a time until it fits into memory."""
        rows = self.stepper.micro_rows
        while True:
            try:
                return evaluate(self.job, rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.job.world.size > 1 or rows == 1:
                    raise
            release_freed_memory()
            self.progress.line(f"out of memory: {_rows(rows // 2)} at a time instead of {rows}")
            rows //= 2
            if self.is_first:  # what evaluating has no room for, training has not
                self.stepper.micro_rows = rows

    def save(self) -> None:
        """Begin to write a checkpoint; old ones are dropped once it is there."""
        paused = time.perf_counter()
        self.writer.save_checkpoint(self.optimizers, self.state)
        self.timer += time.perf_counter() - paused

    def close(self) -> None:
        """Flush the log, and let a checkpoint that is being written become whole."""
        self.writer.settle()
        if self.log is not None:
            self.log.close()


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def sample_line(prompt: str, text: str) -> str:
    """Return the end of a prompt and the beginning of what follows, within 80 columns."""
    prompt = prompt.removeprefix("user\n").removesuffix("\nassistant\n").replace("\n", "⏎")
    tail = chop_cells(prompt[::-1], 28)[0][::-1] if prompt else ""
    cut = "…" if tail != prompt else ""
    head, *rest = chop_cells(text.replace("\n", "⏎"), 43) or [""]
    return f"  {cut}{tail} → {head}{'…' if rest else ''}"
