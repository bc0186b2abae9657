"""Tokenizer folders: load, find by fingerprint, wrap a trained one, measure token lengths.

A folder holds `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, and loads with
transformers' `AutoTokenizer`. The pre-tokenizer is Qwen2's, which llama.cpp knows by name, without
Qwen2's NFC normalizer: decoding an encoded text gives back the very same text. The price: a
letter written in two code points (`e` + accent) is not the token of the one-code-point form.

transformers is imported where a tokenizer is loaded, not before: `merge-bin` and the workers of
`tokenize` do without it, and without its 60 MB and most of a second.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from minillm import paths
from minillm.errors import InputError
from minillm.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
SEPARATOR = "<|im_end|>"
ADDED = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Tokens after the base vocabulary, in this order."""

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""ChatML. Assistant text is trimmed, so that the tokens a model learns are those it is asked for
after `<|im_start|>assistant\\n`; only the last assistant turn keeps its `<think>` part."""

MAX_LENGTH = 32_768
"""`model_max_length` of the tokenizers we make: transformers warns beyond it, nothing is cut."""

_NOT_HASHED = ("truncation", "padding", "post_processor")


def load_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder; gives it the chat template and `<|im_end|>` as eos if it has none.

    Raises:
        InputError: No such folder, no `tokenizer.json` in it, or a broken one.
    """
    _read_json(_json_path(path))
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            path, local_files_only=True
        )
    except Exception as err:  # tokenizers raises bare Exception on a malformed tokenizer.json
        raise _broken(path, err) from err
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None and SEPARATOR in vocabulary:
        tokenizer.eos_token = SEPARATOR
    if tokenizer.pad_token is None and PAD in vocabulary:
        tokenizer.pad_token = PAD
    if tokenizer.chat_template is None and all(token in vocabulary for token in ADDED):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def resolve_tokenizer(given: Path) -> Path:
    """Return the folder meant by `bundled`, `auto` or a path.

    `auto` is `data/tokenizer` where `train-tokenizer` left one, else the bundled tokenizer.

    Raises:
        InputError: The folder holds no tokenizer.
    """
    if given.as_posix() == "auto":
        return paths.TOKENIZER if _is_tokenizer(paths.TOKENIZER) else paths.BUNDLED_TOKENIZER
    folder = paths.resolve(given, paths.BUNDLED_TOKENIZER)
    _json_path(folder)
    return folder.parent if folder.is_file() else folder


def find_tokenizer(fp: str, near: Iterable[Path] = ()) -> Path:
    """Return the tokenizer folder whose fingerprint is `fp`.

    Args:
        fp: The fingerprint in a manifest.
        near: Folders to try, and a `tokenizer` folder in them, before `data/tokenizer` and the
            bundled tokenizer.

    Raises:
        InputError: None of them has it.
    """
    nearby = [folder for base in near for folder in (base, base / "tokenizer")]
    tried = [*nearby, paths.TOKENIZER, paths.BUNDLED_TOKENIZER]
    for folder in tried:
        if _is_tokenizer(folder) and fingerprint(folder) == fp:
            return folder
    names = ", ".join(f"`{folder}`" for folder in tried)
    raise InputError(
        f"the data was made with tokenizer {fp[:12]}…, which is none of {names}",
        hint="name the folder of the tokenizer that made the data: `--tokenizer FOLDER`",
    )


def fingerprint(source: "Path | PreTrainedTokenizerFast") -> str:
    """Return the sha256 of what a tokenizer does to text, in hex.

    It is taken over `tokenizer.json` in canonical form: sorted keys, no white space, UTF-8, merges
    as pairs, without null and false values (newer versions of `tokenizers` write more of them),
    without the truncation and padding of the last call, and without the post-processor (it only
    adds special tokens, which token files never ask for, and transformers rewrites it). So a
    tokenizer keeps its fingerprint when transformers loads it and saves it again.

    Args:
        source: A `tokenizer.json`, its folder, or a loaded tokenizer.

    Raises:
        InputError: There is no readable `tokenizer.json`.
    """
    if isinstance(source, Path):
        path = _json_path(source)
        stat = path.stat()
        return _file_fingerprint(path, stat.st_mtime_ns, stat.st_size)
    return _digest(json.loads(source.backend_tokenizer.to_str()))


@cache
def _file_fingerprint(path: Path, _mtime_ns: int, _size_bytes: int) -> str:
    return _digest(_read_json(path))


def _digest(tree: dict[str, Any]) -> str:
    tree = {key: value for key, value in tree.items() if key not in _NOT_HASHED}
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        tree["model"] = {**model, "merges": merges}
    text = json.dumps(_prune(tree), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _prune(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item is not False}
    return [_prune(item) for item in value] if isinstance(value, list) else value


def find_separator(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the id that ends a document: `<|im_end|>`, or the eos of a foreign tokenizer.

    Raises:
        InputError: The tokenizer has neither.
    """
    found = tokenizer.get_vocab().get(SEPARATOR, tokenizer.eos_token_id)
    if found is None:
        raise InputError(
            f"the tokenizer `{tokenizer.name_or_path}` has neither `{SEPARATOR}` nor an eos token",
            hint="use one that has: `--tokenizer bundled`",
        )
    return int(found)


def plain_encoder(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """Return an encoder that reads `<|im_end|>` and its like as ordinary characters.

    For text that nobody vouches for: no document and no user can write a control token.
    """
    encoder: Tokenizer = Tokenizer.from_str(plain_json(tokenizer))
    return encoder


def plain_json(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the `tokenizer.json` of `plain_encoder`."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return json.dumps(tree)


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> npt.NDArray[np.int32]:
    """Return how many UTF-8 bytes of text each token stands for; 0 for added tokens.

    Returns:
        int32 array of shape (len(tokenizer),), so that `lengths[ids].sum()` is the size of a text.

    Raises:
        InputError: The tokenizer is not byte-level.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if '"ByteLevel"' not in json.dumps(tree.get("decoder")):
        raise InputError(
            f"the tokenizer `{tokenizer.name_or_path}` is not byte-level, so the bytes of a text "
            "cannot be counted from its tokens",
            hint="use a byte-level tokenizer: `--tokenizer bundled`",
        )
    lengths = np.zeros(len(tokenizer), dtype=np.int32)
    added = {item["id"] for item in tree["added_tokens"]}
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            lengths[index] = len(token)  # byte-level: one printable character per byte
    return lengths


def wrap(backend: Tokenizer) -> "PreTrainedTokenizerFast":
    """Give a trained tokenizer its special tokens and chat template, ready to save."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SEPARATOR,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a tokenizer folder that transformers 4 and the tools built on it can load too."""
    tokenizer.save_pretrained(folder)
    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_bytes())
    # transformers 5 writes its own new class name and where it loaded from
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    write_text(place, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _json_path(path: Path) -> Path:
    """Return the `tokenizer.json` that a folder or file path means."""
    if path.is_file():
        return path
    if _is_tokenizer(path):
        return path / "tokenizer.json"
    what = f"no `tokenizer.json` in `{path}`" if path.is_dir() else f"no tokenizer at `{path}`"
    raise InputError(
        what, hint="run `minillm train-tokenizer`, or use the one in the package: `bundled`"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise _broken(path, err) from err
    if not isinstance(tree, dict) or "model" not in tree:
        raise _broken(path, "no `model` in it")
    return tree


def _broken(path: Path, why: object) -> InputError:
    return InputError(
        f"`{path}` is not a tokenizer: {why}",
        hint="run `minillm train-tokenizer`, or use the one in the package: `bundled`",
    )
