"""Training speed and memory on this machine: `minillm pretrain` against two other ways.

ours     the command, on a token file
Trainer  transformers' Trainer with the official class of the same shape
plain    a hand-written eager loop around that class, with a Python loop over experts and the
         delta rule's triangular system solved row by row

All have the same shape, tokens, rows, micro-batch, precision and fused AdamW; each runs in a
process of its own, in turns, and the best of the turns counts. With `--precision bf16` weights are
fp32 and products bf16 in all three: the command's own way, `bf16=True` of Trainer, autocast.
Evaluation, samples and checkpoints are outside the measured steps. Blocks for further tokens
(MTP), which the official class does not have, are off. Both ways with experts add the balance loss
that they know.

Tokens are those of the tokenizer in the package (32,004 words), or of one that is made, with as
many words as `--vocab` says. Rows are attended to as wholes, so that all compute the same;
`--documents` keeps documents apart instead, as `minillm pretrain` does by default and the official
classes do when positions restart.

    python benchmarks/throughput.py [--precision bf16] [--vocab 8192] [--steps 4] [--turns 1]
        [--documents] [--models NAME ...]

Needs `pip install -e '.[bench]'`.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH, ROWS, MICRO, WARM_UP = 512, 16, 8, 1
MODELS = ("mini_llama3:small", "mini_deepseekv3:small", "mini_qwen3_next:small")
WAYS = ("ours", "trainer", "plain")
PUBLISHED = 32_004  # words of the tokenizer in the package


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same in all ways."""

    folder: Path
    steps: int
    apart: bool
    precision: str
    vocab: int

    @property
    def tokenizer(self) -> str:
        """The one in the package, or one made of the text there."""
        return "bundled" if self.vocab == PUBLISHED else f"{self.folder}/tokenizer"


