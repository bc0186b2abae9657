"""The published sets, by number and name: where they are, how big, and which command wants them.

Only facts that outlive a release of a set stand here. Exact sizes and checksums come from the
hub's listing at download time, so a set that its author replaces needs no change of this file;
the price is that a set is only as trustworthy as the hub that lists it.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from minillm.errors import ConfigError

HubName = Literal["modelscope", "huggingface"]

_GB = 10**9
_MB = 10**6


@dataclass(frozen=True, slots=True)
class Place:
    """Where a set can be fetched: the files of one repository that match `pattern`."""

    hub: HubName
    kind: Literal["datasets", "models"]
    repo: str
    pattern: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder inside the repository that holds every match, `""` for its root."""
        folders = {name.rpartition("/")[0] for name in self.pattern}
        return folders.pop() if len(folders) == 1 else ""


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """One row of the catalog.

    Attributes:
        folder: Where its files go, below `--out`.
        what: What it is and what for.
        size_bytes: Rounded; the listing has the exact number. 0: not known before.
        licence: What its authors say; the hub's page of the set has the full text.
        is_archive: The one file is a zip, unpacked after it was verified.
        is_tokenized: Its ids are those of the published tokenizer, which comes with it.
        next_step: The command that takes it from here, empty if there is none; `{folder}` and
            `{file}` stand for where the set and its first file are.
    """

    number: int
    name: str
    what: str
    size_bytes: int
    folder: str
    places: tuple[Place, ...]
    licence: str
    next_step: str = ""
    is_archive: bool = False
    is_tokenized: bool = False


def _mini_llm(name: str) -> tuple[Place, ...]:
    return (Place("modelscope", "datasets", "wangkunqing/mini_llm_dataset", (name,)),)


_FINEWEB = ("opencsg/Fineweb-Edu-Chinese-V2.1", ("4_5/*.parquet",))
_OPENCSG = "Apache-2.0 *"
LICENCE_NOTE = (
    "its page also asks for OpenCSG's community licence: commercial use needs their consent"
)
_APACHE = "Apache-2.0"
_SEE_PAGE = "see its page"

MODEL = "WKQ9411/Mini-Qwen3-Next-160M-A100M-SFT"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Never code and never a pickle: neither is needed, and both run what their author wrote.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    *_TOKENIZER_FILES,
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

TOKENIZER = PublishedSet(
    12,
    "tokenizer",
    "that of sets 4, 5, 7, 8, 9",
    3 * _MB,
    "tokenizer",
    (Place("huggingface", "models", MODEL, _TOKENIZER_FILES),),
    _SEE_PAGE,
)


def _model(number: int, name: str, what: str, size_bytes: int, repo: str) -> PublishedSet:
    return PublishedSet(
        number,
        name,
        what,
        size_bytes,
        f"models/{repo.split('/')[1]}",
        (Place("huggingface", "models", repo, _MODEL_FILES),),
        _SEE_PAGE,
        "minillm chat {folder}",
    )


