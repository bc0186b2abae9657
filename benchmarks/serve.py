"""Servers under load: `minillm serve`, `transformers serve` and llama.cpp's `llama-server`.

    python benchmarks/serve.py MODEL [--llama-server PATH] [--quantize none] [--threads 2]

Each has the same weights (exported for the others) and answers one client alone, then 16 at once:
greedy, streamed, of equal length (no end of text). Prompts have 10 to `--words` words.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from minillm.device import describe

LOGS = tempfile.gettempdir()
WORDS = """the old town by the river has a long history and people still come to its market"""
KINDS = {"none": ("float32", "f32"), "fp16": ("float16", "f16"), "int8": ("float32", "q8_0")}


def export(model: str, *words: str) -> Path:
    """Return a folder with the model in another form."""
    out = Path(tempfile.mkdtemp()) / "made"
    command = [sys.executable, "-m", "minillm", "export", model, *words, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def command_of(name: str, args: argparse.Namespace, port: int) -> tuple[list[str], dict[str, Any]]:
    """Return how to start a server, and what its requests say."""
    python, (dtype, gguf) = Path(sys.executable), KINDS[args.quantize]
    body: dict[str, Any] = {"model": "model", "stream_options": {"include_usage": True}}
    if name == "minillm":
        words = [python, "-m", "minillm", "serve", "--model", args.model, "--device", "cpu"]
        words += ["--served-model-name", "model", "--quantize", args.quantize]
        body["min_tokens"] = args.tokens
    elif name == "llama.cpp":
        folder = export(args.model, "--to", "gguf", "--type", gguf)
        words = [args.llama_server, "-m", *folder.glob("*.gguf"), "--parallel", args.clients]
        words += ["-c", 1024 * args.clients, "-t", args.threads, "-tb", args.threads]
        body["ignore_eos"] = True
    else:
        folder = export(args.model, "--to", "official")
        words = [python.with_name("transformers"), "serve", folder, "--dtype", dtype]
        words += ["--device", "cpu", "--cb-max-memory-percent", "0.3"]  # else it takes 14 GB
        words += ["--continuous-batching"] * (name == "transformers-cb")
        config = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": -1}
        body = {"model": str(folder), "generation_config": json.dumps(config)}
    return [str(word) for word in (*words, "--host", "127.0.0.1", "--port", port)], body


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path, threads: int) -> Iterator[int]:
    """Run a server as long as the block takes."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as it:
        try:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert it.poll() is None, f"the server has ended, see {log}"
                time.sleep(0.1)
            yield it.pid
        finally:
            it.terminate()


async def ask(client: httpx.AsyncClient, n: int, body: Any, args: Any) -> tuple[str, float, float]:
    """Return the answer, and the seconds to its first and from there to its last piece."""
    count = 10 + n * 97 % (args.words - 9)
    words = " ".join((WORDS.split() * args.words)[n % 17 :][:count])
    text = f"{n}: {words}. Tell me more."
    body = body | {"messages": [{"role": "user", "content": text}], "stream": True}
    answer, tokens, times, start = "", 0, [], time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, (await reply.aread()).decode()
        async for line in reply.aiter_lines():
            if line[:5] != "data:" or line[5:].strip() == "[DONE]":
                continue
            part = json.loads(line[5:])
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            if part.get("choices") and (piece := part["choices"][0]["delta"].get("content")):
                answer += piece
                times.append(time.perf_counter() - start)
    assert answer.strip(), "an empty answer"
    assert tokens == args.tokens, f"{tokens} tokens instead of {args.tokens}: {answer!r}"
    return answer, times[0], times[-1] - times[0]


async def measure(url: str, body: Any, args: Any) -> tuple[list[float], list[str]]:
    """Return the numbers of a row, and the answers."""
    body |= {"temperature": 0, "max_tokens": args.tokens}
    limits = httpx.Limits(max_keepalive_connections=0)  # llama.cpp closes them when it likes
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits) as client:
        best = min([(await ask(client, 1000 + turn, body, args))[2] for turn in range(3)])
        start, clients = time.perf_counter(), range(1, args.clients + 1)
        done = await asyncio.gather(*(ask(client, one, body, args) for one in clients))
        total = args.clients * args.tokens / (time.perf_counter() - start)
    parts = statistics.quantiles([first for _, first, _ in done], n=20)
    return [(args.tokens - 1) / best, total, parts[9], parts[18]], [answer for answer, _, _ in done]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--llama-server", help="llama.cpp's binary: also ask it")
    parser.add_argument("--rivals", nargs="*", default=["transformers-cb", "transformers"])
    parser.add_argument("--quantize", choices=list(KINDS), default="none")
    for name, value in (("threads", 2), ("clients", 16), ("tokens", 64), ("words", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| server | 1 client, tok/s | all, tok/s | TTFT p50 s | p95 s | peak MB ", end="")
    print("| same answers | minillm, times as fast: alone | together |" + "\n|" + "---|" * 9)
    ours: tuple[list[float], list[str]] | None = None
    for name in ["minillm", *["llama.cpp"] * bool(args.llama_server), *args.rivals]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url, (command, body) = f"http://127.0.0.1:{port}", command_of(name, args, port)
        with running(command, url, Path(LOGS, f"serve-{name}.log"), args.threads) as pid:
            found, texts = asyncio.run(measure(url, body, args))
            peak = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
        ours = ours or (found, texts)
        same = sum(a == b for a, b in zip(texts, ours[1], strict=True))
        numbers = [*found, int(peak) / 1024, same, *(ours[0][n] / found[n] for n in (0, 1))]
        print("|", " | ".join([name, *(f"{number:.4g}" for number in numbers)]), "|", flush=True)
    print(f"\n{vars(args)}, {describe(torch.device('cpu'))}, torch {torch.__version__}")
    print(f"transformers {transformers.__version__}, {datetime.date.today()}")


if __name__ == "__main__":
    main()
