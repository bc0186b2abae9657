"""Tools with the openai client: what the model reads, and how its calls come back."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from minillm.serve.tool_calls import Call, CallReader, call_schema

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "加",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def server(serve: Any, scripted: Any) -> Iterator[Any]:
    with serve(scripted(max_context=4000)) as it:
        yield it


def ask(client: openai.OpenAI, word: str, **fields: Any) -> Any:
    messages = fields.pop("messages", [{"role": "user", "content": word}])
    fields = {"tools": [ADD], **fields}
    return client.chat.completions.create(model="lab/scripted", messages=messages, **fields)


def test_a_call_comes_as_a_call_whole_and_streamed(client: openai.OpenAI) -> None:
    choice = ask(client, "call").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content.strip() == "See."
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == {"a": 1}
    with client.chat.completions.stream(
        model="lab/scripted", messages=[{"role": "user", "content": "call"}], tools=[ADD]
    ) as stream:  # the client puts the pieces together
        final: Any = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content.strip() == "See."
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"a": 1}


def test_several_calls_unless_one_at_a_time_is_asked_for(client: openai.OpenAI) -> None:
    assert [c.function.name for c in ask(client, "calls").choices[0].message.tool_calls] == [
        "add",
        "b",
    ]
    one = ask(client, "calls", parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1
    assert one.content is None


def test_what_is_no_call_stays_text(client: openai.OpenAI) -> None:
    choice = ask(client, "broken").choices[0]
    assert choice.message.content == "<tool_call>{oops</tool_call> a <b"
    assert choice.finish_reason == "stop"
    assert "tool_call" in ask(client, "call", tool_choice="none").choices[0].message.content


def test_the_model_reads_tools_calls_and_results(client: openai.OpenAI, server: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    ask(client, "", messages=messages)
    prompt = server.generator.prompts[-1]
    assert prompt.startswith("[system]S\n\n# Tools")
    assert json.dumps(ADD, ensure_ascii=False) in prompt
    said = '[assistant]<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"{said}[user]<tool_response>\n3\n</tool_response>[assistant]" in prompt
    ask(client, "q", tool_choice="none")
    assert "# Tools" not in server.generator.prompts[-1]


def calls(*uids: str) -> dict[str, Any]:
    made = [{"id": u, "type": "function", "function": {"name": "add"}} for u in uids]
    return {"role": "assistant", "tool_calls": made}


def test_results_are_read_in_the_order_of_the_calls(client: openai.OpenAI, server: Any) -> None:
    results = [{"role": "tool", "tool_call_id": u, "content": u} for u in ("b", "a")]
    ask(client, "", messages=[{"role": "user", "content": "q"}, calls("a", "b"), *results])
    prompt = server.generator.prompts[-1]
    assert "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n" in prompt


RESULT = {"role": "tool", "tool_call_id": "a", "content": "1"}


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([RESULT], "messages[0].tool_call_id"),
        ([calls("b"), RESULT], "messages[1].tool_call_id"),
        ([calls("a"), RESULT, RESULT], "messages[2].tool_call_id"),
        ([calls("a"), {"role": "tool", "content": "1"}], "messages[1].tool_call_id"),
        ([calls("a", "b"), RESULT], "messages[0].tool_calls[1]"),
        ([calls("a"), {"role": "user", "content": "q"}], "messages[0].tool_calls[0]"),
        ([calls("a", "a"), RESULT], "messages[0].tool_calls[1].id"),
    ],
)
def test_a_result_without_its_call_is_a_400(
    client: openai.OpenAI, turns: list[Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "", messages=turns)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_a_wrong_tool_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", **fields)
    assert caught.value.param == param


def test_any_cut_of_an_answer_reads_the_same() -> None:
    text = 'a <tool> \n<tool_call>{"name": "f", "arguments": {"x": "<y>"}}</tool_call>\n b'
    for size in range(1, len(text) + 1):
        reader = CallReader()
        items = [i for at in range(0, len(text), size) for i in reader.feed(text[at : at + size])]
        items += reader.flush()
        calls = [(i.name, i.arguments) for i in items if isinstance(i, Call)]
        assert calls == [("f", '{"x": "<y>"}')]
        said = "".join(i for i in items if isinstance(i, str))
        assert said.split() == ["a", "<tool>", "b"]


def test_a_forced_answer_is_one_call_without_tags() -> None:
    reader = CallReader(is_forced=True)
    assert reader.feed('{"name": "add", "argu') == []
    assert reader.feed('ments": {"a": 2}}') == []
    (call,) = reader.flush()
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == {"a": 2}
    assert call_schema([ADD], "add")["properties"]["name"] == {"const": "add"}
