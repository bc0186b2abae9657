"""Pretraining speed on this machine: `minillm pretrain` against transformers' Trainer.

Same shape (mini_llama3:small), same token file, rows, batch, dtype and fused AdamW; each program
runs in a process of its own, in turns, and the best of the turns counts. Evaluation, samples and
checkpoints are off in both. Needs `pip install -e '.[bench]'`.

    python benchmarks/pretrain.py [--steps 12] [--turns 3]
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTH, ROWS, MICRO = 256, 16, 8


def measure_minillm(folder: Path, steps: int) -> float:
    """Return tokens/s of the command, from its own log, after a first line of warm-up."""
    with tempfile.TemporaryDirectory() as scratch:
        words = (
            f"pretrain --model mini_llama3:small --data {folder}/bundled.bin --out {scratch}/run "
            f"--tokenizer bundled --steps {steps} --batch-tokens {LENGTH * ROWS} "
            f"--sequence-length {LENGTH} --micro-batch {MICRO} --optimizer adamw --log-every 2 "
            f"--eval-tokens {LENGTH} --eval-every {steps} --sample-tokens 0 --precision fp32 "
            f"--save-every {steps} --device cpu"
        )
        command = [sys.executable, "-m", "minillm", *words.split()]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(scratch) / "run/metrics.jsonl").read_text().splitlines()
        rates = [row["tokens_per_s"] for row in map(json.loads, lines) if row["kind"] == "train"]
    return sum(rates[1:]) / len(rates[1:])


def measure_trainer(folder: Path, steps: int) -> float:
    """Return tokens/s of Trainer with a LlamaForCausalLM of equal shape, after warm-up."""
    command = [sys.executable, __file__, "--trainer", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def run_trainer(folder: Path, steps: int) -> None:
    """Train with transformers and print tokens/s."""
    import time

    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from minillm.data.binfile import TokenFile
    from minillm.models import registry
    from minillm.models.base import official_config

    tokens = TokenFile.open(folder / "bundled.bin")
    config = registry.build_config("mini_llama3:small", vocab_size=tokens.manifest.vocab_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(official_config(config, "llama"))
    rows = [
        torch.from_numpy(tokens.tokens[i * LENGTH : (i + 1) * LENGTH].astype("int64"))
        for i in range(steps * ROWS)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ROWS // MICRO,
            max_steps=steps,
            optim="adamw_torch_fused",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_steps=2,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=settings, train_dataset=data, callbacks=[Clock()]).train()
    spent = times[-1] - times[1]  # two steps of warm-up, as in the log of the other
    print(LENGTH * ROWS * (len(times) - 2) / spent)


def main() -> None:
    """Measure in turns and print a Markdown row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--trainer", type=Path)
    args = parser.parse_args()
    if args.trainer:
        run_trainer(args.trainer, args.steps)
        return
    with tempfile.TemporaryDirectory() as scratch:
        words = ["tokenize", "--data", "bundled", "--tokenizer", "bundled", "--out", scratch]
        command = [sys.executable, "-m", "minillm", *words]
        subprocess.run(command, check=True, capture_output=True)
        folder = Path(scratch)
        ours, theirs = [], []
        for _ in range(args.turns):
            ours.append(measure_minillm(folder, args.steps))
            theirs.append(measure_trainer(folder, args.steps))
    import torch
    import transformers

    from minillm.device import describe

    print("| what | minillm tok/s | Trainer tok/s | ratio | hardware | versions | date |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| pretrain mini_llama3:small, fp32, rows of {LENGTH} | {max(ours):.0f} "
        f"| {max(theirs):.0f} | {max(ours) / max(theirs):.2f} | {describe(torch.device('cpu'))} "
        f"| torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()} | {datetime.date.today()} |"
    )


if __name__ == "__main__":
    main()