CATALOG = (
    PublishedSet(
        1,
        "tokenizer-5pct",
        "5 % of set 2, for train-tokenizer",
        3_400 * _MB,
        "sample/tokenizer-5pct",
        _mini_llm("fineweb_edu_sampled_5_percent.zip"),
        _OPENCSG,
        "minillm train-tokenizer --data {folder}",
        is_archive=True,
    ),
    PublishedSet(
        2,
        "fineweb-edu-zh",
        "Chinese web text, best scores",
        70 * _GB,
        "raw/fineweb-edu-zh",
        (
            Place("modelscope", "datasets", *_FINEWEB),
            Place("huggingface", "datasets", *_FINEWEB),
        ),
        _OPENCSG,
        "minillm prepare-tokenizer --data {folder}",
    ),
    PublishedSet(
        3,
        "fineweb-20pct",
        "20 % of set 2, for pretraining",
        14 * _GB,
        "raw/fineweb-20pct",
        _mini_llm("fineweb_edu_sampled_20_percent.zip"),
        _OPENCSG,
        "minillm tokenize --data {folder}",
        is_archive=True,
    ),
    PublishedSet(
        4,
        "fineweb-20pct-bin",
        "set 3 as tokens",
        10 * _GB,
        "tokens",
        _mini_llm("fineweb_edu_sampled_20_percent.bin"),
        _OPENCSG,
        "minillm merge-bin --data {folder}",
        is_tokenized=True,
    ),
    PublishedSet(
        5,
        "deepctrl-bin",
        "set 6 as tokens",
        4 * _GB,
        "tokens",
        _mini_llm("deepctrl.bin"),
        _APACHE,
        "minillm merge-bin --data {folder}",
        is_tokenized=True,
    ),
    PublishedSet(
        6,
        "deepctrl-jsonl",
        "Chinese dialogues, for SFT",
        16 * _GB,
        "dialogues",
        (Place("modelscope", "datasets", "deepctrl/deepctrl-sft-data", ("sft_data_zh.jsonl",)),),
        _APACHE,
        "minillm prepare-sft --data {file}",
    ),
    PublishedSet(
        7,
        "sft-parquet",
        "set 6 as tokens, all/50,200/packed",
        3_700 * _MB,
        "sft",
        _mini_llm("sft_parquet.zip"),
        _APACHE,
        "minillm sft --data {file}",
        is_archive=True,
        is_tokenized=True,
    ),
    PublishedSet(
        8,
        "fineweb-bin",
        "all of set 2 as tokens",
        50 * _GB,
        "tokens",
        _mini_llm("fineweb_edu.bin"),
        _OPENCSG,
        "minillm merge-bin --data {folder}",
        is_tokenized=True,
    ),
    PublishedSet(
        9,
        "yarn-bin",
        "0.1 % of set 2 as tokens, to try",
        40 * _MB,
        "yarn",
        _mini_llm("fineweb_edu_sampled_0.1_percent.bin"),
        _OPENCSG,
        "minillm pretrain --data {file}",
        is_tokenized=True,
    ),
    PublishedSet(
        10,
        "dpo",
        "preference pairs, for DPO",
        160 * _MB,
        "dpo",
        _mini_llm("dpo_data.zip"),
        _SEE_PAGE,
        is_archive=True,
    ),
    PublishedSet(
        11,
        "grpo",
        "JSON repair tasks, for GRPO",
        3 * _MB,
        "grpo",
        _mini_llm("grpo_data.zip"),
        _SEE_PAGE,
        is_archive=True,
    ),
    TOKENIZER,
    _model(13, "qwen3-next-sft", "published chat model, 162M", 650 * _MB, MODEL),
)


def find_sets(wanted: Iterable[str]) -> list[PublishedSet]:
    """Return the sets named by number or name, each once, the tokenizer first where it is needed.

    Args:
        wanted: Words such as `4`, `deepctrl-bin`, `4,5`, or the id of a model on Hugging Face,
            such as `WKQ9411/Mini-Llama3-100M-Base`.

    Raises:
        ConfigError: A word is neither a number nor a name of the catalog.
    """
    words = [word for text in wanted for word in text.replace(",", " ").split()]
    found = {item.name: item for item in map(_find, words)}
    if any(item.is_tokenized for item in found.values()):
        found = {TOKENIZER.name: TOKENIZER} | found
    return list(found.values())


def _find(word: str) -> PublishedSet:
    for item in CATALOG:
        if word in (item.name, str(item.number)):
            return item
    if _REPO_ID.fullmatch(word):
        return _model(0, word.replace("/", "--"), "model", 0, word)
    near = difflib.get_close_matches(word, [item.name for item in CATALOG], n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "`minillm download` lists the sets"
    raise ConfigError(f"no published set is called `{word}`", hint=hint)
