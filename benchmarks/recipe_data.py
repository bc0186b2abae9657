"""Token files for `recipe.py`: tokenizer, training text, held-out text, overlapping windows."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minillm.data.binfile import TokenFile
from minillm.data.manifest import manifest_path
from minillm.data.tokenizer import load_tokenizer

VOCAB_SIZE = 6_140
LENGTH, OVERLAP = 512, 0.1

# Passes over a source; below 1, a share of its documents. Verse would otherwise be half of all.
WEIGHTS = {
    "sanguo": 1.5,
    "dict": 0.7,
    "idiom": 0.7,
    "poem_tang": 0.7,
    "poem_song": 0.3,
    "poem_ci": 0.3,
    "poem_qu": 0.3,
    "austen": 2.0,
    "wiki_en": 3.0,
}
WEIGHTS |= dict.fromkeys(
    ("lohelp_zh", "lohelp_en", "man_zh", "handbook_zh", "handbook_en", "kernel_en", "kernel_zh"),
    0.7,
)


def prepare(corpora: Sequence[Path], folder: Path) -> None:
    """Write tokenizer/, train.bin, overlap.bin and val.bin into `folder`, if not there.

    Two documents of a hundred are held out before any is repeated; texts that occur twice count
    once. `overlap.bin` holds the windows of 512 tokens that begin every 461: read without overlap
    it gives the published windows, but for the last label of each, which is another window's.
    """
    if (folder / "overlap.bin").is_file():
        return
    draw = random.Random(0)
    train: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    seen: set[str] = set()
    for corpus in corpora:
        for row in pq.read_table(corpus).to_pylist():
            if row["text"] in seen:
                continue
            seen.add(row["text"])
            weight = WEIGHTS.get(row["source"], 1.0)
            is_held = draw.random() < 0.02
            times = int(weight) + (draw.random() < weight % 1)
            (held if is_held else train).extend([row] * (min(times, 1) if is_held else times))
    draw.shuffle(train)
    draw.shuffle(held)
    for name, rows in (("train", train), ("val", held)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{name}.parquet")
    _run("prepare-tokenizer", "--data", folder / "train", "--out", folder / "sample",
         "--sample-ratio", 0.3)  # fmt: skip
    _run("train-tokenizer", "--data", folder / "sample", "--out", folder / "tokenizer",
         "--vocab-size", VOCAB_SIZE)  # fmt: skip
    for name in ("train", "val"):
        _run("tokenize", "--data", folder / name, "--out", folder, "--name", name,
             "--tokenizer", folder / "tokenizer")  # fmt: skip
    _write_overlap(folder)


def _write_overlap(folder: Path) -> None:
    tokens = TokenFile.open(folder / "train.bin").tokens
    stride = LENGTH - int(LENGTH * OVERLAP)
    starts = range(0, len(tokens) - LENGTH, stride)
    path = folder / "overlap.bin.part"
    np.concatenate([tokens[start : start + LENGTH] for start in starts]).tofile(path)
    path = path.rename(folder / "overlap.bin")
    manifest = TokenFile.scan(path, load_tokenizer(folder / "tokenizer")).manifest
    manifest.write(manifest_path(path))


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "minillm", *map(str, words)], check=True)
