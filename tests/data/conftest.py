"""A tokenizer and some text that the data tests share."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data.tokenizer import load_tokenizer, save_tokenizer, wrap
from minillm.data.train_tokenizer import train_backend

WORDS = [
    "春眠不觉晓",
    "处处闻啼鸟",
    "，",
    "the",
    "quick",
    "brown",
    "fox",
    "🌍",
    "👩\u200d👩\u200d👧",
]
WORDS += ["over,", "2024年", "naïve", "Ελλάδα\n", "<|im_end|>", "e\u0301t\u00e9"]


def _make_texts(count: int, seed: int = 0, num_words: int = 30) -> list[str]:
    """Words in random order: Chinese, English, emoji, digits, and a control token spelled out."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=1 + draw.randrange(num_words))) for _ in range(count)]


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    return _make_texts


@pytest.fixture(scope="session")
def bundled() -> PreTrainedTokenizerFast:
    return load_tokenizer(paths.BUNDLED_TOKENIZER)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 base tokens, other than the bundled one."""
    folder = tmp_path_factory.mktemp("small")
    save_tokenizer(wrap(train_backend(iter([_make_texts(200)]), 300)), folder)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(small_folder)
