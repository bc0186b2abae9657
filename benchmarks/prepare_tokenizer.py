"""`prepare-tokenizer` on hundreds of generated parquet files: quotas, memory, repeatability.

    python benchmarks/prepare_tokenizer.py --work /tmp/sampling --files 200 800

Prints one Markdown row per number of files. Each row comes from the real command in a process of
its own, whose peak memory the system reports; the quotas are checked against the generator's own
counts, not the command's.
"""

import argparse
import datetime
import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from minillm.device import describe

NAMES = [
    *(
        "网页",
        "维基百科",
        "法律法规",
        "图书",
        "news",
        "forum",
        "code",
        "古诗词",
        "百科问答",
        "papers",
    ),
    *(
        "subtitles",
        "patents",
        "handbook",
        "论坛",
        "exam",
        "recipes",
        "travel",
        "医学",
        "rare",
        "one",
    ),
]
"""Sources; each half as frequent as the one before, down to some with a handful of rows."""


def generate(folder: Path, num_files: int, rows_per_file: int) -> Counter[str]:
    """Write the files one at a time and return the number of rows by source."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    letters = np.array(list("的一是不了人我在有他这为之大来以个中上们 abcdefghijklmnopqrstuvwxyz"))
    pool = ["".join(draw.choice(letters, size=n)) for n in draw.integers(40, 900, size=4000)]
    shares = 0.5 ** np.arange(len(NAMES))
    counts: Counter[str] = Counter()
    for number in range(num_files):
        picks = draw.integers(0, len(pool), size=rows_per_file)
        codes = draw.choice(len(NAMES), size=rows_per_file, p=shares / shares.sum())
        texts = [f"{number}-{row} {pool[pick]}" for row, pick in enumerate(picks)]
        sources = [NAMES[code] for code in codes]
        counts.update(sources)
        table = pa.table({"text": texts, "source": sources})
        place = folder / f"{number // 100:03d}" / f"{number:05d}.parquet"
        place.parent.mkdir(exist_ok=True)
        pq.write_table(table, place, compression="zstd", use_dictionary=["source"])
    return counts


def sample(data: Path, out: Path, ratio: str, seed: int) -> tuple[float, int]:
    """Run the command; return seconds and its peak memory in bytes."""
    command = [sys.executable, "-m", "minillm", "prepare-tokenizer", "--data", str(data)]
    command += ["--out", str(out), "--sample-ratio", ratio, "--seed", str(seed)]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.monotonic() - began, peak


def high_water(pid: int) -> int:
    """Return the most memory a process ever held, in bytes; 0 if it is gone.

    Unlike `ru_maxrss`, this does not begin with what the parent held when it forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def digest(folder: Path) -> str:
    """Return one sha256 over the names and bytes of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def worst_quota(folder: Path, counts: Counter[str], ratio: Fraction) -> tuple[Fraction, int]:
    """Return the largest distance of a source from its exact share, in rows, and all rows.

    A source whose share is below one row keeps one.
    """
    kept: Counter[str] = Counter()
    for part in sorted(folder.glob("*.parquet")):
        kept.update(pq.read_table(part, columns=["source"])["source"].to_pylist())
    distances = [
        abs(kept[name] - max(Fraction(1), count * ratio)) for name, count in counts.items()
    ]
    return max(distances), kept.total()


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(work: Path, num_files: int, rows_per_file: int, ratio: str) -> str:
    """Generate, sample three times, check, and return the Markdown row."""
    data, outs = work / "raw", [work / name for name in ("a", "b", "c")]
    for old in (data, *outs):
        shutil.rmtree(old, ignore_errors=True)
    counts = generate(data, num_files, rows_per_file)
    num_bytes = size_of(data)
    runs = [sample(data, out, ratio, seed) for out, seed in zip(outs, (0, 0, 1), strict=True)]
    worst, num_kept = worst_quota(outs[0], counts, Fraction(ratio))
    same = digest(outs[0]) == digest(outs[1])
    other = digest(outs[0]) != digest(outs[2])
    seconds = min(run[0] for run in runs)
    peak = max(run[1] for run in runs)
    return (
        f"| {num_files} | {num_bytes / 1e9:.2f} GB | {counts.total():,} | {num_kept:,} "
        f"| {float(worst):.3f} rows | {peak / 1e6:.0f} MB | {seconds:.1f} s "
        f"| {num_bytes / seconds / 1e6:.0f} MB/s | {'yes' if same else 'NO'} "
        f"| {'yes' if other else 'NO'} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--files", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--rows", type=int, default=5000, help="rows per file")
    parser.add_argument("--ratio", default="0.05")
    args = parser.parse_args(arguments)
    print(f"{datetime.date.today()}, {describe(torch.device('cpu'))},", end=" ")
    print(f"Python {platform.python_version()}, pyarrow {pa.__version__}, ratio {args.ratio}\n")
    print(
        "| files | on disk | rows | kept | furthest from its share | peak memory | time | speed ",
        end="",
    )
    print("| same seed, same bytes | other seed, other bytes |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---|---|")
    for num_files in args.files:
        print(measure(args.work, num_files, args.rows, args.ratio), flush=True)


if __name__ == "__main__":
    main()
