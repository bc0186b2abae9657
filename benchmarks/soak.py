"""Soak test of `minillm serve`: many rude clients for a long time, on loopback.

    python benchmarks/soak.py MODEL [--minutes 30] [--clients 32]

Starts a server for the folder MODEL. Each client, again and again, takes one of these at random:
a greedy answer, whole or streamed, which must be what transformers' `generate` gives in this
process; one that it leaves midway; one that it reads slowly; a malformed body; a huge body; half a
request on a connection that it leaves open. Meanwhile the server's memory and open files are read
every ten seconds. Prints what came back, the slope of the memory over the second half, and what
`/metrics` says after the last client. Exit code 1 when anything but the intended came back.
"""

import argparse
import asyncio
import collections
import datetime
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers

from minillm.device import describe
from minillm.models.load import load_model

TEXTS = (
    *(
        "中国的首都是",
        "今天天气很好，",
        "水在一百度时",
        "人工智能是",
        "床前明月光，",
        "请介绍一下你自己。",
    ),
    *("The capital of France is", "Once upon a time", "def add(a, b):", "1, 2, 3, 4,", "Dear Sir,"),
)
OURS = b'{"model": "soak", "prompt": '
MALFORMED = (
    *(b"{", b"[]", b"null", b"", b"\xff\xfe", b'{"prompt": "a"}', b'{"model": 3, "prompt": "a"}'),
    *(b'{"model": "soak"}', b'{"model": "other", "prompt": "a"}', OURS + b"5}"),
    *(OURS + b'"a", "max_tokens": -1}', OURS + b'"a", "temperature": "hot"}'),
    *(OURS + b'"a", "no_such_field": 1}', OURS + b"[99999999]}", OURS + b'"a", "n": 1e9}'),
)
HUGE = b'{"prompt": "' + b"a" * (48 << 20) + b'"}'


class Soak:
    """What all clients share."""

    def __init__(self, url: str, expected: list[tuple[list[int], int, str]]) -> None:
        self.url, self.expected = url, expected
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.first_s: list[float] = []

    def judge(self, name: str, is_right: bool, detail: object = "") -> None:
        """Count an outcome; keep the first wrong ones."""
        self.outcomes[f"{name}: {'as intended' if is_right else 'WRONG'}"] += 1
        if not is_right and len(self.wrong) < 20:
            self.wrong.append(f"{name}: {str(detail)[:300]}")

    async def answer(self, client: httpx.AsyncClient, dice: random.Random, kind: str) -> None:
        """Ask for a greedy answer and read it in one of four ways."""
        ids, num, text = dice.choice(self.expected)
        body = {"model": "soak", "prompt": ids, "max_tokens": num, "temperature": 0}
        if kind == "whole":
            reply = await client.post("/v1/completions", json=body)
            if reply.status_code == 429:
                self.judge("429 with Retry-After", "retry-after" in reply.headers)
                return
            got = reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
            self.judge("whole answer", got == text, (got, text))
            return
        pieces, leave_after, began = [], dice.randrange(num), time.perf_counter()
        body["stream"] = True
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code == 429:
                self.judge("429 with Retry-After", "retry-after" in reply.headers)
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.judge(f"{kind} answer", False, chunk)
                        return
                    if not pieces:
                        self.first_s.append(time.perf_counter() - began)
                    pieces.append(chunk["choices"][0]["text"])
                if kind == "left" and len(pieces) > leave_after:
                    self.judge("left midway", True)
                    return
                if kind == "slow":
                    await asyncio.sleep(0.2)
        self.judge(f"{kind} answer", "".join(pieces) == text, ("".join(pieces), text))

    async def half_open(self, dice: random.Random) -> None:
        """Send the beginning of a request, wait, and vanish without a word."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{"
        writer.write(head[: dice.randrange(1, len(head))])
        await writer.drain()
        await asyncio.sleep(dice.uniform(0, 5))
        writer.transport.abort()
        self.judge("half a request", True)

    async def client(self, seed: int, until: float) -> None:
        """One client, till the time is over."""
        dice = random.Random(seed)
        kinds = ["whole", "streamed", "left", "slow", "malformed", "huge", "half"]
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            while time.monotonic() < until:
                kind = dice.choices(kinds, [4, 4, 4, 1, 2, 0.1, 1])[0]
                try:
                    if kind == "half":
                        await self.half_open(dice)
                    elif kind in ("malformed", "huge"):
                        body = HUGE if kind == "huge" else dice.choice(MALFORMED)
                        status, want = 0, (413,) if kind == "huge" else (400, 404, 422)
                        try:
                            reply = await client.post("/v1/completions", content=body)
                            status, is_ok = reply.status_code, reply.status_code in want
                            is_ok &= set(reply.json()["error"]) >= {"message", "type"}
                        except (httpx.WriteError, httpx.ReadError):
                            is_ok = kind == "huge"  # closed while we were still sending
                        self.judge(f"{kind} body", is_ok, (status, body[:60]))
                    else:
                        await self.answer(client, dice, kind)
                except Exception as error:
                    self.judge(kind, False, repr(error))
                await asyncio.sleep(dice.uniform(0, 0.3))


def expect(folder: str) -> list[tuple[list[int], int, str]]:
    """Prompts, numbers of tokens and texts, by the official class and its `generate`."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = load_model(folder)[0].export_official()
    found = []
    for place, text in enumerate(TEXTS):
        ids, num = tokenizer(text * (1 + 7 * (place % 4)))["input_ids"], 16 + 8 * (place % 5)
        whole = model.generate(torch.tensor([ids]), max_new_tokens=num, do_sample=False)[0]
        answer = tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
        found.append((ids, num, answer))
    return found