def run_ours(name: str, it: Setting) -> tuple[float, int]:
    """Run the command in this process; return tokens/s and peak bytes from its own log."""
    import runpy
    from contextlib import suppress

    from minillm.models import mini_deepseekv3

    mini_deepseekv3.PRESETS["small"]["num_nextn_predict_layers"] = 0  # type: ignore[index]
    with tempfile.TemporaryDirectory() as scratch:
        words = (
            f"pretrain --model {name} --data {it.folder}/tokens/bundled.bin --out {scratch}/run "
            f"--tokenizer {it.tokenizer} --steps {it.steps} --batch-tokens {LENGTH * ROWS} "
            f"--sequence-length {LENGTH} --micro-batch {MICRO} --optimizer adamw --log-every 1 "
            f"--eval-tokens {LENGTH} --eval-every {it.steps} --sample-tokens 0 "
            f"--precision {it.precision} --save-every {it.steps} --device cpu "
            f"--{'' if it.apart else 'no-'}doc-mask"
        )
        sys.argv = ["minillm", *words.split()]
        with suppress(SystemExit):
            runpy.run_module("minillm", run_name="__main__")
        lines = (Path(scratch) / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    seconds = rows[-1]["seconds"] - rows[WARM_UP - 1]["seconds"]
    return LENGTH * ROWS * (it.steps - WARM_UP) / seconds, rows[-1]["memory_bytes"]


def official(name: str, it: Setting) -> tuple[Any, list[Any]]:
    """Return the official class in our shape, and the rows to train on."""
    import torch

    from minillm.data.binfile import TokenFile
    from minillm.models import registry
    from minillm.models.base import official_config

    tokens = TokenFile.open(it.folder / "tokens/bundled.bin")
    config = registry.build_config(name, vocab_size=tokens.manifest.vocab_size)
    kind = {"mini_llama3": "llama", "mini_deepseekv3": "deepseek_v3"}
    kind_name = kind.get(name.split(":")[0], "qwen3_next")
    extra: dict[str, Any] = {"output_router_logits": True} if kind_name == "qwen3_next" else {}
    made = official_config(config, kind_name, num_nextn_predict_layers=0, **extra)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    rows = [
        torch.from_numpy(tokens.tokens[i * LENGTH : (i + 1) * LENGTH].astype("int64"))
        for i in range(it.steps * ROWS)
    ]
    return model, rows


def positions(ids: Any, it: Setting) -> dict[str, Any]:
    """Return positions `(..., T)` that restart after each end of a document, if wanted."""
    import torch

    if not it.apart:
        return {}
    place = torch.arange(ids.shape[-1]).expand(ids.shape)
    after_end = torch.nn.functional.pad(ids[..., :-1] == it.vocab - 3, (1, 0))
    return {"position_ids": place - (place * after_end).cummax(-1).values}


def run_trainer(name: str, it: Setting) -> tuple[float, int]:
    """Train with transformers; return tokens/s and peak bytes."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, rows = official(name, it)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ROWS // MICRO,
            max_steps=it.steps,
            optim="adamw_torch_fused",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=it.precision == "bf16",
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} | positions(row, it) for row in rows]
        Trainer(model=model, args=settings, train_dataset=data, callbacks=[Clock()]).train()
    return _rate(times), _peak()


def run_plain(name: str, it: Setting) -> tuple[float, int]:
    """Train with a loop as in a tutorial; return tokens/s and peak bytes."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from blocks import loop_over_experts, solving_by_rows

    model, rows = official(name, it)
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = lambda x, i, w, m=module: loop_over_experts(m, x, i, w)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    times: list[float] = []
    with solving_by_rows():
        for step in range(it.steps):
            for at in range(step * ROWS, (step + 1) * ROWS, MICRO):
                ids = torch.stack(rows[at : at + MICRO])
                with torch.autocast("cpu", torch.bfloat16, enabled=it.precision == "bf16"):
                    out = model(input_ids=ids, use_cache=False, **positions(ids, it))
                    logits = out.logits[:, :-1].flatten(0, 1).float()
                    loss = F.cross_entropy(logits, ids[:, 1:].flatten())
                if getattr(out, "aux_loss", None) is not None:
                    loss = loss + model.config.router_aux_loss_coef * out.aux_loss
                (loss * MICRO / ROWS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
    return _rate(times), _peak()


def _rate(times: list[float]) -> float:
    return LENGTH * ROWS * (len(times) - WARM_UP) / (times[-1] - times[WARM_UP - 1])


def _peak() -> int:
    import torch

    from minillm.device import peak_memory_bytes

    return peak_memory_bytes(torch.device("cpu"))


def measure(way: str, name: str, it: Setting) -> tuple[float, int]:
    """Return tokens/s and peak bytes of a process of its own."""
    words = ["--way", way, "--models", name, "--folder", str(it.folder), "--steps", str(it.steps)]
    words += ["--precision", it.precision, "--vocab", str(it.vocab)]
    words += ["--documents"] * it.apart
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rate, peak = json.loads(done.stdout.splitlines()[-1])
    return rate, peak


def prepare(it: Setting) -> None:
    """Make a token file of the bundled text."""
    out = f"--out {it.folder}/tokens"
    lines = [f"tokenize --data bundled --tokenizer {it.tokenizer} {out}"]
    if it.vocab != PUBLISHED:
        size = f"--vocab-size {it.vocab - 4}"
        lines.insert(0, f"train-tokenizer --data bundled {size} --out {it.tokenizer}")
    for line in lines:
        words = [sys.executable, "-m", "minillm", *line.split()]
        subprocess.run(words, check=True, capture_output=True)


def table(models: list[str], it: Setting, turns: int) -> None:
    """Measure in turns and print a Markdown table."""
    import torch
    import transformers

    from minillm.device import describe, peak_flops, pick_dtype
    from minillm.models import registry
    from minillm.models.base import flops_per_token

    cpu = torch.device("cpu")
    heads = "tok/s: ours, Trainer, plain | of matmul peak | peak RSS, MB | ours / Trainer"
    heads += " | ours / plain | hardware | versions | date"
    what = (
        f"{it.vocab:,} words, rows of {LENGTH}, micro-batch {MICRO}"
        + ", documents apart" * it.apart
    )
    print(f"| {it.precision}, {what} | {heads} |")
    print("|" + 9 * "---|")
    where = f"{describe(cpu)} | torch {torch.__version__}, transformers {transformers.__version__}"
    dtype = pick_dtype(it.precision, cpu)
    peak = max(peak_flops(cpu, dtype) for _ in range(5))  # one may be disturbed
    for name in models:
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
        for _ in range(turns):
            for way in WAYS:
                found[way].append(measure(way, name, it))
        rate = {way: max(r for r, _ in pairs) for way, pairs in found.items()}
        size = {way: min(b for _, b in pairs) / 1e6 for way, pairs in found.items()}
        mtp = {"num_nextn_predict_layers": 0} if "deepseek" in name else {}
        model = registry.build_model(registry.build_config(name, vocab_size=it.vocab, **mtp))
        flops, count = flops_per_token(model, LENGTH), model.num_parameters() / 1e6
        cells = [
            f"{name}, {count:.0f}M",
            ", ".join(f"{rate[way]:.0f}" for way in WAYS),
            ", ".join(f"{rate[way] * flops / peak:.0%}" for way in WAYS),
            ", ".join(f"{size[way]:.0f}" for way in WAYS),
            *(f"{rate['ours'] / rate[way]:.2f}" for way in WAYS[1:]),
            where,
            str(datetime.date.today()),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure one way, or all and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--documents", action="store_true", help="keep documents apart")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--vocab", type=int, default=PUBLISHED, help="words of the tokenizer")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        it = Setting(folder, args.steps, args.documents, args.precision, args.vocab)
        if args.way:
            ways: dict[str, Callable[[str, Setting], tuple[float, int]]]
            ways = {"ours": run_ours, "trainer": run_trainer, "plain": run_plain}
            print(json.dumps(ways[args.way](args.models[0], it)))
            return
        if not args.folder:
            prepare(it)
        table(args.models, it, args.turns)


if __name__ == "__main__":
    main()
