"""Dialogues, a small tokenizer and settings that the tests of `prepare_sft` share."""

import json
import tempfile
from pathlib import Path
from typing import Any

from minillm.data.tokenizer import load_tokenizer, save_tokenizer, wrap
from minillm.data.train_tokenizer import train_backend
from minillm.settings import IdentityConfig, PrepareSftConfig

NOBODY = IdentityConfig(identity=False)


def dialogue(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, "source": "test"}


DIALOGUES = [dialogue(f"question {i} " * (1 + i % 7), "answer " * (1 + i % 5)) for i in range(60)]

# a small tokenizer, which loads in no time
_PLACE = tempfile.TemporaryDirectory()
FOLDER = Path(_PLACE.name)
_TEXTS = [turn["content"] for item in DIALOGUES for turn in item["messages"]]
save_tokenizer(wrap(train_backend(iter([_TEXTS]), 270)), FOLDER)
TOKENIZER = load_tokenizer(FOLDER)
VOCAB_SIZE = len(TOKENIZER)


def settings(
    tmp_path: Path, items: list[dict[str, Any]] = DIALOGUES, **knobs: Any
) -> PrepareSftConfig:
    """Write dialogues and return settings that read them."""
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    defaults = {"persona": NOBODY, "sequence_length": 128, "tokenizer": FOLDER}
    defaults |= {"charts": False, "workers": 1}
    return PrepareSftConfig(**{"data": data, "out": tmp_path / "sft.parquet", **defaults, **knobs})
