"""The one loop: micro-steps, finite check, clip, update, schedule, metrics, evaluate, save.

Pretraining and fine-tuning differ only in the rows they feed. A run stopped by a signal or a kill
continues bit for bit on a CPU: sample order, optimizer, random state and the running averages of
the log are all part of a checkpoint.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.cells import chop_cells
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging as hf_logging

from minillm.data.windows import IGNORE
from minillm.device import peak_flops, peak_memory_bytes
from minillm.errors import RunError
from minillm.files import human_count
from minillm.log import Progress, task
from minillm.models.base import MiniPreTrainedModel, flops_per_token
from minillm.train.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_model,
    write_folder,
)
from minillm.train.evaluate import evaluate, write_samples
from minillm.train.job import Job
from minillm.train.metrics import MetricLog
from minillm.train.optim import build_optimizers, set_lr
from minillm.train.schedule import lr_share
from minillm.train.signals import StopRequest
from minillm.train.state import TrainState


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    exit_code: int
    """0 when finished; 130 or 143 when stopped by Ctrl-C or SIGTERM, after saving."""


def train(job: Job, progress: Progress, *, resume: bool) -> Outcome:
    """Run `job` to its last step, or until a signal; write checkpoints and `final/`.

    Raises:
        RunError: The loss or the gradient is not finite; nothing was updated with it.
        SetupError: The disk is full; the last checkpoint is intact.
    """
    hf_logging.disable_progress_bar()  # a bar per saved file would break into ours
    model = job.model.train()
    if job.batch.activation_checkpointing:
        model.activation_checkpointing_enable()
    optimizers = build_optimizers(model, job.optim, job.device)
    state = TrainState()
    checkpoint = newest_checkpoint(job.run) if resume else None
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizers)
    log = MetricLog(job.run, state)
    forward = _compiled(job)
    gc.collect()
    gc.freeze()  # long-lived objects: the collector need not walk them between steps
    try:
        with StopRequest() as stop, task(progress, job.stage, job.total_steps, "steps"):
            progress.advance(state.step)
            _Loop(job, optimizers, state, log, progress, forward, stop).run()
    finally:
        log.close()
        gc.unfreeze()
    if stop.signal is not None:
        return Outcome(state, stop.exit_code)
    write_folder(job.run / "final", lambda f: save_model(f, model, job.tokenizer_folder))
    return Outcome(state, 0)


def _compiled(job: Job) -> Callable[..., object]:
    wanted = job.batch.compile
    if wanted == "off" or (wanted == "auto" and job.device.type != "cuda"):
        return job.model
    compiled: Callable[..., object] = torch.compile(job.model, fullgraph=True, dynamic=False)
    return compiled


class _Loop:
    """The state of one `train` call, so that the parts of a step can be read one by one."""

    def __init__(
        self,
        job: Job,
        optimizers: list[Optimizer],
        state: TrainState,
        log: MetricLog,
        progress: Progress,
        forward: Callable[..., object],
        stop: StopRequest,
    ) -> None:
        self.job, self.optimizers, self.state, self.log = job, optimizers, state, log
        self.progress, self.forward, self.stop = progress, forward, stop
        self.parameters = [p for p in job.model.parameters() if p.requires_grad]
        self.flops = flops_per_token(job.model, job.batch.sequence_length)
        self.peak = peak_flops(job.device, job.dtype)
        self.timer, self.timed_tokens = time.perf_counter(), 0

    def run(self) -> None:
        """Step until done or asked to stop. A stop saves the last whole step."""
        job, state = self.job, self.state
        if state.eval_step != state.step and self.is_eval_due():
            self.evaluate()
        saved = state.step
        while state.step < job.total_steps and self.stop.signal is None:
            if not self.step():
                break  # stopped inside a step: its gradients are dropped, it will be done again
            is_last = state.step == job.total_steps
            if state.step % job.report.log_every == 0 or is_last:
                self.write_metrics()
            if state.step % job.save_every == 0 or is_last:
                self.save()  # before evaluating, which may fail
                saved = state.step
            if self.is_eval_due():
                self.evaluate()
                if is_last:
                    self.save()  # again, with the last evaluation in it
        if saved != state.step:
            self.save()

    def is_eval_due(self) -> bool:
        """Evaluate at step 0, every so often, and at the end."""
        step = self.state.step
        return step % self.job.eval_every == 0 or step == self.job.total_steps

    def step(self) -> bool:
        """Do one optimizer step; return False if a signal came in the middle."""
        job, state = self.job, self.state
        started = time.perf_counter()
        micro = [
            job.source.rows(state.samples + at, min(job.micro_rows, job.step_rows - at))
            for at in range(0, job.step_rows, job.micro_rows)
        ]
        # the loss is a mean over the labels of the whole step, however it is cut
        num_labels = sum(int((rows.shift_labels != IGNORE).sum()) for rows in micro)
        loss: Tensor = torch.zeros((), device=job.device)
        for rows in micro:
            if self.stop.signal is not None:
                self.clear_gradients()
                return False
            with job.autocast():
                output = self.forward(**job.tensors(rows), **job.loss_options(num_labels))
            output.loss.backward()  # type: ignore[attr-defined]
            loss += output.loss.detach()  # type: ignore[attr-defined]

        limit = job.optim.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        if not math.isfinite(float(loss)) or not math.isfinite(float(norm)):
            raise RunError(
                f"step {state.step + 1}: loss is {float(loss)}, gradient norm {float(norm)}",
                hint=f"start again with lower rates: `minillm {job.stage} --config "
                f"{job.run / 'run.toml'} --lr {job.optim.lr / 2:g} "
                f"--muon-lr {job.optim.muon_lr / 2:g}`",
            )
        if isinstance(job.model, MiniPreTrainedModel):
            job.model.update_router_bias()
        set_lr(self.optimizers, lr_share(state.step, job.total_steps, job.optim))
        for optimizer in self.optimizers:
            optimizer.step()
        self.clear_gradients()

        state.step += 1
        state.samples += job.step_rows
        tokens = sum(rows.input_ids.size for rows in micro)
        state.tokens += tokens
        state.window_loss += float(loss)
        state.window_steps += 1
        state.train_seconds += time.perf_counter() - started
        self.timed_tokens += tokens
        self.last_norm = float(norm)
        self.progress.advance(1)
        return True

    def clear_gradients(self) -> None:
        """Drop the gradients of a step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def write_metrics(self) -> None:
        """Log the mean loss since the last line, and the speed."""
        state, job = self.state, self.job
        seconds = max(time.perf_counter() - self.timer, 1e-9)
        rate = self.timed_tokens / seconds
        loss = state.window_loss / state.window_steps
        values = {
            "loss": loss,
            "ppl": math.exp(min(loss, 700.0)),
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "grad_norm": self.last_norm,
            "tokens": state.tokens,
            "tokens_per_s": rate,
            "memory_bytes": peak_memory_bytes(job.device),
        }
        if isinstance(job.model, MiniPreTrainedModel):
            values |= {name: float(value) for name, value in job.model.metrics.items()}
        if self.peak:
            values["mfu"] = rate * self.flops / self.peak
        self.log.write("train", state.step, values)
        mfu = f"  MFU {values['mfu']:.0%}" if self.peak else ""
        self.progress.note(f"loss {loss:.3f}  {human_count(rate)} tok/s{mfu}")
        state.window_loss, state.window_steps = 0.0, 0
        self.timer, self.timed_tokens = time.perf_counter(), 0

    def evaluate(self) -> None:
        """Validate and write samples; keep the first result to compare with."""
        paused = time.perf_counter()
        state, values = self.state, evaluate(self.job)
        state.eval_step = state.step
        if values:
            state.first_eval = state.first_eval or values
            state.last_eval = values
            self.log.write("eval", state.step, values)
            self.progress.line(
                f"step {state.step}/{self.job.total_steps}: validation loss {values['loss']:.3f}, "
                f"ppl {values['ppl']:.1f}, {values['bpb']:.3f} bits per byte"
            )
        for number, (prompt, text) in enumerate(write_samples(self.job) if state.step else []):
            self.log.write_text(f"sample/{number}", state.step, f"{prompt} → {text}")
            self.progress.line(sample_line(prompt, text))
        self.timer += time.perf_counter() - paused  # speed is that of training alone

    def save(self) -> None:
        """Write a checkpoint and drop old ones."""
        paused = time.perf_counter()
        job = self.job
        save_checkpoint(job.run, job.model, self.optimizers, self.state, job.tokenizer_folder)
        prune_checkpoints(job.run, job.report.keep)
        self.timer += time.perf_counter() - paused


def sample_line(prompt: str, text: str) -> str:
    """Return the end of a prompt and the beginning of what follows, within 80 columns."""
    prompt = prompt.removeprefix("user\n").removesuffix("\nassistant\n").replace("\n", "⏎")
    tail = chop_cells(prompt[::-1], 28)[0][::-1] if prompt else ""
    cut = "…" if tail != prompt else ""
    head, *rest = chop_cells(text.replace("\n", "⏎"), 43) or [""]
    return f"  {cut}{tail} → {head}{'…' if rest else ''}"
