"""`minillm tokenize` against a plain loop over `tokenizers`, with memory, workers and kills.

    python benchmarks/token_files.py CORPUS.parquet ... [--folder DIR] [--gigabytes 1] [--large 4]

The corpus (column `text`) is repeated to the wanted size in two ways. `repeated`: its documents as
they are, each time in another order; a cache of words would help, were it not small. `perturbed`:
a tenth of the Han characters and every thirtieth small letter replaced by one drawn from the
corpus, each time others, so that clauses hardly ever come again. The plain loop reads the same
parquet with pyarrow, calls `encode_batch` on 1,000 documents at a time with the library's own
threads (TOKENIZERS_PARALLELISM=true), and writes uint16; it runs before and after each of our runs,
on the first `--baseline-megabytes`, and the mean counts. MB are of UTF-8 text. Peak memory is the
sum of the resident sets of all processes, every 0.1 s.
"""

import argparse
import contextlib
import datetime
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

PLAIN = """
import sys, time
import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

source, target, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
tokenizer = Tokenizer.from_file(sys.argv[4])
size, begin = 0, time.perf_counter()
with open(target, "wb") as out:
    for rows in pq.ParquetFile(source).iter_batches(1000, columns=["text"]):
        texts = rows.column(0).to_pylist()
        ids = []
        for encoding in tokenizer.encode_batch(texts):
            ids.extend(encoding.ids)
            ids.append(32001)
        np.array(ids, dtype=np.uint16).tofile(out)
        size += sum(len(text.encode()) for text in texts)
        if size >= limit:
            break
print(size / (time.perf_counter() - begin) / 1e6)
"""


def read_corpus(files: list[Path]) -> list[str]:
    """Return all documents."""
    return [t for file in files for t in pq.read_table(file, columns=["text"])[0].to_pylist()]


def perturb(texts: list[str], draw: np.random.Generator) -> list[str]:
    """Replace some characters by others of the same kind, drawn from the texts."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4").copy()
    for low, high, share in ((0x4E00, 0x9FFF, 0.1), (0x61, 0x7A, 1 / 30)):
        place = np.flatnonzero((codes >= low) & (codes <= high))
        chosen = place[draw.random(len(place)) < share]
        codes[chosen] = codes[draw.choice(place, len(chosen))]
    whole = codes.tobytes().decode("utf-32-le")
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def make_data(texts: list[str], folder: Path, size_bytes: float, kind: str) -> float:
    """Write parquet files of at least `size_bytes` of text; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    done, index = 0, 0
    while done < size_bytes:
        order = draw.permutation(len(texts)).tolist()
        rows = [texts[i] for i in order]
        rows = perturb(rows, draw) if kind == "perturbed" else rows
        done += len("".join(rows).encode())
        table = pa.table({"text": rows})
        pq.write_table(table, folder / f"{index:04d}.parquet", compression="zstd")
        index += 1
    return done


