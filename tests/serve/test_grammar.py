"""Calls of tools that must follow their schema, with the real llguidance."""

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from minillm import paths
from minillm.models import registry
from minillm.models.generator import Generator
from minillm.serve.grammar import Grammars
from minillm.serve.tool_calls import Call, CallReader, call_schema
from minillm.serve.worker import Worker

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SAY: Any = {
    "type": "function",
    "function": {
        "name": "say",
        "parameters": {
            "type": "object",
            "properties": {"text": {"enum": ["一", "two"]}, "loud": {"type": "boolean"}},
            "required": ["text", "loud"],
        },
    },
}


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(paths.BUNDLED_TOKENIZER)
    config = registry.build_config(
        "mini_llama3:tiny",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Generator(registry.build_model(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def client(generator: Generator, serve: Any) -> Iterator[Any]:
    with (
        serve(generator) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as made,
    ):
        yield made


def check(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "add":
        assert given.keys() == {"a"}
        assert 0 <= given["a"] <= 99
    else:
        assert name == "say"
        assert given.keys() == {"text", "loud"}  # its schema does not say that there are no more
        assert given["text"] in ("一", "two")
        assert isinstance(given["loud"], bool)


def test_random_tokens_after_the_tag_make_a_call_that_fits(generator: Generator) -> None:
    worker = Worker(generator)
    make = Grammars(worker).calls(call_schema([ADD, SAY], "required"), inside=False, param="tools")
    rng = random.Random(0)
    eos = generator.eos_ids[0]
    seen = set()
    for number in range(20):
        state, text = make(), "我来。\n<tool_call>" if number % 2 else "<tool_call>"
        ids = worker.encode(text)
        for token in ids:
            assert state.mask_V()[token]
            state.accept(token)
        while "</tool_call>" not in text:
            mask = state.mask_V()
            assert not mask[eos]
            token = rng.choice(mask.nonzero().flatten().tolist())
            state.accept(token)
            ids.append(token)
            text = worker.decode(ids)
            assert len(text) < 400
        reader = CallReader()
        calls = [item for item in reader.feed(text) if isinstance(item, Call)]
        assert len(calls) == 1
        check(calls[0].name, calls[0].arguments)
        seen.add(calls[0].name)
        after = state.mask_V()
        assert after[eos]
        assert after[worker.encode("好")[0]]
    assert seen == {"add", "say"}
    worker.close()


def test_thinking_stays_free(generator: Generator) -> None:
    worker = Worker(generator)
    state = Grammars(worker).calls(call_schema([ADD], "required"), inside=True, param="tools")()
    for token in worker.encode("hm <tool_call> x</think>"):
        assert state.mask_V()[token]
        state.accept(token)
    assert state.mask_V()[generator.eos_ids[0]]
    for token in worker.encode("<tool_call>"):
        state.accept(token)
    assert not state.mask_V()[worker.encode(" x")[0]]
    worker.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", "say"])
def test_a_forced_call_fits_its_schema(client: Any, choice: str, seed: int) -> None:
    wanted = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    done = client.chat.completions.create(
        model="lab/scripted",
        messages=[{"role": "user", "content": "1+1?"}],
        tools=[ADD, SAY],
        tool_choice=wanted,
        max_tokens=200,
        seed=seed,
    )
    (call,) = done.choices[0].message.tool_calls
    assert done.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "say" or choice == "required"
    check(call.function.name, call.function.arguments)


def test_a_strict_tool_of_a_response_and_its_form(client: Any) -> None:
    tool = {"type": "function", **ADD["function"]}
    model = "lab/scripted"
    done = client.responses.create(model=model, input="x", tools=[tool], tool_choice="required")
    check("add", done.output[0].arguments)
    form = {"type": "json_schema", "name": "n", "schema": ADD["function"]["parameters"]}
    done = client.responses.create(model=model, input="x", text={"format": form})
    check("add", done.output_text)
    assert done.text.format.type == "json_schema"
    measured = client.responses.create(
        model=model,
        input="x",
        max_output_tokens=3,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    found = measured.output[0].content[0].logprobs
    said = b"".join(bytes(one.bytes) for one in found).decode(errors="replace")
    assert said == measured.output_text
    assert [len(one.top_logprobs) for one in found] == [2, 2, 2]


def test_strict_is_refused_where_it_cannot_be_honoured(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(tools: list[Any], **fields: Any) -> Any:
        return client.chat.completions.create(
            model="lab/scripted",
            messages=[{"role": "user", "content": "q"}],
            tools=tools,
            max_tokens=3,
            **fields,
        )

    broken = {"type": "function", "function": {**ADD["function"], "parameters": {"type": "x"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        ask([SAY, broken])
    assert ask([SAY, broken], tool_choice="none").usage.completion_tokens == 3
    odd = {"type": "function", "function": {"name": "f", "strict": "yes"}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask([odd])
    assert caught.value.param == "tools[0].function.strict"
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as if it were not installed
    with pytest.raises(openai.BadRequestError, match=r"pip install 'minillm-lab\[grammar\]'") as no:
        ask([SAY, ADD])
    assert no.value.param == "tools[1].function.strict"
    assert ask([SAY]).usage.completion_tokens == 3
