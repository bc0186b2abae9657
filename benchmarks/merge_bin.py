"""`minillm merge-bin` of token files against `cat` of the same files.

    python benchmarks/merge_bin.py [--folder DIR] [--parts 4] [--megabytes 512] [--turns 3]

In turns, from the page cache, into a new file each time after a `sync`; the best turn of each
counts. `merge-bin --verify` checks the sha256 of each part, computes that of the whole, and has it
all on the disk (fsync) when it ends; beside it stands `cat` with a `sync` of the file. Time is the
whole command's, from start to exit; memory is the process's largest resident set.
"""

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def make_parts(folder: Path, parts: int, megabytes: int) -> list[Path]:
    """Write token files of random ids in documents of 1,000, once."""
    from minillm import paths
    from minillm.data.binfile import BinWriter
    from minillm.data.manifest import TokenizerFacts
    from minillm.data.tokenizer import load_tokenizer

    facts = TokenizerFacts.of(load_tokenizer(paths.BUNDLED_TOKENIZER))
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"part-{index}.bin" for index in range(parts)]
    for path in made:
        if path.is_file():
            continue
        with BinWriter(path, facts) as writer:
            for _ in range(megabytes):
                lengths = np.full(512, 1023)
                ids = draw.integers(1, 32_000, lengths.sum(), dtype=np.uint16)
                writer.extend(ids, lengths, ids.size * 4)
    return made


def run(command: list[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Return seconds and peak MB of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = float(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        time.sleep(0.01)
    assert process.returncode == 0, process.returncode
    return time.perf_counter() - begin, peak / 1000


def main() -> None:
    """Measure in turns and print a Markdown row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"))
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    tokens = args.folder / "tokens"
    parts = make_parts(tokens, args.parts, args.megabytes)
    out = args.folder / "out.bin"
    names = " ".join(map(str, parts))
    merge = [sys.executable, "-m", "minillm", "merge-bin", "--data", str(tokens), "--out", str(out)]
    commands = {
        "cat": ["sh", "-c", f"cat {names} > {out}"],
        "merge-bin": merge,
        "cat and sync": ["sh", "-c", f"cat {names} > {out} && sync {out}"],
        "merge-bin --verify": [*merge, "--verify"],
        "merge-bin --shuffle-documents": [*merge, "--shuffle-documents"],
        "minillm --version": [sys.executable, "-m", "minillm", "--version"],
    }
    for part in parts:
        part.read_bytes()  # into the page cache
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.turns):
        for name, command in commands.items():
            for file in args.folder.glob("out.bin*"):
                file.unlink()
            os.sync()
            found = run(command)
            best[name] = min(best.get(name, found), found)
    for file in args.folder.glob("out.bin*"):
        file.unlink()
    where = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    versions = f"Python {platform.python_version()}, Linux {platform.release()}"
    print(f"{args.parts} x {args.megabytes} MiB, {where}, {versions}, {datetime.date.today()}\n")
    print("| what | s | / cat | peak MB |\n|---|---|---|---|")
    for name, (seconds, peak) in best.items():
        print(f"| `{name}` | {seconds:.2f} | {seconds / best['cat'][0]:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
