"""`minillm inspect FOLDER` of a tokenizer."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data.chat import ChatEncoder
from minillm.data.inspect_report import Lengths, Report, Sample, Table
from minillm.data.tokenizer import (
    find_separator,
    fingerprint,
    load_tokenizer,
    plain_encoder,
    token_byte_lengths,
)
from minillm.errors import InputError
from minillm.settings import InspectConfig

_PROBES = {
    "Chinese": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少？人工智能正在改变世界。",
    "English": "It is a truth universally acknowledged, that a single man must be in want.",
    "digits": "3.14159 2026-11-24 1,000,000",
    "code": "def f(x):\n    return x ** 2\n",
    "emoji": "👩\u200d👩\u200d👧 🌍 e\u0301",
}
_LONGEST = 10


def inspect_tokenizer(folder: Path, cfg: InspectConfig) -> Report:
    """Describe a tokenizer folder.

    Args:
        folder: One with a `tokenizer.json`, or that file.
        cfg: What to show.
    """
    report = Report(folder.as_posix(), "tokenizer")
    try:
        tokenizer = load_tokenizer(folder)
        sha256 = fingerprint(folder)
    except InputError as error:
        report.problems.append(str(error))
        return report
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model = tree["model"]
    report.facts = {
        "vocabulary": len(tokenizer),
        "base_tokens": len(model.get("vocab", ())),
        "merges": len(model.get("merges", ())),
        "model": model.get("type", "?"),
        "normalizer": _kinds(tree.get("normalizer")),
        "pre_tokenizer": _kinds(tree.get("pre_tokenizer")),
        "fingerprint": sha256,
        "is_bundled": sha256 == fingerprint(paths.BUNDLED_TOKENIZER),
        "eos": f"{tokenizer.eos_token} ({tokenizer.eos_token_id})",
        "pad": f"{tokenizer.pad_token} ({tokenizer.pad_token_id})",
        "model_max_length": min(tokenizer.model_max_length, 1 << 40),
    }
    special = [[item["id"], item["content"]] for item in tree["added_tokens"]]
    report.tables.append(Table("added tokens", ["id", "text"], special))
    has_gaps = _check(tokenizer, folder, report)
    _probe(tokenizer, report)
    if has_gaps:
        return report
    try:
        sizes = token_byte_lengths(tokenizer)
    except InputError as error:
        report.notes.append(str(error))
        return report
    lengths = Lengths()
    lengths.add(sizes[sizes > 0])
    report.bars.append(lengths.histogram("bytes per token of the vocabulary"))
    order = sorted(range(len(sizes)), key=lambda i: (-int(sizes[i]), i))[: _LONGEST * cfg.samples]
    texts = [repr(tokenizer.decode([i])) for i in order[:_LONGEST]]
    if texts:
        report.samples.append(Sample("longest tokens", "  ".join(texts)))
    return report


def _kinds(tree: Any) -> str:
    """Return the kinds of a part of `tokenizer.json`, those of a sequence joined."""
    if not isinstance(tree, dict):
        return "none"
    inner = tree.get("pretokenizers") or tree.get("normalizers")
    return ", ".join(_kinds(part) for part in inner) if inner else str(tree.get("type", "?"))


def _check(tokenizer: PreTrainedTokenizerFast, folder: Path, report: Report) -> bool:
    """Look for what data and models need; return whether ids are missing or used twice."""
    ids = set(tokenizer.get_vocab().values())
    has_gaps = len(ids) != len(tokenizer.get_vocab()) or max(ids) + 1 != len(ids)
    if has_gaps:
        report.problems.append(
            f"its {len(tokenizer.get_vocab()):,} tokens do not have the ids 0 to {len(ids) - 1:,}: "
            f"the largest is {max(ids):,}"
        )
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        report.notes.append("it has no `tokenizer_config.json`: eos and pad are guessed")
    try:
        report.facts["separator"] = find_separator(tokenizer)
    except InputError as error:
        report.problems.append(str(error))
    if tokenizer.chat_template is None:
        report.facts["chat_template"] = "none"
        return has_gaps
    try:
        ChatEncoder(tokenizer)
        report.facts["chat_template"] = "the ChatML of minillm"
    except InputError as error:
        report.facts["chat_template"] = "another one"
        report.notes.append(str(error))
    return has_gaps


def _probe(tokenizer: PreTrainedTokenizerFast, report: Report) -> None:
    """Encode a line of each kind: bytes per token, and whether decoding gives it back."""
    encoder = plain_encoder(tokenizer)
    rows: list[list[Any]] = []
    for name, text in _PROBES.items():
        ids = encoder.encode(text).ids
        if tokenizer.decode(ids) != text:
            report.problems.append(f"the probe {name} is not the same after encoding and decoding")
        rows.append([name, len(ids), round(len(text.encode()) / max(1, len(ids)), 3)])
    report.tables.append(Table("a line of each", ["kind", "tokens", "bytes per token"], rows))
