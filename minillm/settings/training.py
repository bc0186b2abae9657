"""Settings of `pretrain` and `sft`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_doc import Doc

from minillm import paths
from minillm.errors import ConfigError
from minillm.settings.checks import (
    check_not_negative,
    check_package,
    check_positive,
    check_range,
    duration_s,
)
from minillm.settings.kinds import Device, Precision, Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Annotated[
        Literal["muon", "adamw"],
        Doc("`muon`: Muon on the matrices, AdamW on the rest. `adamw`: AdamW on all."),
    ] = "muon"
    lr: Annotated[
        float, Doc("Peak learning rate of AdamW; 0: by the width of the model, docs/training.md.")
    ] = 0.0
    muon_lr: Annotated[float, Doc("Peak learning rate of Muon.")] = 2e-2
    betas: Annotated[tuple[float, float], Doc("AdamW beta1 and beta2.")] = (0.9, 0.95)
    weight_decay: Annotated[float, Doc("Decoupled weight decay of the matrices.")] = 0.1
    grad_clip: Annotated[float, Doc("Global gradient-norm limit; 0 disables it.")] = 1.0
    schedule: Annotated[
        Literal["wsd", "cosine"], Doc("Warm-up, constant, linear decay; or warm-up and cosine.")
    ] = "wsd"
    warmup_ratio: Annotated[float, Doc("Share of the steps spent warming up.")] = 0.02
    decay_ratio: Annotated[float, Doc("WSD: share of the steps spent decaying.")] = 0.5
    min_lr_ratio: Annotated[float, Doc("Last learning rate as a share of the peak.")] = 0.0
    on_nonfinite: Annotated[
        Literal["stop", "skip", "rewind"],
        Doc("When loss or gradient is not finite: `skip` the step, or `rewind` to a checkpoint."),
    ] = "stop"

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        check_positive(self, "muon_lr", *(("lr",) if self.lr else ()))
        check_not_negative(self, "weight_decay", "grad_clip")
        if not all(0 <= beta < 1 for beta in self.betas):
            first, second = self.betas
            raise ConfigError(
                f"`--betas` must be 0 or more and below 1, got {first} and {second}",
                hint="try `--betas 0.9 0.95`",
            )
        for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
            check_range(self, name, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """Length, batch and precision."""

    batch_tokens: Annotated[int, Doc("Tokens per optimizer step, over all devices.")] = 65_536
    sequence_length: Annotated[int, Doc("Tokens per row.")] = 512
    micro_batch: Annotated[int, Doc("Rows per forward pass; 0 chooses by device.")] = 0
    precision: Annotated[
        Precision, Doc("Compute dtype; `auto` is bf16 where the hardware has it.")
    ] = "auto"
    device: Device = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"], Doc("torch.compile; `auto` is on for CUDA.")
    ] = "auto"
    activation_checkpointing: Annotated[
        bool, Doc("Recompute activations in backward: less memory, slower.")
    ] = False

    def __post_init__(self) -> None:
        """Reject empty batches."""
        check_positive(self, "batch_tokens", "sequence_length")
        check_not_negative(self, "micro_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What is measured and saved, and when."""

    log_every: Annotated[int, Doc("Steps between metric lines.")] = 10
    eval_every: Annotated[int, Doc("Steps between evaluations; 0 is ten per run.")] = 0
    eval_tokens: Annotated[int, Doc("Validation tokens per evaluation.")] = 65_536
    sample_tokens: Annotated[int, Doc("Length of each sample at evaluation; 0 is none.")] = 48
    save_every: Annotated[int, Doc("Steps between checkpoints; 0 is five per run.")] = 0
    keep: Annotated[int, Doc("Newest checkpoints to keep.")] = 2
    keep_best: Annotated[bool, Doc("Also keep the weights of the best evaluation, in best/.")] = (
        False
    )
    max_time: Annotated[
        str, Doc("Save and stop after that time, e.g. `4h`, `1h30m`; exit code 75.")
    ] = ""
    tracker: Annotated[Tracker, Doc("Also send the numbers to this experiment tracker.")] = "none"

    def __post_init__(self) -> None:
        """Reject intervals that never come, and a tracker that is not installed."""
        check_positive(self, "log_every", "eval_tokens", "keep")
        check_not_negative(self, "eval_every", "save_every", "sample_tokens")
        duration_s(self.max_time)
        if self.tracker != "none":
            check_package("--tracker", self.tracker)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Several processes."""

    nproc: Annotated[int, Doc("Processes on this machine, one per GPU; runs torchrun.")] = 1
    parallel: Annotated[
        Literal["ddp", "fsdp"], Doc("`ddp`: each has the whole model. `fsdp`: each has a part.")
    ] = "ddp"

    def __post_init__(self) -> None:
        """Reject runs of nobody."""
        check_positive(self, "nproc")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """`minillm pretrain`: everything that decides the numbers of a run."""

    model: Annotated[str, Doc("Architecture and size, e.g. `mini_llama3:small`.")] = "mini_llama3"
    data: Annotated[Path, Doc("A token file (.bin).")] = paths.PRETRAIN_BIN
    val_data: Annotated[
        Path | None, Doc("A token file to validate on; default: the end of --data is held out.")
    ] = None
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; `auto` finds the one that made the data.")
    ] = Path("auto")
    epochs: Annotated[float, Doc("Passes over the data.")] = 1.0
    steps: Annotated[int, Doc("Optimizer steps; 0 follows --epochs.")] = 0
    seed: Annotated[int, Doc("Seed of weights, data order and dropout.")] = 0
    doc_mask: Annotated[bool, Doc("Documents in a row do not see each other.")] = True
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    several: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        """Reject runs of no length."""
        check_positive(self, "epochs")
        check_not_negative(self, "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Small matrices that are trained instead of the whole model."""

    lora_rank: Annotated[int, Doc("Rank of the matrices; 0 trains the whole model.")] = 0
    lora_alpha: Annotated[float, Doc("Their product counts alpha / rank times.")] = 16.0
    lora_targets: Annotated[
        str, Doc("Layers, e.g. `q_proj,v_proj`; empty: what the architecture names.")
    ] = ""

    def __post_init__(self) -> None:
        """Reject what is no rank."""
        check_range(self, "lora_rank", 0, 4096)
        check_positive(self, "lora_alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """`minillm sft`: everything that decides the numbers of a run."""

    model: Annotated[
        Path, Doc("Model folder or pretrain run; `auto` is the newest finished pretrain run.")
    ] = Path("auto")
    data: Annotated[Path, Doc("SFT parquet, packed or not.")] = paths.SFT_PARQUET
    epochs: Annotated[float, Doc("Passes over the data.")] = 2.0
    steps: Annotated[int, Doc("Optimizer steps; 0 follows --epochs.")] = 0
    seed: Annotated[int, Doc("Seed of data order and dropout.")] = 0
    neftune_alpha: Annotated[
        float, Doc("Noise on the embeddings while training (NEFTune), e.g. 5; 0 is none.")
    ] = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-4, muon_lr=1e-2, weight_decay=0.0)
    )
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(batch_tokens=16_384))
    report: ReportConfig = field(default_factory=ReportConfig)
    several: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        """Reject runs of no length."""
        check_positive(self, "epochs")
        check_not_negative(self, "steps")
        check_range(self, "neftune_alpha", 0, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """`minillm plan`: what a run would take, before it begins."""

    model: Annotated[str, Doc("Architecture and size, e.g. `mini_llama3:small`.")] = "mini_llama3"
    data: Annotated[
        Path | None, Doc("A token file (.bin): its vocabulary, and one pass over its tokens.")
    ] = None
    tokens: Annotated[
        int, Doc("Tokens to train on; 0: those of --data, or 20 for each active parameter.")
    ] = 0
    price_per_hour: Annotated[
        float, Doc("What an hour of this machine costs; 0 shows no cost.")
    ] = 0.0
    probe: Annotated[bool, Doc("Train a few steps here, to measure speed and memory.")] = True
    optimizer: Annotated[Literal["muon", "adamw"], Doc("As for pretrain.")] = "muon"
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        """Reject amounts below nothing."""
        check_not_negative(self, "tokens", "price_per_hour")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCompareConfig:
    """`minillm report`: runs in words and curves."""

    runs: Annotated[tuple[Path, ...], Doc("Run folders.")] = ()
    out: Annotated[
        Path | None, Doc("Folder of the report; default: the run itself, or below reports/.")
    ] = None
