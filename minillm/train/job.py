"""The pieces of a run, put together by `pretrain` and `sft` and driven by `loop`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm.data.windows import Rows
from minillm.errors import ConfigError
from minillm.models.base import MiniPreTrainedModel
from minillm.settings import BatchConfig, LoraConfig, OptimConfig, ReportConfig
from minillm.train.distributed import World

CPU_MICRO_TOKENS = 4_096
GPU_MICRO_TOKENS = 32_768


class Source(Protocol):
    """Where batches come from; order is a function of the sample's index alone."""

    def __len__(self) -> int:
        """Training samples in one epoch."""

    @property
    def num_val(self) -> int:
        """Validation samples."""

    def rows(self, first: int, count: int) -> Rows:
        """Return training samples `first` to `first + count` of the run."""

    def val_rows(self, first: int, count: int) -> Rows:
        """Return validation samples `first` to `first + count`."""

    def prompts(self) -> Sequence[Sequence[int]]:
        """Return the token ids that samples continue."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything the loop needs."""

    stage: str
    run: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    tokenizer_folder: Path
    byte_lengths: npt.NDArray[np.int32]
    """Text bytes of each token id, for bits per byte."""
    source: Source
    optim: OptimConfig
    batch: BatchConfig
    report: ReportConfig
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    world: World = field(default_factory=World)
    parallel: str = "ddp"
    lora: LoraConfig | None = None
    """Set when the model's weights are frozen but for LoRA's."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of data and tokenizer."""

    def __post_init__(self) -> None:
        """Reject a batch that cannot be dealt out evenly."""
        if self.step_rows % self.world.size:
            rows = -(-self.step_rows // self.world.size) * self.world.size
            raise ConfigError(
                f"a step of {self.step_rows} rows cannot be split over {self.world.size} processes",
                hint=f"try `--batch-tokens {rows * self.batch.sequence_length}`",
            )

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return max(1, self.batch.batch_tokens // self.batch.sequence_length)

    @property
    def micro_rows(self) -> int:
        """Rows of one forward pass, as asked for or by the device."""
        own_rows = self.step_rows // self.world.size
        if self.batch.micro_batch:
            return min(self.batch.micro_batch, own_rows)
        budget = GPU_MICRO_TOKENS if self.device.type == "cuda" else CPU_MICRO_TOKENS
        return max(1, min(own_rows, budget // self.batch.sequence_length))

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.report.eval_every or max(1, self.total_steps // 10)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.report.save_every or max(1, self.total_steps // 5)

    def tensors(self, rows: Rows) -> dict[str, Tensor]:
        """Move a micro-batch to the device as the model's arguments."""
        arrays: dict[str, Any] = {"input_ids": rows.input_ids, "shift_labels": rows.shift_labels}
        if rows.position_ids is not None:
            arrays["position_ids"] = rows.position_ids
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
            for name, array in arrays.items()
        }
        # official classes compute a loss only when `labels` are there, but prefer the shifted ones
        return tensors | {"labels": tensors["shift_labels"]}

    def loss_options(self, num_labels: int) -> dict[str, Any]:
        """Return the model's other arguments: a mean over `num_labels`, no logits stored."""
        options: dict[str, Any] = {"num_items_in_batch": max(1, num_labels), "use_cache": False}
        if isinstance(self.model, MiniPreTrainedModel):
            options["skip_logits"] = True
        return options

    def autocast(self) -> torch.autocast:
        """Compute in `dtype`; weights and optimizer stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def main_first(world: World, out: Path | None, build: Callable[[Path | None], Job]) -> Job:
    """Build a job in the main process, then, into the same run folder, in the others.

    What is wrong with the input is so said once, and what is written is there for all.
    """
    job = build(out) if world.is_main else None
    run = world.share(job.run if job else None)
    return job or build(run)
