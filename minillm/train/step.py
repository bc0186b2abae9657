"""One optimizer step on this process's share of the rows, and what every process then knows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from minillm.data.windows import IGNORE, Rows
from minillm.models.base import MiniPreTrainedModel
from minillm.train.distributed import Parallel, whole
from minillm.train.job import Job
from minillm.train.optim import set_lr


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a backward pass over a step gave; the gradients themselves are in the parameters."""

    loss: float
    """Mean over the labels of the step, all processes together."""
    norm: float
    """Norm of all gradients before clipping."""
    tokens: int
    """Tokens of the step, all processes together."""

    @property
    def is_finite(self) -> bool:
        """Neither loss nor gradient holds an infinity or a NaN."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Stepper:
    """Computes steps of a job.

    Args:
        job: What is trained.
        parallel: The model as the processes run it.
        optimizers: They own the gradients.
        micro_rows: Rows of one forward pass.
    """

    def __init__(
        self, job: Job, parallel: Parallel, optimizers: Sequence[Optimizer], micro_rows: int
    ) -> None:
        self.job, self.parallel, self.optimizers = job, parallel, optimizers
        self.micro_rows = micro_rows
        self.parameters = [p for p in job.model.parameters() if p.requires_grad]

    def rows(self, first: int) -> list[Rows]:
        """Return this process's micro-batches of the step that begins with sample `first`."""
        job, world = self.job, self.parallel.world
        share = job.step_rows // world.size
        first += world.rank * share
        return [
            job.source.rows(first + at, min(self.micro_rows, share - at))
            for at in range(0, share, self.micro_rows)
        ]

    def backward(self, micro: Sequence[Rows], is_stopped: Callable[[], bool]) -> Gradients | None:
        """Compute and clip the gradients of a step; None if asked to stop in between.

        Only a process that is alone stops in between: others wait for it.
        """
        job, world = self.job, self.parallel.world
        # the loss is a mean over the labels of the whole step, however it is cut
        own = sum(int((rows.shift_labels != IGNORE).sum()) for rows in micro)
        num_labels, tokens = world.sum(own, sum(rows.input_ids.size for rows in micro))
        loss: Tensor = torch.zeros((), device=job.device)
        for index, rows in enumerate(micro):
            if world.size == 1 and is_stopped():
                self.clear()
                return None
            with self.parallel.synced(is_last=index == len(micro) - 1):
                with job.autocast():
                    output = self.parallel.forward(
                        **job.tensors(rows), **job.loss_options(int(num_labels))
                    )
                # gradients are averaged over the processes, and shall be summed
                (output.loss * world.size if world.size > 1 else output.loss).backward()
            loss += output.loss.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        (total,) = world.sum(float(loss))
        found = Gradients(total, float(whole(norm)), int(tokens))
        if job.optim.grad_clip and found.is_finite:  # else it is still to be seen which is not
            torch.nn.utils.clip_grads_with_norm_(self.parameters, job.optim.grad_clip, norm)
        return found

    def update(self, lr_share: float) -> None:
        """Apply the gradients at `lr_share` of the peak rates, and drop them."""
        if isinstance(self.job.model, MiniPreTrainedModel):
            self.job.model.update_router_bias()
        set_lr(self.optimizers, lr_share)
        for optimizer in self.optimizers:
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients of a step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
