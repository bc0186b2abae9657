"""Compression and speed of tokenizers on text that none of them was trained on: a Markdown table.

    python benchmarks/tokenizer.py --tokenizer ours=bundled --text zh=heldout/zh.parquet

A tokenizer is a folder with `tokenizer.json`, a folder with GPT-2's `encoder.json` and
`vocab.bpe`, or a `.tiktoken` file of Qwen's (needs the package `tiktoken`). Control tokens are off,
encoding is single-threaded, speed is the best of three passes over all texts.
"""

import argparse
import base64
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.data.documents import find_files, read_batches
from minillm.data.tokenizer import load_tokenizer, plain_encoder, resolve_tokenizer
from minillm.data.train_tokenizer import PATTERN
from minillm.device import describe

Encode = Callable[[list[str]], int]
"""Number of tokens of some texts."""


def load(place: str) -> tuple[int, Encode]:
    """Return the vocabulary size and the encoder that `place` means."""
    path = Path(place)
    if path.suffix == ".tiktoken":
        return load_tiktoken(path)
    if (path / "vocab.bpe").is_file():
        return load_gpt2(path)
    tokenizer = load_tokenizer(resolve_tokenizer(path))
    encoder = plain_encoder(tokenizer)
    return len(tokenizer), lambda texts: sum(len(encoder.encode(text).ids) for text in texts)


def load_gpt2(folder: Path) -> tuple[int, Encode]:
    """GPT-2: `ByteLevel` splits by GPT-2's own pattern unless told not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    encoder = Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = encoder.get_vocab_size()
    return size, lambda texts: sum(len(encoder.encode(text).ids) for text in texts)


def load_tiktoken(path: Path) -> tuple[int, Encode]:
    """Qwen: ranks in base64, and the pattern that ours shares."""
    import tiktoken

    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    encoder = tiktoken.Encoding(
        path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return len(ranks), lambda texts: sum(len(encoder.encode_ordinary(text)) for text in texts)


def main() -> None:
    """Print one row per tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    args = parser.parse_args()
    texts = {
        name: [text for batch in read_batches(find_files(Path(place))) for text in batch.texts]
        for name, place in (pair.split("=", 1) for pair in args.text)
    }
    sizes = {name: sum(len(t.encode()) for t in batch) for name, batch in texts.items()}
    titles = [f"{name} ({sizes[name] / 1e6:.2f} MB)" for name in texts]
    print(f"Bytes per token; {datetime.date.today()}, {describe(torch.device('cpu'))},", end=" ")
    print(f"Python {platform.python_version()},", end=" ")
    print(f"tokenizers {importlib.metadata.version('tokenizers')}\n")
    print("| tokenizer | vocabulary |", " | ".join(titles), "| MB/s |")
    print("|---|" + "---:|" * (len(texts) + 2))
    for name, place in (pair.split("=", 1) for pair in args.tokenizer):
        vocab_size, encode = load(place)
        cells = [f"{sizes[key] / encode(batch):.2f}" for key, batch in texts.items()]
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            for batch in texts.values():
                encode(batch)
            seconds.append(time.perf_counter() - began)
        speed = sum(sizes.values()) / min(seconds) / 1e6
        print(f"| {name} | {vocab_size:,} |", " | ".join(cells), f"| {speed:.1f} |")


if __name__ == "__main__":
    main()
