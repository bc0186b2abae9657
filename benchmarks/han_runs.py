"""Merges learned with and without cutting long runs of Chinese: compression, time, memory.

    python benchmarks/han_runs.py --data FOLDER --max-bytes 20000000

Trains on a random sample and measures on held-out text of the same corpus. The tokenizer that is
kept always has Qwen2's pre-tokenizer, which llama.cpp knows; a cut after N letters is made for
training only. DeepSeek-V3's pre-tokenizer, which llama.cpp also knows, is used for both. Each
variant trains in a process of its own, whose peak memory the system reports.
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers

from minillm.data import train_tokenizer as trainer
from minillm.data.text_sample import TextSample, read_sample
from minillm.data.tokenizer_measure import Fits, measure
from minillm.device import describe
from minillm.log import Silent

DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""The patterns of its published tokenizer.json, one after the other."""

VARIANTS = (
    "whole runs",
    "cut after 16",
    "cut after 12",
    "cut after 8",
    "cut after 4",
    "DeepSeek-V3",
)


def sequence(patterns: tuple[str, ...]) -> Any:
    """Return the pre-tokenizer that splits by each pattern in turn, then goes to bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def train(variant: str, sample: TextSample, vocab_size: int) -> tuple[Tokenizer, float]:
    """Return the tokenizer as it would be kept, and the seconds it took."""
    if variant == "DeepSeek-V3":
        patterns = DEEPSEEK_V3
    elif variant == "whole runs":
        patterns = (trainer.PATTERN,)
    else:
        limit = int(variant.rsplit(" ", 1)[1])
        patterns = (trainer.PATTERN, rf"(?:^[^\p{{L}}\p{{N}}])?\p{{Han}}{{1,{limit}}}")
    trainer._build_pre_tokenizer = lambda: sequence(patterns)  # type: ignore[assignment]
    began = time.perf_counter()
    backend = trainer.train_backend(batches(sample), vocab_size)
    seconds = time.perf_counter() - began
    if variant != "DeepSeek-V3":
        backend.pre_tokenizer = sequence((trainer.PATTERN,))
    return backend, seconds


def batches(sample: TextSample) -> Iterator[list[str]]:
    """Yield the texts to train on."""
    for start in range(0, len(sample.chosen), 256):
        yield [text.text for text in sample.chosen[start : start + 256]]


def run(variant: str, args: argparse.Namespace, send: Any) -> None:
    """Train and measure one variant; send the cells of its row."""
    sample = read_sample(args.data, "text", args.max_bytes, 0, Silent())
    backend, seconds = train(variant, sample, args.vocab_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tree = json.loads(backend.to_str()) | {"added_tokens": []}
    encoder = Tokenizer.from_str(json.dumps(tree))
    fits = measure(variant, backend.get_vocab_size(), encoder, sample.held_out)
    send.send((fits, seconds, peak, sample.text_bytes))


def row(fits: Fits, seconds: float, peak: int, sources: list[str]) -> str:
    """Return one line of the table."""
    groups = [fits.total, *(fits.by_language[name] for name in list(fits.by_language)[:2])]
    groups += [fits.by_source[name] for name in sources]
    cells = [f"{fit.bytes_per_token:.3f}" for fit in groups]
    return f"| {fits.name} | {' | '.join(cells)} | {seconds:.0f} s | {peak / 1e9:.2f} GB |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=20_000_000)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for number, variant in enumerate(args.variants):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(variant, args, send))
        process.start()
        send.close()
        fits, seconds, peak, size = receive.recv()
        process.join()
        if number == 0:
            sources = list(fits.by_source)[:6]
            names = ["all", *list(fits.by_language)[:2], *sources]
            print(f"{datetime.date.today()}, {describe(torch.device('cpu'))}, Python", end=" ")
            print(f"{platform.python_version()}, tokenizers {version('tokenizers')}; trained on")
            print(f"{size / 1e6:.1f} MB, held out {fits.total.text_bytes / 1e6:.1f} MB\n")
            print(f"| training | {' | '.join(names)} | time | memory |")
            print("|---|" + "---:|" * (len(names) + 2), flush=True)
        print(row(fits, seconds, peak, sources), flush=True)


if __name__ == "__main__":
    main()
