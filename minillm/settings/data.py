"""Settings of the commands that make data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_doc import Doc

from minillm import paths
from minillm.errors import ConfigError
from minillm.settings.checks import check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTokenizerConfig:
    """`minillm prepare-tokenizer`."""

    data: Annotated[
        Path, Doc("Folder or file of parquet with columns `text, source`; or `bundled`.")
    ] = paths.RAW
    out: Annotated[Path, Doc("Folder for the sampled parquet parts.")] = paths.SAMPLE
    text_column: Annotated[str, Doc("Name of the column of text.")] = "text"
    source_column: Annotated[
        str, Doc("Name of the column of sources; empty: sample all documents alike.")
    ] = "source"
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
    max_bytes: Annotated[
        int,
        Doc("Train on at most this much text, drawn from all of it; 0: all. Needs 70x in memory."),
    ] = 60_000_000
    seed: Annotated[int, Doc("Seed of that draw.")] = 0
    compare: Annotated[
        tuple[Path, ...], Doc("Tokenizer folder to compare with in the report; repeatable.")
    ] = ()

    def __post_init__(self) -> None:
        """A byte-level vocabulary holds 256 bytes and `<|endoftext|>`."""
        check_range(self, "vocab_size", 257, 1_000_000)
        check_range(self, "max_bytes", 0, 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """`minillm tokenize`."""

    data: Annotated[Path, Doc("Folder or file of parquet, jsonl or txt; or `bundled`.")] = paths.RAW
    out: Annotated[Path, Doc("Folder for NAME.bin and NAME.bin.json.")] = paths.TOKENS
    name: Annotated[str, Doc("Name of the token file; one .bin per input file if empty.")] = ""
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; or `bundled`; or `auto`: data/tokenizer, else bundled.")
    ] = Path("auto")
    recipe: Annotated[
        Literal["none", "fineweb", "deepctrl"],
        Doc("A published set's: `fineweb` (text), `deepctrl` (instruction + input + output)."),
    ] = "none"
    text_column: Annotated[str, Doc("Name of the text column or JSON key.")] = "text"
    template: Annotated[
        str, Doc("Several columns as one text, e.g. `{instruction}\\n{output}`.")
    ] = ""
    backend: Annotated[
        Literal["auto", "gigatoken", "tokenizers"],
        Doc("Library that encodes; the ids are the same. `auto`: gigatoken where it pays."),
    ] = "auto"
    workers: Annotated[int, Doc("Processes; 0 is one per core.")] = 0

    def __post_init__(self) -> None:
        """Reject two answers to the same question."""
        check_range(self, "workers", 0, 1024)
        if (self.recipe != "none") + bool(self.template) + (self.text_column != "text") > 1:
            raise ConfigError(
                "--recipe, --template and --text-column each say what a document is",
                hint="pass one of them",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeBinConfig:
    """`minillm merge-bin`."""

    data: Annotated[Path, Doc("Folder of .bin files (all are merged, by name).")] = paths.TOKENS
    out: Annotated[Path, Doc("The merged .bin.")] = paths.PRETRAIN_BIN
    tokenizer: Annotated[
        Path | None, Doc("Tokenizer folder; needed for .bin files without a manifest.")
    ] = None
    verify: Annotated[
        bool, Doc("Hash every part and the whole; else the parts' hashes are carried over.")
    ] = False
    shuffle_documents: Annotated[
        bool, Doc("Put the documents of all files in one random order.")
    ] = False
    seed: Annotated[int, Doc("Seed of that order.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityConfig:
    """Who the model says it is."""

    identity: Annotated[bool, Doc("Mix in the identity dialogues.")] = True
    assistant_name: Annotated[str, Doc("The model's name.")] = "MiniLLM"
    author: Annotated[str, Doc("Who made it.")] = "the minillm project"
    author_zh: Annotated[str, Doc("Who made it, in Chinese; empty: the same.")] = "minillm 项目"
    identity_repeat: Annotated[
        int, Doc("How often each identity dialogue is asked, in other words each time.")
    ] = 4
    identity_count: Annotated[
        int,
        Doc("How many of these to mix in; 0: 200, or all of them with the bundled dialogues."),
    ] = 0

    def __post_init__(self) -> None:
        """Reject a model without a name."""
        check_range(self, "identity_repeat", 1, 1000)
        check_range(self, "identity_count", 0, 1_000_000)
        if not self.assistant_name.strip() or not self.author.strip():
            raise ConfigError(
                f"the model needs a name and an author: `{self.assistant_name}`, `{self.author}`",
                hint="pass --assistant-name NAME --author NAME, or --no-identity",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSftConfig:
    """`minillm prepare-sft`."""

    data: Annotated[
        Path, Doc("File or folder of dialogues: JSONL, parquet, or SFT parquet; or `bundled`.")
    ] = Path(paths.BUNDLED)
    out: Annotated[Path, Doc("SFT parquet to write.")] = paths.SFT_PARQUET
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; or `bundled`; or `auto`: data/tokenizer, else bundled.")
    ] = Path("auto")
    sequence_length: Annotated[int, Doc("Longest row and longest dialogue, in tokens.")] = 512
    min_tokens: Annotated[int, Doc("Shortest dialogue, in tokens.")] = 0
    pack: Annotated[bool, Doc("Pack several dialogues into one row.")] = True
    padded: Annotated[bool, Doc("Fill all rows up, in the layout of the published sets.")] = False
    max_dialogues: Annotated[
        int, Doc("Sample this many dialogues where there are more; 0 takes all.")
    ] = 50_000
    multi_turn_ratio: Annotated[
        float, Doc("Share of a sample that has several turns, 0 to 1, as far as there are enough.")
    ] = 0.2
    balance: Annotated[
        bool, Doc("Sample all types alike, and turns by their ratio; else as they come.")
    ] = True
    skip_bad: Annotated[
        bool, Doc("Count lines that are no dialogue, instead of stopping at the first.")
    ] = False
    charts: Annotated[bool, Doc("Draw lengths, types and fill beside the file.")] = True
    show_mask: Annotated[
        int | None,
        Doc("Draw which tokens of this row (from 0) of the SFT parquet see each other, only that."),
    ] = None
    backend: Annotated[
        Literal["auto", "gigatoken", "tokenizers"],
        Doc("Library that encodes; the ids are the same. `auto`: gigatoken where it pays."),
    ] = "auto"
    workers: Annotated[int, Doc("Processes; 0 is one per core.")] = 0
    seed: Annotated[int, Doc("Seed of sampling and order.")] = 0
    persona: IdentityConfig = field(default_factory=IdentityConfig)

    def __post_init__(self) -> None:
        """Reject empty rows and impossible samples."""
        check_range(self, "sequence_length", 16, 1_000_000)
        check_range(self, "min_tokens", 0, self.sequence_length)
        check_range(self, "multi_turn_ratio", 0, 1)
        check_range(self, "max_dialogues", 0, 2**31 - 1)
        check_range(self, "workers", 0, 256)
        if self.show_mask is not None:
            check_range(self, "show_mask", 0, 2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadConfig:
    """`minillm download`."""

    sets: Annotated[
        tuple[str, ...], Doc("Numbers, names, or a model's hub id; none: choose from the catalog.")
    ] = ()
    out: Annotated[Path, Doc("Folder below which each set gets its place.")] = paths.DATA
    hub: Annotated[
        Literal["auto", "modelscope", "huggingface"],
        Doc("Where to fetch from; `auto` tries each hub that has the set."),
    ] = "auto"
    source: Annotated[
        Path | None, Doc("Take the files from this folder instead of a hub, checked alike.")
    ] = None
    workers: Annotated[int, Doc("Files fetched at a time.")] = 4
    verify: Annotated[
        bool, Doc("Hash what is there again instead of trusting its size and time.")
    ] = False
    dry_run: Annotated[bool, Doc("List files and sizes, fetch nothing.")] = False

    def __post_init__(self) -> None:
        """Reject a download that never begins."""
        check_range(self, "workers", 1, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """`minillm inspect`."""

    path: Annotated[Path, Doc("File or folder to look at.")] = paths.DATA
    samples: Annotated[int, Doc("Samples to show.")] = 3
    seed: Annotated[int, Doc("Seed of the choice of samples.")] = 0
    tokenizer: Annotated[
        Path, Doc("Tokenizer folder; or `bundled`; or `auto`: by fingerprint, or the one nearby.")
    ] = Path("auto")
    text_column: Annotated[str, Doc("Name of the text column or JSON key.")] = "text"
    verify: Annotated[bool, Doc("Also compute sha256 sums, and look at every weight.")] = False
    json: Annotated[bool, Doc("Print JSON instead of text.")] = False

    def __post_init__(self) -> None:
        """Reject a negative number of samples."""
        check_range(self, "samples", 0, 1000)
