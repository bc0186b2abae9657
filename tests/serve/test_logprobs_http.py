"""Log-probabilities over HTTP with a real model, against one plain forward pass."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import minillm
from minillm.data.tokenizer import load_tokenizer
from minillm.models import registry
from minillm.models.generator import Generator

MODEL = "lab/scripted"
ASSETS = Path(minillm.__file__).parent / "models/assets/mini_tokenizer"
TEXT = "你好 world"


@pytest.fixture(scope="module")
def real(serve: Any) -> Iterator[tuple[Generator, httpx.Client]]:
    tokenizer = load_tokenizer(ASSETS)
    torch.manual_seed(0)
    config = registry.build_config("mini_llama3:tiny", vocab_size=len(tokenizer))
    generator = Generator(registry.build_model(config).eval(), tokenizer)
    with serve(generator) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        yield generator, http


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"model": MODEL, "prompt": TEXT, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_echo_without_an_answer_scores_the_prompt(real: Any) -> None:
    generator, http = real
    done = complete(http, echo=True, logprobs=1, max_tokens=0)
    found = done["choices"][0]["logprobs"]
    ids = generator.tokenizer.encode(TEXT)
    with torch.no_grad():
        exact = generator.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert done["choices"][0]["text"] == TEXT
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    expected = [float(exact[at, token]) for at, token in enumerate(ids[1:])]
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for at, (token, offset) in enumerate(zip(found["tokens"], found["text_offset"], strict=True)):
        assert TEXT[offset:].startswith(token) or token.startswith("bytes:"), at
    assert done["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_answer_and_prompt_are_measured_alike(real: Any, stream: bool) -> None:
    generator, http = real
    fields: dict[str, Any] = {"prompt": generator.tokenizer.encode(TEXT), "temperature": 0}
    first = complete(http, **fields, max_tokens=6, logprobs=2)["choices"][0]["logprobs"]
    assert len(first["tokens"]) == 6
    again = generator.tokenizer.encode(TEXT)
    with torch.no_grad():
        for logprob in first["token_logprobs"]:
            row = generator.model(input_ids=torch.tensor([again])).logits[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(float(row.max()), abs=1e-4)
            again.append(int(row.argmax()))
    if stream:
        body = {"model": MODEL, **fields, "max_tokens": 6, "logprobs": 2, "stream": True}
        text = http.post("/v1/completions", json=body).text
        assert text.count('"token_logprobs":[') >= 1


def test_a_chat_reports_each_token_of_its_text(real: Any) -> None:
    _, http = real
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 1,
            "logprobs": True, "max_tokens": 8}  # fmt: skip
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]
    assert len(content["content"]) == 8
    assert all(one["top_logprobs"] == [] and one["logprob"] <= 0 for one in content["content"])
    body["top_logprobs"] = 3
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]
    assert all(len(one["top_logprobs"]) == 3 for one in content["content"])


def test_tokens_there_and_back_and_metrics(real: Any) -> None:
    generator, http = real
    ids = http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert ids == generator.tokenizer.encode(TEXT)
    assert http.post("/detokenize", json={"tokens": ids}).json()["content"] == TEXT
    refused = http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
    assert refused.status_code == 501
    assert refused.headers["x-should-retry"] == "false"
    complete(http, max_tokens=2, seed=1)
    text = http.get("/metrics").text
    assert "minillm_requests_running 0.0" in text
    assert "minillm_generation_tokens_total" in text
    assert "minillm_time_to_first_token_seconds_bucket" in text


@pytest.mark.parametrize("think", [False, True])
def test_an_answer_follows_a_schema(real: Any, think: bool) -> None:
    _, http = real
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["happy", "sad"]}, "ok": {"type": "boolean"}},
        "required": ["mood", "ok"],
        "additionalProperties": False,
    }
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 1,
            "max_tokens": 60, "temperature": 1,
            "chat_template_kwargs": {"enable_think": think},
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
            "logit_bias": {"32003": 20.0} if think else {}}  # fmt: skip
    for _ in range(3):
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
        body["seed"] += 1
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert set(found) == {"mood", "ok"}
        assert found["mood"] in ("happy", "sad")
    body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"
