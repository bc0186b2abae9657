"""Byte-level BPE tokenizers in GGUF files, written and read.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) where `tokenizer.json` spells it out.
The table here holds those whose token ids were found equal to llama.cpp's.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minillm.errors import InputError

Fields = dict[str, Any]

_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "qwen2": (_SHORT_FORMS + r"\p{N}" + _REST,),
    "llama-bpe": (_SHORT_FORMS + r"\p{N}{1,3}" + _REST,),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
_SAME = {
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("phi-2", "mpt", "olmo"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
}
"""Names by which llama.cpp splits text in the same way."""

NAMES = ("gpt-2", "smollm", *_SPLITS)
_WHOLE_WORDS = ("llama-bpe",)
"""Where llama.cpp takes a word that is a token as that token, without merges."""


def make_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that llama.cpp uses under a name.

    Raises:
        InputError: It is none of those known here.
    """
    name = _SAME.get(name, name)
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps: list[Any]
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif name in _SPLITS:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[name]]
    else:
        raise InputError(
            f"the pre-tokenizer `{name}` of the GGUF file is not known here",
            hint="import the model's safetensors folder, which spells it out",
        )
    regex = name == "smollm"
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )


def pre_tokenizer_name(tree: dict[str, Any]) -> str:
    """Return the name by which llama.cpp knows the pre-tokenizer of a `tokenizer.json`.

    Raises:
        InputError: It knows none like it.
    """
    steps = _steps(tree.get("pre_tokenizer"))
    if not tree.get("normalizer"):
        for name in NAMES:
            if steps == _steps(json.loads(make_pre_tokenizer(name).__getstate__())):
                return name
    raise InputError(
        "llama.cpp knows no pre-tokenizer like this tokenizer's, and would read text differently",
        hint="train with the bundled tokenizer, or with one of `minillm train-tokenizer`",
    )


def _steps(tree: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a pre-tokenizer as a flat list, without what does not change tokens."""
    tree = tree or {}
    steps = tree["pretokenizers"] if tree.get("type") == "Sequence" else [tree]
    defaults = {"add_prefix_space": True, "use_regex": True}
    return [
        (defaults if step.get("type") == "ByteLevel" else {})
        | {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in steps
    ]


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, config: Any) -> None:
    """Write vocabulary, merges, special tokens and chat template to a GGUF file.

    Raises:
        InputError: llama.cpp would tokenize in another way.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE" or tree["model"].get("byte_fallback"):
        raise _cannot(f"a {tree['model']['type']} tokenizer that is not byte-level BPE")
    name = pre_tokenizer_name(tree)
    if bool(tree["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        _refuse_unreachable(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens, types = _list_tokens(tokenizer, tree, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tree["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    # without an eos, llama.cpp takes token 11
    ids = {"eos": config.eos_token_id if isinstance(config.eos_token_id, int) else None}
    for key in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{key}_token_id")
        index = ids.get(key) if index is None else index
        if index is not None:
            getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(_adds_bos(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _cannot(what: str) -> InputError:
    return InputError(
        f"GGUF export does not take {what}", hint="export it with `--to official` instead"
    )


def _refuse_unreachable(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a vocabulary where it matters whether whole words are looked up before merging."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {item["content"] for item in tree["added_tokens"]}
    tree["model"]["ignore_merges"] = False
    tree |= {"pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    merged = Tokenizer.from_str(json.dumps(tree))
    words = [word for word in tree["model"]["vocab"] if word not in added]
    for word, found in zip(words, merged.encode_batch(words), strict=True):
        if len(found.ids) != 1:
            raise _cannot(f"a tokenizer whose token `{word}` is not what its merges make of it")


def _list_tokens(
    tokenizer: PreTrainedTokenizerFast, tree: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    import gguf

    kinds = gguf.TokenType
    added = {item["id"]: item for item in tree["added_tokens"]}
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens: list[str] = []
    types: list[int] = []
    for index in range(size):
        item = added.get(index)
        tokens.append(item["content"] if item else names.get(index, f"[PAD{index}]"))
        if item:
            types.append(kinds.CONTROL if item["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if index in names else kinds.UNUSED)
    return tokens, types


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    around = tokenizer.encode("")
    if around not in ([], [tokenizer.bos_token_id]):
        raise _cannot("a tokenizer that adds more than a bos token to each text")
    return bool(around)


def read_tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        InputError: It is not byte-level BPE with a pre-tokenizer known here.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            f"the tokenizer of the GGUF file is of kind `{kind}`, only byte-level BPE is read",
            hint="import the model's safetensors folder instead",
        )
    name = str(fields.get("tokenizer.ggml.pre", "default"))
    backend = _make_backend(fields, make_pre_tokenizer(name), _SAME.get(name, name) in _WHOLE_WORDS)
    tokens = fields["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    named = {f"{ours}_token": tokens[index] for ours, index in found.items() if index is not None}
    if fields.get("tokenizer.ggml.add_bos_token", name in _WHOLE_WORDS) and "bos_token" in named:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, found["bos"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _make_backend(fields: Fields, pre: pre_tokenizers.PreTokenizer, whole_words: bool) -> Tokenizer:
    import gguf

    kinds = gguf.TokenType
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type", [kinds.NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    is_added = [kind in (kinds.CONTROL, kinds.USER_DEFINED) for kind in types]
    size = len(tokens)
    while size and is_added[size - 1]:
        size -= 1  # added after training, so no part of the BPE
    if kinds.UNUSED in types:
        size = len(tokens)
    vocabulary = {tokens[i]: i for i in range(size) if types[i] != kinds.UNUSED}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == kinds.CONTROL, normalized=False)
        for token, kind, is_one in zip(tokens, types, is_added, strict=True)
        if is_one
    ]
    backend.add_tokens(added)
    backend.add_special_tokens([token for token in added if token.special])
    wrong = [i for i in range(size, len(tokens)) if backend.token_to_id(tokens[i]) != i]
    if wrong or len(set(tokens)) != len(tokens):
        raise InputError(
            "the GGUF file has a token twice", hint="import the model's safetensors folder instead"
        )
    return backend
