"""`minillm prepare-sft` on generated deepctrl-style lines: memory, time, fill; labels checked.

The lines are Chinese and English, with lengths, types, turns and empty fields like those of the
real set (`instruction, input, output, history, type`). Peak memory is the largest sum over all
processes of what each has for itself plus its share of what they have in common (PSS), sampled.
Labels are read a second time in another way: the chat template is rendered to text, answers are
found in the text by their offsets, and a tokenizer that knows the control tokens encodes it.

    python benchmarks/prepare_sft.py --rows 2000000 --folder DIR [--max-dialogues 0]
"""

import argparse
import datetime
import json
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from minillm import paths
from minillm.data.documents import find_files, read_batches
from minillm.data.tokenizer import load_tokenizer, resolve_tokenizer
from minillm.device import describe

TYPES = ("翻译", "阅读理解", "数学", "代码", "写作", "常识问答", "brainstorming", "closed_qa")
TYPES += ("摘要", "角色扮演", "逻辑推理", "情感分析", "open_qa", "rewrite", "古诗", "分类")


def write_lines(path: Path, count: int, seed: int) -> None:
    """Write `count` lines whose texts are cut from the bundled corpus and English words."""
    draw = random.Random(seed)
    texts = [t for b in read_batches(find_files(paths.BUNDLED_CORPUS)) for t in b.texts]
    chinese = [t for t in texts if not t.isascii()]
    pools = ("".join(chinese)[:4_000_000], "\n".join(t for t in texts if t.isascii())[:4_000_000])

    def cut(pool: str, mean: float, sigma: float) -> str:
        size = max(1, int(draw.lognormvariate(0, sigma) * mean))
        start = draw.randrange(max(1, len(pool) - size))
        return pool[start : start + size].strip() or "好"

    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            is_english = draw.random() < 0.2
            pool, scale = (pools[1], 3.5) if is_english else (pools[0], 1.0)
            kind = TYPES[min(len(TYPES) - 1, int(draw.expovariate(0.35)))]
            item = {
                "id": number,
                "instruction": "" if draw.random() < 0.5 else cut(pool, 20 * scale, 0.7),
                "input": cut(pool, 30 * scale, 0.9),
                "output": "" if draw.random() < 0.002 else cut(pool, 150 * scale, 0.9),
                "history": [
                    [cut(pool, 25 * scale, 0.7), cut(pool, 50 * scale, 0.8)]
                    for _ in range(draw.randint(1, 3) if draw.random() < 0.12 else 0)
                ],
                "type": kind,
            }
            stream.write(json.dumps(item, ensure_ascii=False) + "\n")


class Memory(threading.Thread):
    """Samples the memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self.peak_pss, self.peak_rss = psutil.Process(pid), 0, 0

    def run(self) -> None:
        """Sample until the process is gone."""
        while True:
            try:
                family = [self._process, *self._process.children(recursive=True)]
                pss = rss = 0
                for process in family:
                    found = process.memory_full_info()
                    pss, rss = pss + found.pss, rss + found.rss
            except psutil.Error:
                if not self._process.is_running() or self._process.status() == "zombie":
                    return
                continue
            self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)
            time.sleep(0.2)


def prepare(data: Path, out: Path, max_dialogues: int, length: int) -> tuple[float, Memory, str]:
    """Run the command in a process of its own."""
    words = f"prepare-sft --data {data} --out {out} --tokenizer bundled --sequence-length {length}"
    command = [sys.executable, "-m", "minillm", *words.split()]
    command += ["--max-dialogues", str(max_dialogues), "--min-tokens", "20"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = Memory(process.pid)
        memory.start()
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(process.returncode)
    return time.monotonic() - began, memory, said


def written_dialogues(out: Path, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of dialogues in random rows of the parquet, one of each row."""
    draw = random.Random(seed)
    file = pq.ParquetFile(out)
    wanted = set(draw.sample(range(file.metadata.num_rows), min(count, file.metadata.num_rows)))
    found, number = [], 0
    for batch in file.iter_batches(4096, columns=["token_ids", "labels", "sample_lengths"]):
        for place in sorted(wanted & set(range(number, number + batch.num_rows))):
            row = batch.slice(place - number, 1).to_pylist()[0]
            ends = np.cumsum(row["sample_lengths"]).tolist()
            pick = draw.randrange(len(ends))
            part = slice(ends[pick] - row["sample_lengths"][pick], ends[pick])
            found.append((row["token_ids"][part], row["labels"][part]))
        number += batch.num_rows
    return found


