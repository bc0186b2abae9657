"""The engine behind the real server: many clients, one that leaves, a full queue."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from minillm import paths
from minillm.models import registry
from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams
from minillm.serve.engine import Engine
from minillm.serve.engine_backend import EngineBackend
from minillm.serve.http import create_app
from minillm.serve.memory import EngineSettings
from minillm.serve.server import Server, listen

MODEL = "lab/tiny"


@dataclass
class Running:
    """A server in a thread."""

    url: str
    backend: EngineBackend
    generator: Generator


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(paths.BUNDLED_TOKENIZER)
    config = registry.build_config(
        "mini_llama3:tiny",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = registry.build_model(config).eval()
    engine = Engine(model, tokenizer, EngineSettings(max_running=3, cache_tokens=4096))
    backend = EngineBackend(engine, max_waiting=2)
    uvicorn = Server(create_app(backend, model=MODEL), 0, backend.abort_all)
    ready = threading.Event()
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=uvicorn.run_on, args=(sock, ready.set), daemon=True)
        thread.start()
        assert ready.wait(10)
        port = sock.getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", backend, Generator(model, tokenizer))
        uvicorn.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        backend.close()
    assert not thread.is_alive()


def wait_idle(backend: EngineBackend, within_s: float) -> None:
    start = time.monotonic()
    while backend.num_open or backend.stats().num_running:
        assert time.monotonic() - start < within_s, "the place was not freed"
        time.sleep(0.005)


def test_clients_at_once_get_the_greedy_answers_of_the_generator(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            calls = [
                client.completions.create(
                    model=MODEL, prompt=f"小猫 {n}", max_tokens=12, temperature=0
                )
                for n in range(4)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    params = SamplingParams(temperature=0, max_tokens=12)
    encode = server.generator.tokenizer.encode
    right = [server.generator.generate(encode(f"小猫 {n}"), params).text for n in range(4)]
    assert asyncio.run(ask()) == right
    wait_idle(server.backend, 1)


def test_several_choices_of_one_request_come_together(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        answer = client.completions.create(
            model=MODEL, prompt=["你好", "hello"], n=2, max_tokens=6, seed=1
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


def test_a_client_that_leaves_frees_its_place_within_a_second(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = server.backend.engine.runner.decode

    def decode_slowly(answers: Any) -> Any:  # else all may be said before the client has left
        time.sleep(0.005)
        return decode(answers)

    monkeypatch.setattr(server.backend.engine.runner, "decode", decode_slowly)
    body = {"model": MODEL, "prompt": "a", "min_tokens": 1900, "max_tokens": 1900, "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        assert next(response.iter_lines())
        assert server.backend.stats().num_running == 1
    wait_idle(server.backend, 1)


def test_a_full_queue_is_429(server: Running) -> None:
    async def flood() -> list[int]:
        body = {"model": MODEL, "prompt": "a", "min_tokens": 60, "max_tokens": 60}
        async with httpx.AsyncClient(timeout=60) as client:
            calls = [client.post(f"{server.url}/v1/completions", json=body) for _ in range(12)]
            return [response.status_code for response in await asyncio.gather(*calls)]

    codes = asyncio.run(flood())
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 3
    wait_idle(server.backend, 1)