@contextlib.contextmanager
def peak_memory(process: "subprocess.Popen[bytes]") -> Iterator[list[float]]:
    """Collect the sum of resident sets while a command runs."""
    found = [0.0]
    try:
        yield found
    finally:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            with contextlib.suppress(psutil.Error):
                for one in (parent, *parent.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += one.memory_info().rss
            found[0] = max(found[0], total / 1e6)
            time.sleep(0.1)


def start(data: Path, out: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start the command."""
    command = [sys.executable, "-m", "minillm", "tokenize", "--data", str(data), "--out", str(out)]
    command += ["--name", "all", "--tokenizer", "bundled", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tokenize(data: Path, out: Path, *words: str) -> tuple[float, float, str]:
    """Return seconds, peak MB and sha256 of a run."""
    begin = time.perf_counter()
    process = start(data, out, *words)
    with peak_memory(process) as peak:
        pass
    seconds = time.perf_counter() - begin
    assert process.returncode == 0, process.returncode
    return seconds, peak[0], digest(out)


def digest(out: Path) -> str:
    """Hash the token file, and remove it."""
    with (out / "all.bin").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    for file in out.iterdir():
        file.unlink()
    return found


def plain_speed(data: Path, out: Path, megabytes: float) -> float:
    """Return MB/s of the plain loop."""
    from minillm import paths

    source = min(data.glob("*.parquet"))
    place = paths.BUNDLED_TOKENIZER / "tokenizer.json"
    command = [sys.executable, "-c", PLAIN, source, out.parent / "plain", str(megabytes * 1e6)]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [*map(str, command), str(place)], env=env, check=True, capture_output=True
    )
    return float(done.stdout)


def compare(name: str, data: Path, size: float, out: Path, megabytes: float, *words: str) -> str:
    """Print a row: our speed against the plain loop's before and after."""
    before = plain_speed(data, out, megabytes)
    seconds, peak, sha256 = tokenize(data, out, *words)
    plain = (before + plain_speed(data, out, megabytes)) / 2
    ours = size / seconds / 1e6
    hardware = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    versions = f"tokenizers {version('tokenizers')}, gigatoken {version('gigatoken')}"
    print(
        f"| {name}, {size / 1e9:.2f} GB | {ours:.1f} | {plain:.1f} | {ours / plain:.1f} "
        f"| {peak:.0f} | {sha256[:12]} | {hardware} | {versions}, Python "
        f"{platform.python_version()} | {datetime.date.today()} |",
        flush=True,
    )
    return sha256


def kill_and_finish(data: Path, out: Path, kills: int) -> str:
    """Kill -9 the command after more and more shards; return the sha256 of the run that ends."""
    for index in range(kills):
        process = start(data, out, "--workers", "2")
        work = out / "all.bin.work"
        seen = len(list(work.glob("*.bin.json"))) if work.is_dir() else 0
        while len(list(work.glob("*.bin.json"))) < seen + 10 * (index + 1):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return tokenize(data, out, "--workers", "1")[2]


def main() -> None:
    """Make the data, measure, and print Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("bench-tokenize"))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--large", type=float, default=4.0, help="GB of the memory test; 0: none")
    parser.add_argument("--baseline-megabytes", type=float, default=40.0)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    texts = read_corpus(args.corpus)
    out = args.folder / "out"
    once = make_data(texts, args.folder / "once", 1, "repeated")
    size = {}
    for kind in ("perturbed", "repeated"):
        size[kind] = make_data(texts, args.folder / kind, args.gigabytes * 1e9, kind)
    print(
        "| data | MB/s | plain loop MB/s | ratio | peak MB | sha256 | hardware | versions | date |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    mega = args.baseline_megabytes
    one = args.folder / "once"
    for backend in ("gigatoken", "tokenizers"):
        name = f"{backend}, the corpus once (cold)"
        compare(name, one, once, out, mega, "--backend", backend, "--workers", "2")
    found = {
        kind: compare(
            f"gigatoken, {kind}", args.folder / kind, size[kind], out, mega, "--workers", "2"
        )
        for kind in ("perturbed", "repeated")
    }
    single = tokenize(args.folder / "repeated", out, "--workers", "1")[2]
    print(f"1 worker: {single[:12]}, same: {single == found['repeated']}", flush=True)
    if args.kills:
        killed = kill_and_finish(args.folder / "repeated", out, args.kills)
        same = killed == found["repeated"]
        print(f"killed {args.kills} times: {killed[:12]}, same: {same}", flush=True)
    if args.large:
        large = args.folder / "large"
        large.mkdir(exist_ok=True)
        for index in range(round(args.large / args.gigabytes)):
            for file in sorted((args.folder / "perturbed").iterdir()):
                link = large / f"{index}-{file.name}"
                if not link.exists():
                    link.symlink_to(file.resolve())
        seconds, peak, _ = tokenize(large, out, "--workers", "2")
        print(f"{args.large} GB: {seconds:.0f} s, peak {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