async def watch(process: psutil.Process, readings: list[tuple[float, int, int]]) -> None:
    """Read seconds, resident bytes and open files of the server, for ever."""
    began = time.monotonic()
    while True:
        readings.append((time.monotonic() - began, process.memory_info().rss, process.num_fds()))
        await asyncio.sleep(10)


async def soak(args: argparse.Namespace, soak: Soak, pid: int) -> list[tuple[float, int, int]]:
    """Run all clients; return the readings."""
    readings: list[tuple[float, int, int]] = []
    watcher = asyncio.create_task(watch(psutil.Process(pid), readings))
    until = time.monotonic() + args.minutes * 60
    await asyncio.gather(*(soak.client(seed, until) for seed in range(args.clients)))
    await asyncio.sleep(2)
    watcher.cancel()
    return readings


def main() -> None:
    """Start the server, soak it, stop it, print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="of the server")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minillm", "serve", "--model", args.model]
    command += ["--served-model-name", "soak", "--port", str(port)]
    with args.log.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    state = Soak(f"http://127.0.0.1:{port}", expect(args.model))
    for _ in range(120):
        try:
            if httpx.get(f"{state.url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    readings = asyncio.run(soak(args, state, server.pid))
    gauges = re.findall(
        r"(?m)^minillm_\w+(?<!created) \S+$", httpx.get(f"{state.url}/metrics").text
    )
    server.terminate()
    code = server.wait(60)

    for name, count in sorted(state.outcomes.items()):
        print(f"| {name} | {count:,} |")
    half = readings[len(readings) // 2 :]
    slope = statistics.linear_regression([r[0] for r in half], [r[1] for r in half]).slope
    print(f"\nresident {half[0][1] / 1e6:.0f} MB at half time, {half[-1][1] / 1e6:.0f} at the end:")
    print(f"slope {slope * 3600 / 1e6:+.1f} MB/h; open files {half[0][2]} and {half[-1][2]}")
    firsts = statistics.quantiles(state.first_s, n=20)
    print(f"first token: median {firsts[9]:.2f} s, p95 {firsts[18]:.2f} s; exit code {code}")
    print("\n".join(gauges + state.wrong))
    print(
        f"{args.clients} clients, {args.minutes:g} min, {describe(torch.device('cpu'))}, "
        f"torch {torch.__version__}, {datetime.date.today()}"
    )
    sys.exit(bool(state.wrong))


if __name__ == "__main__":
    main()
