"""Learning per token: the default recipe of `minillm pretrain` against a published one.

Published: AdamW, cosine from 3e-4 to 1e-5, warm-up 5 %, betas 0.9 and 0.95, weight decay 0.01, no
clipping, steps of 16 windows of 512 tokens that overlap by a tenth. Ours: what `minillm pretrain`
does without flags, but for the batch, which suits a run of few tokens. With `--control` also the
published recipe at ten times its learning rate: what of the gain is due to the rate alone.

Every row is a whole run whose schedule ends with it, never a point of a longer one, and all are
judged on the same held-out documents. Wall time is that of training; CPU time that of the command.

    python benchmarks/recipe.py corpus-free.parquet corpus-copyleft.parquet --folder big/recipe

Parquet with the columns `text` and `source`. Runs that are there are not made again.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipe_data import LENGTH, prepare

PUBLISHED_STEP = 16 * LENGTH
PUBLISHED = (
    "--optimizer adamw --schedule cosine --min-lr-ratio 0.0333333 --warmup-ratio 0.05 "
    "--betas 0.9 0.95 --weight-decay 0.01 --grad-clip 0 --no-doc-mask "
    f"--batch-tokens {PUBLISHED_STEP} --lr "
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Flags, the token file, and the share of the tokens that a run gets."""

    name: str
    label: str
    flags: str
    data: str = "train.bin"
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    tokens: int
    steps: int
    bpb: float
    seconds: float
    cpu_seconds: float


def measure(args: argparse.Namespace, recipe: Recipe, seed: int) -> Result:
    """Train once, or read what an earlier call left."""
    tokens = int(args.tokens * recipe.share) // PUBLISHED_STEP * PUBLISHED_STEP
    step = int(recipe.flags.split("--batch-tokens ")[1].split()[0])
    run = args.folder / "runs" / f"{recipe.name}-{seed}"
    command = [
        *(sys.executable, "-m", "minillm", "pretrain", "--model", args.model),
        *("--data", args.folder / recipe.data, "--val-data", args.folder / "val.bin"),
        *("--tokenizer", args.folder / "tokenizer", "--steps", tokens // step, "--seed", seed),
        *("--sequence-length", LENGTH, "--micro-batch", args.micro_batch),
        *("--eval-tokens", args.eval_tokens, "--eval-every", 10**6, "--save-every", 10**6),
        *("--sample-tokens", 0, *recipe.flags.split(), "--out", run),
    ]
    words = [str(word) for word in command]
    note = args.folder / "results" / f"{recipe.name}-{seed}.json"
    if note.is_file() and (found := json.loads(note.read_text()))["command"] == words:
        return Result(**found["result"])
    shutil.rmtree(run, ignore_errors=True)
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    result = Result(
        tokens=last["tokens"],
        steps=last["step"],
        bpb=[line for line in lines if line["kind"] == "eval"][-1]["bpb"],
        seconds=last["seconds"],
        cpu_seconds=usage.ru_utime + usage.ru_stime,
    )
    shutil.rmtree(run / "checkpoints")  # the numbers stay
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"command": words, "result": dataclasses.asdict(result)}))
    return result


def show(recipe: Recipe, results: dict[int, Result]) -> None:
    """Print a row: one column of bits per byte for each seed, and means."""
    first, mean = next(iter(results.values())), statistics.mean
    bpb = [result.bpb for result in results.values()]
    print(
        f"| {recipe.label} | {first.tokens:,} | {first.steps} x {first.tokens // first.steps:,} | "
        + " | ".join(f"{value:.4f}" for value in bpb)
        + f" | {mean(bpb):.4f} | {mean(r.seconds for r in results.values()):.0f} "
        f"| {mean(r.cpu_seconds for r in results.values()):.0f} |",
        flush=True,
    )


def main() -> None:
    """Train all, print the table and whether the claim holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpora", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="mini_llama3:tiny")
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of the published recipe")
    parser.add_argument("--share", type=float, default=0.6, help="of them that ours gets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="of ours")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--control", action="store_true", help="also the published at 3e-3")
    args = parser.parse_args()
    prepare(args.corpora, args.folder)

    ours = f"--batch-tokens {args.batch_tokens}"
    published = Recipe("published", "published", PUBLISHED + "3e-4", "overlap.bin")
    fewer = Recipe("fewer", f"ours, {args.share:.0%} of the tokens", ours, share=args.share)
    recipes = [published, fewer, Recipe("ours", "ours, equal tokens", ours)]
    if args.control:
        label = "published, but at 3e-3"
        recipes.append(Recipe("control", label, PUBLISHED + "3e-3", "overlap.bin"))
    table: dict[str, dict[int, Result]] = {}
    seeds = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"| recipe | tokens | steps | {seeds} | mean bpb | train s | CPU s |")
    print("|---" * (6 + len(args.seeds)) + "|")
    for recipe in recipes:
        table[recipe.name] = {seed: measure(args, recipe, seed) for seed in args.seeds}
        show(recipe, table[recipe.name])
    wins = sum(
        table[fewer.name][seed].bpb <= table[published.name][seed].bpb for seed in args.seeds
    )
    import torch

    from minillm.device import describe

    print(
        f"\n{args.model}: as good with {args.share:.0%} of the tokens or better in {wins} of "
        f"{len(args.seeds)} seeds. {describe(torch.device('cpu'))}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}"
    )


if __name__ == "__main__":
    main()
