"""OpenAI's Responses API with the openai client, whose own types check every answer."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

MODEL = "lab/scripted"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ADD: Any = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}


@pytest.fixture(scope="module")
def server(serve: Any, scripted: Any) -> Iterator[Any]:
    with serve(scripted(max_context=4000)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def names(item: Any) -> Iterator[str]:
    """Yield fields that the client's types do not know."""
    if isinstance(item, BaseModel):
        yield from item.model_extra or ()
        for field in type(item).model_fields:
            yield from names(getattr(item, field))
    elif isinstance(item, list):
        for one in item:
            yield from names(one)


def events(client: Any, **fields: Any) -> list[Any]:
    """Return a stream's events, each checked against the client's strict types."""
    found = []
    with client.responses.with_streaming_response.create(model=MODEL, stream=True, **fields) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert "[DONE]" not in str(lines)
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        event = EVENTS.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}"
        found.append(event)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def test_a_response_is_what_the_clients_types_say(client: Any, server: Any) -> None:
    done = client.responses.create(
        model=MODEL,
        input="hi",
        instructions="S",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.4,
        metadata={"a": "b"},
        user="u",
        truncation="disabled",
        service_tier="auto",
        extra_body={"top_k": 3, "seed": 7},
    )
    assert server.generator.prompts[-1] == "[system]S[user]hi[assistant]"
    got = server.generator.seen[-1]
    assert (got.max_tokens, got.temperature, got.top_p) == (9, 0.5, 0.4)
    assert (got.top_k, got.seed) == (3, 7)
    assert (done.output_text, done.status, done.object) == ("Hello!", "completed", "response")
    assert (done.metadata, done.user, done.instructions) == ({"a": "b"}, "u", "S")
    assert done.incomplete_details is None
    usage: Any = done.usage
    assert (usage.output_tokens, usage.total_tokens) == (3, usage.input_tokens + 3)
    assert set(names(done)) <= {"store"}  # which the real service repeats too
    Response.model_validate(done.model_dump(), strict=True)


def test_events_have_the_real_names_in_the_real_order(client: Any) -> None:
    found = events(client, input="hi")
    part = ["response.output_text.delta"] * 3
    assert [event.type for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *part,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in found[4:7]) == found[7].text == "Hello!"
    assert len({event.item_id for event in found[3:9]}) == 1
    last = found[-1].response
    assert (last.id, last.output_text) == (found[0].response.id, "Hello!")
    assert last.output[0].status == "completed"
    assert found[0].response.status == "in_progress"
    assert found[0].response.usage is None
    assert found[8].part.text == "Hello!"
    assert found[3].part.text == ""


def test_the_clients_own_stream_helper_puts_it_together(client: Any) -> None:
    with client.responses.stream(model=MODEL, input="chinese") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "你好，世界 🙂‍↔️\u2028\n"


def test_a_think_part_is_a_reasoning_item_before_the_message(client: Any) -> None:
    done = client.responses.create(model=MODEL, input="think")
    thought, message = done.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "let me see"
    assert message.type == "message"
    assert done.output_text == "42"
    usage: Any = done.usage
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    found = events(client, input="think")
    assert [e.type.removeprefix("response.") for e in found][2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert found[9].output_index == 1
    inside = client.responses.create(
        model=MODEL, input="hi", extra_body={"chat_template_kwargs": {"enable_think": True}}
    )
    assert [item.type for item in inside.output] == ["reasoning"]


def test_calls_are_items_and_results_go_back_as_items(client: Any, server: Any) -> None:
    done = client.responses.create(model=MODEL, input="calls", tools=[ADD])
    first, second = done.output
    assert (first.type, second.type) == ("function_call", "function_call")
    assert (first.name, first.arguments, second.name) == ("add", "{}", "b")
    results: list[Any] = [
        {"type": "function_call_output", "call_id": second.call_id, "output": "B"},
        {
            "type": "function_call_output",
            "call_id": first.call_id,
            "output": [{"type": "input_text", "text": "A"}],
        },
    ]
    sent = [{"role": "user", "content": "q"}, *(i.model_dump() for i in done.output), *results]
    client.responses.create(model=MODEL, input=sent, tools=[ADD])
    by_hand = server.generator.prompts[-1]
    assert by_hand.count("<tool_call>\n{") == 3  # one explains the form
    order = [by_hand.index(f"<tool_response>\n{text}\n") for text in "AB"]
    assert order == sorted(order)  # as the calls came, whatever order the results come in
    client.responses.create(model=MODEL, previous_response_id=done.id, input=results, tools=[ADD])
    assert server.generator.prompts[-1].replace("[user]calls", "[user]q") == by_hand


def test_events_of_a_call(client: Any) -> None:
    found = events(client, input="call", tools=[ADD])
    tail = [e for e in found if getattr(e, "output_index", 0) == 1]
    assert [e.type.removeprefix("response.") for e in tail] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert tail[0].item.arguments == ""
    assert json.loads(tail[3].item.arguments) == {"a": 1}
    with client.responses.stream(model=MODEL, input="call", tools=[ADD]) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]


def test_an_answer_that_is_cut_is_incomplete(client: Any) -> None:
    done = client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert (done.status, done.output_text) == ("incomplete", "Hello")
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert events(client, input="hi", max_output_tokens=2)[-1].type == "response.incomplete"


def test_an_answer_without_text_is_an_empty_message(client: Any) -> None:
    done = client.responses.create(model=MODEL, input="empty")
    assert (done.output_text, len(done.output)) == ("", 1)


def test_a_failure_in_a_stream_is_an_event(client: Any) -> None:
    last = events(client, input="boom")[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert "secret" not in last.response.error.message
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=MODEL, input="boom")


def test_stored_responses_are_fetched_continued_and_deleted(client: Any, server: Any) -> None:
    first = client.responses.create(model=MODEL, input="hi", instructions="I")
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(
        model=MODEL, previous_response_id=first.id, input=[{"role": "user", "content": "think"}]
    )
    assert server.generator.prompts[-1] == "[user]hi[assistant]Hello![user]think[assistant]"
    third = client.responses.create(model=MODEL, previous_response_id=second.id, input="hi")
    assert "[assistant]42[user]hi[assistant]" in server.generator.prompts[-1]
    shown = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert [item.type for item in shown] == ["message", "message", "message", "reasoning"][:2] + [
        item.type for item in shown[2:]
    ]
    assert len(shown) == 6
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model=MODEL, previous_response_id=first.id, input="hi")
    assert caught.value.param == "previous_response_id"
    client.responses.create(model=MODEL, previous_response_id=second.id, input="hi")
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(second.id)


def test_store_false_keeps_nothing(client: Any) -> None:
    done = client.responses.create(model=MODEL, input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(done.id)
    last = events(client, input="hi", store=False)[-1]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.response.id)
    kept = events(client, input="hi")[-1].response
    assert client.responses.retrieve(kept.id).output_text == "Hello!"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "input[0].call_id",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "?"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"conversation": "c"}, "conversation"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"input": "x" * 9000}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    server: Any, fields: dict[str, Any], param: str
) -> None:
    body = {"model": MODEL, "input": "hi", **fields}
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert "messages" not in error["message"]


def test_another_model_is_404(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="hi")