def read_messages(data: Path) -> Iterator[list[dict[str, str]]]:
    """Yield the messages of every line, without minillm's reader."""
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            question = "\n".join(t for t in (item["instruction"], item["input"]) if t.strip())
            pairs = [*item["history"], [question, item["output"]]]
            yield [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]


def check_labels(data: Path, out: Path, count: int) -> tuple[int, int]:
    """Compare ids and labels with a second reading; return dialogues checked, and Chinese ones.

    The identity dialogues, which are in no line of the file, are left out.
    """
    tokenizer = load_tokenizer(resolve_tokenizer(Path("bundled")))
    written = {
        tokenizer.decode(ids): (ids, labels) for ids, labels in written_dialogues(out, count, 0)
    }
    num_checked = num_chinese = 0
    for messages in read_messages(data):
        text = "".join(
            f"<|im_start|>{m['role']}\n"
            f"{m['content'].strip() if m['role'] == 'assistant' else m['content']}<|im_end|>\n"
            for m in messages
        )
        if text not in written:
            continue
        ids, labels = written.pop(text)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        spans, place = [], 0
        opening, closing = "<|im_start|>assistant\n", "<|im_end|>"
        while (begin := rendered.find(opening, place)) >= 0:
            place = rendered.index(closing, begin) + len(closing)
            spans.append((begin + len(opening), place))
        second = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        wanted = [
            index if any(low <= start and end <= high for low, high in spans) else -100
            for index, (start, end) in zip(
                second["input_ids"], second["offset_mapping"], strict=True
            )
        ]
        assert ids == second["input_ids"], rendered
        assert labels == wanted, rendered
        num_checked += 1
        num_chinese += any("\u4e00" <= char <= "\u9fff" for char in rendered)
    left = [text for text in written if "MiniLLM" not in text and "minillm" not in text]
    assert len(left) < count * 0.05, left[:3]
    return num_checked, num_chinese


def main() -> None:
    """Print one row per sample size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-dialogues", type=int, nargs="*", default=[50_000, 0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--check", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = args.folder / f"deepctrl-{args.rows}-{args.seed}.jsonl"
    if not data.is_file():
        write_lines(data.with_suffix(".part"), args.rows, args.seed)
        data.with_suffix(".part").rename(data)
    size = data.stat().st_size
    print(f"{datetime.date.today()}, {describe(torch.device('cpu'))},", end=" ")
    print(f"Python {platform.python_version()}; {args.rows:,} lines, {size / 1e9:.2f} GB\n")
    print("| sample | time | MB/s | peak PSS | peak RSS | fill | dialogues | labels checked |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for count in args.max_dialogues:
        out = args.folder / f"sft-{count}.parquet"
        seconds, memory, said = prepare(data, out, count, args.length)
        facts = json.loads(pq.read_schema(out).metadata[b"minillm"])
        rows = pq.ParquetFile(out).metadata.num_rows
        fill = facts["num_tokens"] / (rows * args.length)
        checked, chinese = check_labels(data, out, args.check)
        print(
            f"| {count or 'all'} | {seconds:.0f} s | {size / seconds / 1e6:.1f} "
            f"| {memory.peak_pss / 1e6:.0f} MB | {memory.peak_rss / 1e6:.0f} MB "
            f"| {fill:.2%} | {facts['num_dialogues']:,} | {checked}, {chinese} with Chinese |",
            flush=True,
        )
        print(said, file=sys.stderr)


if __name__ == "__main__":
    main()
