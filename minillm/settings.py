"""Every command's knobs, one frozen dataclass tree each: the one place where a flag is declared.

A nested dataclass is a TOML table and a panel of `--help`. A leaf's name is also its flag.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_doc import Doc

from minillm import paths
from minillm.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
Device = Annotated[str, Doc("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")]


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigError unless each named field is > 0."""
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"`{flag}` must be positive, got {value}",
                hint=f"leave `{flag}` out for its default, or give a value above 0",
            )


def check_range(config: object, name: str, low: float, high: float) -> None:
    """Raise ConfigError unless `low <= field <= high`."""
    value = getattr(config, name)
    if not low <= value <= high:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(
            f"`{flag}` must lie between {low} and {high}, got {value}", hint=f"try `{flag} {high}`"
        )


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTokenizerConfig:
    """`minillm prepare-tokenizer`."""

    data: Annotated[
        Path, Doc("Folder or file of parquet with columns `text, source`; or `bundled`.")
    ] = paths.RAW
    out: Annotated[Path, Doc("Folder for the sampled parquet parts.")] = paths.SAMPLE
    sample_ratio: Annotated[
        float, Doc("Share of each source's documents to keep, 0 to 1; 0: about 40 MB in all.")
    ] = 0.0
    seed: Annotated[int, Doc("Seed of the sample.")] = 0

    def __post_init__(self) -> None:
        """Reject ratios that keep less than nothing or more than all."""
        check_range(self, "sample_ratio", 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTokenizerConfig:
    """`minillm train-tokenizer`."""

    data: Annotated[Path, Doc("Folder or file of parquet, jsonl or txt; or `bundled`.")] = (
        paths.SAMPLE
    )
    out: Annotated[Path, Doc("Folder for the tokenizer.")] = paths.TOKENIZER
    vocab_size: Annotated[int, Doc("Base tokens; 4 chat tokens are added.")] = 32_000
    text_column: Annotated[str, Doc("Name of the text column or JSON key.")] = "text"
    max_bytes: Annotated[int, Doc("Train on at most this many bytes of text; 0 is all.")] = 0

    def __post_init__(self) -> None:
        """A byte-level vocabulary holds 256 bytes and `<|endoftext|>`."""
        check_range(self, "vocab_size", 257, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """`minillm tokenize`."""

    data: Annotated[Path, Doc("Folder or file of parquet, jsonl or txt; or `bundled`.")] = paths.RAW
    out: Annotated[Path, Doc("Folder for NAME.bin and NAME.bin.json.")] = paths.TOKENS
    name: Annotated[str, Doc("Name of the token file; one .bin per input file if empty.")] = ""
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; or `bundled`; or `auto`: data/tokenizer, else bundled.")
    ] = Path("auto")
    text_column: Annotated[str, Doc("Name of the text column or JSON key.")] = "text"
    workers: Annotated[int, Doc("Processes; 0 is one per core.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeBinConfig:
    """`minillm merge-bin`."""

    data: Annotated[Path, Doc("Folder of .bin files (all are merged, by name).")] = paths.TOKENS
    out: Annotated[Path, Doc("The merged .bin.")] = paths.PRETRAIN_BIN
    tokenizer: Annotated[
        Path | None, Doc("Tokenizer folder; needed for .bin files without a manifest.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityConfig:
    """Who the model says it is."""

    identity: Annotated[bool, Doc("Mix in the identity dialogues.")] = True
    assistant_name: Annotated[str, Doc("The model's name.")] = "MiniLLM"
    author: Annotated[str, Doc("Who made it.")] = "the minillm project"
    author_zh: Annotated[str, Doc("Who made it, in Chinese; empty: the same.")] = "minillm 项目"
    identity_repeat: Annotated[
        int, Doc("How often each identity dialogue appears, in other words each time.")
    ] = 4

    def __post_init__(self) -> None:
        """Reject a model without a name."""
        check_range(self, "identity_repeat", 1, 1000)
        if not self.assistant_name.strip() or not self.author.strip():
            raise ConfigError(
                f"the model needs a name and an author: `{self.assistant_name}`, `{self.author}`",
                hint="pass --assistant-name NAME --author NAME, or --no-identity",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSftConfig:
    """`minillm prepare-sft`."""

    data: Annotated[Path, Doc("JSONL file or folder of dialogues (`messages`); or `bundled`.")] = (
        Path(paths.BUNDLED)
    )
    out: Annotated[Path, Doc("SFT parquet to write.")] = paths.SFT_PARQUET
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; or `bundled`; or `auto`: data/tokenizer, else bundled.")
    ] = Path("auto")
    sequence_length: Annotated[int, Doc("Longest row, in tokens.")] = 512
    pack: Annotated[bool, Doc("Pack several dialogues into one row.")] = True
    max_dialogues: Annotated[int, Doc("Sample at most this many dialogues; 0 is all.")] = 0
    seed: Annotated[int, Doc("Seed of sampling and order.")] = 0
    persona: IdentityConfig = field(default_factory=IdentityConfig)

    def __post_init__(self) -> None:
        """Reject empty rows."""
        check_range(self, "sequence_length", 16, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadConfig:
    """`minillm download`."""

    sets: Annotated[
        tuple[str, ...], Doc("Numbers or names, e.g. `9` or `deepctrl-bin`; none: the catalog.")
    ] = ()
    out: Annotated[Path, Doc("Folder below which each set gets its place.")] = paths.DATA
    hub: Annotated[
        Literal["auto", "modelscope", "huggingface"],
        Doc("Where to fetch from; `auto` tries each hub that has the set."),
    ] = "auto"
    workers: Annotated[int, Doc("Files fetched at a time.")] = 4
    verify: Annotated[
        bool, Doc("Hash what is there again instead of trusting its size and time.")
    ] = False
    dry_run: Annotated[bool, Doc("List files and sizes, fetch nothing.")] = False

    def __post_init__(self) -> None:
        """Reject a download that never begins."""
        check_range(self, "workers", 1, 16)


# ------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Annotated[
        Literal["muon", "adamw"],
        Doc("`muon`: Muon on the matrices, AdamW on the rest. `adamw`: AdamW on all."),
    ] = "muon"
    lr: Annotated[float, Doc("Peak learning rate of AdamW.")] = 1e-3
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

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        check_positive(self, "lr", "muon_lr")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What is measured and saved, and when."""

    log_every: Annotated[int, Doc("Steps between metric lines.")] = 10
    eval_every: Annotated[int, Doc("Steps between evaluations; 0 is ten per run.")] = 0
    eval_tokens: Annotated[int, Doc("Validation tokens per evaluation.")] = 65_536
    sample_tokens: Annotated[int, Doc("Length of each sample at evaluation; 0 is none.")] = 48
    save_every: Annotated[int, Doc("Steps between checkpoints; 0 is five per run.")] = 0
    keep: Annotated[int, Doc("Newest checkpoints to keep.")] = 2

    def __post_init__(self) -> None:
        """Reject intervals that never come."""
        check_positive(self, "log_every", "eval_tokens", "keep")


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
    doc_mask: Annotated[bool, Doc("Documents in a row do not see each other.")] = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        """Reject runs of no length."""
        check_positive(self, "epochs")


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
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-4, muon_lr=1e-2, weight_decay=0.0)
    )
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(batch_tokens=16_384))
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        """Reject runs of no length."""
        check_positive(self, "epochs")


# ------------------------------------------------------------------------------------ inference


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: Annotated[float, Doc("0 is greedy.")] = 0.7
    top_k: Annotated[int, Doc("Keep the k likeliest tokens; 0 is all.")] = 0
    top_p: Annotated[float, Doc("Keep the likeliest tokens up to this mass.")] = 0.9
    repetition_penalty: Annotated[float, Doc("> 1 discourages tokens seen before.")] = 1.0
    frequency_penalty: Annotated[float, Doc("Subtract this per earlier appearance.")] = 0.0
    max_tokens: Annotated[int, Doc("Longest answer, in tokens.")] = 256
    seed: Annotated[int | None, Doc("Seed of sampling; default: none.")] = None

    def __post_init__(self) -> None:
        """Reject values that no answer can be made with."""
        check_range(self, "temperature", 0, 100)
        check_range(self, "top_k", 0, 1_000_000)
        check_positive(self, "top_p", "repetition_penalty", "max_tokens")
        check_range(self, "top_p", 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """`minillm chat`."""

    model: Annotated[
        str, Doc("Run folder, model folder or hub id; `auto` is the newest SFT run.")
    ] = "auto"
    backend: Annotated[
        Literal["generator", "transformers"], Doc("Ours, or transformers' own `generate`.")
    ] = "generator"
    device: Device = "auto"
    precision: Annotated[Precision, Doc("Dtype of the weights.")] = "auto"
    system: Annotated[str, Doc("System message.")] = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """`minillm serve`."""

    model: Annotated[
        str, Doc("Run folder, model folder or hub id; `auto` is the newest SFT run.")
    ] = "auto"
    host: Annotated[str, Doc("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Doc("Port to listen on.")] = 8000
    device: Device = "auto"
    precision: Annotated[Precision, Doc("Dtype of the weights.")] = "auto"
    served_model_name: Annotated[
        str, Doc("Name that clients use; empty: the run's or folder's name.")
    ] = ""
    api_key: Annotated[str, Doc("Key that clients must send; empty: none.")] = ""
    temperature: Annotated[float, Doc("For requests that choose none; 0 is greedy.")] = 0.7
    top_p: Annotated[float, Doc("For requests that choose none.")] = 0.9
    max_waiting: Annotated[int, Doc("Requests that may wait; one more gets a 429.")] = 64
    drain_s: Annotated[int, Doc("Seconds that running answers get when the server stops.")] = 10

    def __post_init__(self) -> None:
        """Reject values that no server can use."""
        check_range(self, "port", 0, 65_535)
        check_range(self, "temperature", 0, 2)
        check_positive(self, "top_p", "max_waiting")
        check_range(self, "top_p", 0, 1)
        check_range(self, "drain_s", 0, 3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """`minillm demo`."""

    preset: Annotated[
        Literal["quick", "standard", "long"],
        Doc("`quick` ~2 minutes to see it run, `standard` ~10, `long` ~30, on two cores."),
    ] = "standard"
    out: Annotated[Path, Doc("Folder for everything the demo makes.")] = Path("demo")
    fresh: Annotated[bool, Doc("Begin anew instead of resuming what is in --out.")] = False
    device: Device = "auto"
