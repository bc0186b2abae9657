"""Decoding speed on a CPU: our step, transformers' `generate` and llama.cpp, one sequence.

    python benchmarks/decode.py MODEL [--threads 2] [--cpu-time]

MODEL is a folder that `minillm import` or a training run made. It is exported to transformers'
own class and to GGUF; then each decodes the same number of tokens, greedily, in turns.
"""

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.device import describe
from minillm.models.fast_decode import make_decode_step
from minillm.models.load import load_model
from minillm.models.quantize import quantize_model

PROMPT = list(range(100, 140))
Run = Callable[[int], None]


def ours(folder: str, kind: Any) -> Run:
    """Our step."""
    model: Any = quantize_model(load_model(folder)[0], kind)
    step = make_decode_step(model)

    @torch.inference_mode()
    def run(num: int) -> None:
        cache, ids = model.make_cache(1, len(PROMPT) + num), torch.tensor([PROMPT])
        for _ in range(num):
            logits = step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = logits[:, -1].argmax(-1, keepdim=True)

    return run


def theirs(folder: str, dtype: torch.dtype) -> Run:
    """Official class."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.tensor([PROMPT])

    def run(num: int) -> None:
        model.generate(ids, max_new_tokens=num, min_new_tokens=num, do_sample=False)

    return run


def llama_cpp(path: Path, threads: int) -> Run:
    """llama.cpp."""
    from llama_cpp import Llama

    model: Any = Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(num: int) -> None:
        model.reset()
        for _, _ in zip(range(num), model.generate(PROMPT, temp=0.0), strict=False):
            pass

    return run


def export(model: str, *words: str) -> Path:
    """Export a model."""
    out = Path(tempfile.mkdtemp()) / "made"
    done = CliRunner().invoke(app, ["export", model, *words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def measure(runs: dict[str, Run], turns: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return tokens/s of each: the best of several turns, without the prompt."""
    best: dict[str, float] = {}
    for turn in range(turns):
        for name, run in runs.items():
            times = [clock()]
            for num in (1, 49):
                run(num)
                times.append(clock())
            if turn:
                best[name] = max(best.get(name, 0.0), 48 / (times[2] - 2 * times[1] + times[0]))
    return best


def main() -> None:
    """Measure and print Markdown rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; one thread")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    hardware = describe(torch.device("cpu")) + ", CPU time" * args.cpu_time
    where = f"{hardware} | {versions} | {datetime.date.today()} |"
    official = str(export(args.model, "--to", "official"))
    runs = {f"minillm {kind}": ours(args.model, kind) for kind in ("none", "fp16", "int8", "int4")}
    runs |= {
        f"transformers {d}": theirs(official, getattr(torch, d))
        for d in ("float32", "float16", "bfloat16")
    }
    for kind in ("f16", "q8_0"):
        path = next(export(args.model, "--to", "gguf", "--type", kind).glob("*.gguf"))
        runs[f"llama.cpp {kind}"] = llama_cpp(path, args.threads)
    found = measure(runs, 3, time.process_time if args.cpu_time else time.perf_counter)
    for name, speed in found.items():
        print(f"| {name} | {speed:.1f} | {where}")
    pairs = ("none", "transformers float32"), ("fp16", "transformers float16")
    for kind, other in (*pairs, ("fp16", "llama.cpp f16"), ("int8", "llama.cpp q8_0")):
        one = f"minillm {kind}"
        print(f"| {one} / {other} | {found[one] / found[other]:.2f} | {where}")


if __name__ == "__main__":
    main()
