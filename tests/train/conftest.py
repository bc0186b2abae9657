"""A token file of a few kilobytes, made by the real commands' code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minillm.data.tokenize import tokenize
from minillm.data.train_tokenizer import train_tokenizer
from minillm.log import Silent
from minillm.settings import TokenizeConfig, TrainTokenizerConfig

LINES = (
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "寒来暑往，秋收冬藏。闰余成岁，律吕调阳。",
    "The quick brown fox jumps over the lazy dog.",
    "It was the best of times, it was the worst of times.",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs here are compared to the bit with runs in processes that have one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, and `tokens/text.bin` made with it."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [f"{LINES[i % 4]} {i} {LINES[(i * 7) % 4]}" for i in range(400)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    train_tokenizer(
        TrainTokenizerConfig(data=folder / "text.txt", out=folder / "tokenizer", vocab_size=380),
        Silent(),
    )
    tokenize(
        TokenizeConfig(
            data=folder / "text.txt",
            out=folder / "tokens",
            tokenizer=folder / "tokenizer",
            workers=1,
        ),
        Silent(),
    )
    return folder
