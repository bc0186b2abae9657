"""Tokens per second of the engine against the generator: alone, and many at once.

`python benchmarks/engine.py [--model mini_llama3] [--tokens 32] [--clients 16]` prints a Markdown
table; random weights, fp32, about two minutes on two cores.
"""

import argparse
import datetime
import platform
import threading
import time
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from minillm import paths
from minillm.models import registry
from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams
from minillm.serve.engine import Engine
from minillm.serve.memory import EngineSettings


def rate(source: Any, num_clients: int, num_tokens: int) -> float:
    """Return answer tokens per second of clients that all ask at once."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens)

    def ask(number: int) -> None:
        source.generate([100 + number, *range(5, 36)], params)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_clients * num_tokens / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mini_llama3")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16)
    asked = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(paths.BUNDLED_TOKENIZER)
    model = registry.build_model(registry.build_config(asked.model)).eval()
    generator = Generator(model, tokenizer)
    engine = Engine(model, tokenizer, EngineSettings(max_running=asked.clients))
    rate(engine, 2, 4)
    rows = [
        ("generator", 1, rate(generator, 1, asked.tokens)),
        ("engine", 1, rate(engine, 1, asked.tokens)),
        (f"engine, {asked.clients} at once", asked.clients, 0.0),
    ]
    rows[2] = (rows[2][0], asked.clients, rate(engine, asked.clients, asked.tokens))
    engine.close()
    print(f"{asked.model}, fp32, {torch.get_num_threads()} threads, {platform.machine()}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}, "
          f"{datetime.datetime.now(tz=datetime.UTC).date()}\n")  # fmt: skip
    print("| path | clients | tokens/s | against the generator |\n|---|---|---|---|")
    for name, clients, speed in rows:
        print(f"| {name} | {clients} | {speed:.1f} | {speed / rows[0][2]:.2f}x |")


if __name__ == "__main__":
    main()
