"""The official `openai` client against a real server: what works, and what raises which error."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

USER_HI = [{"role": "user", "content": "hi"}]
MODEL = "lab/scripted"


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, word: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": word}]
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def test_models_are_listed_and_found_by_an_id_with_a_slash(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat_answers_with_usage_in_tokens(client: openai.OpenAI) -> None:
    done = chat(client, "hi")
    assert done.choices[0].message.content == "Hello!"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "stop"
    prompt = len("[user]hi[assistant]")
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
    }


def test_a_stream_has_one_id_the_role_first_one_finish_reason_and_usage_last(
    client: openai.OpenAI,
) -> None:
    chunks = list(chat(client, "hi", stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello!"
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert [r for r in reasons if r] == ["stop"]
    assert reasons[-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3


def test_a_stream_without_include_usage_has_no_usage(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None for chunk in chat(client, "hi", stream=True))


def test_chinese_emoji_and_line_separators_arrive_whole(client: openai.OpenAI) -> None:
    expected = "你好，世界 🙂‍↔️\u2028\n"
    streamed = chat(client, "chinese", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected
    assert chat(client, "chinese").choices[0].message.content == expected


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_think_part_is_apart_from_the_content(client: openai.OpenAI, name: str) -> None:
    message = chat(client, "think").choices[0].message
    assert message.content == "42"
    assert getattr(message, name) == "let me see"
    thought = text = ""
    for chunk in chat(client, "think", stream=True):
        delta = chunk.choices[0].delta
        both = (getattr(delta, name, None) or "", delta.content or "")
        assert not all(both), "reasoning and content in one delta"
        thought, text = thought + both[0], text + both[1]
    assert (thought, text) == ("let me see", "42")


def test_thinking_begins_inside_when_the_prompt_opens_it(client: openai.OpenAI) -> None:
    done = chat(client, "hi", extra_body={"chat_template_kwargs": {"enable_think": True}})
    assert done.choices[0].message.reasoning_content == "Hello!"
    assert done.choices[0].message.content == ""


def test_n_choices_get_seeds_of_their_own(client: openai.OpenAI, server: Any) -> None:
    server.generator.seen.clear()
    done = chat(client, "hi", n=3, seed=7)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [params.seed for params in server.generator.seen] == [7, 8, 9]
    assert done.usage.completion_tokens == 9


def test_n_streamed_choices_each_finish_once(client: openai.OpenAI) -> None:
    chunks = list(chat(client, "hi", n=2, stream=True))
    ends = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert ends == [0, 1]


def test_sampling_fields_reach_the_generator(client: openai.OpenAI, server: Any) -> None:
    server.generator.seen.clear()
    chat(
        client, "hi", temperature=0, top_p=0.5, max_tokens=9, max_completion_tokens=5,
        stop=["a", "b"], frequency_penalty=1, presence_penalty=-1, logit_bias={"65": -100},
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5},
    )  # fmt: skip
    got = server.generator.seen[0]
    assert (got.temperature, got.top_p, got.max_tokens, got.stop) == (0, 0.5, 5, ("a", "b"))
    assert (got.frequency_penalty, got.presence_penalty, got.logit_bias) == (1, -1, {65: -100})
    assert (got.top_k, got.min_p, got.repetition_penalty, got.seed) == (3, 0.1, 1.5, None)


def test_null_means_absent_and_the_servers_defaults_apply(
    client: openai.OpenAI, server: Any
) -> None:
    server.generator.seen.clear()
    chat(client, "hi", extra_body={"temperature": None, "stop": None, "tools": None, "foo": None})
    got = server.generator.seen[0]
    assert (got.temperature, got.top_p, got.stop) == (0.7, 0.9, ())
    assert got.max_tokens == 400 - len("[user]hi[assistant]")  # all that the context has room for


def test_length_is_the_finish_reason_at_the_limit(client: openai.OpenAI) -> None:
    done = chat(client, "hi", max_tokens=2)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("Hello", "length")


def test_content_parts_and_developer_equal_a_string_and_system(
    client: openai.OpenAI, server: Any
) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model=MODEL, messages=messages)
    assert server.generator.prompts[-1] == "[system]S[user]hi[assistant]"


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI, server: Any) -> None:
    answer = chat(client, "think").choices[0].message
    messages = [*USER_HI, answer.model_dump(), {"role": "user", "content": "hi"}]
    client.chat.completions.create(model=MODEL, messages=messages)
    assert server.generator.prompts[-1] == "[user]hi[assistant]42[user]hi[assistant]"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hi", ["Hello!"]),
        (["hi", "other"], ["Hello!", "ok"]),
        ([104, 105], ["Hello!"]),
        ([[104, 105], [120]], ["Hello!", "ok"]),
    ],
)
def test_completions_take_every_form_of_prompt(
    client: openai.OpenAI, prompt: Any, texts: list[str]
) -> None:
    done = client.completions.create(model=MODEL, prompt=prompt)
    assert [choice.text for choice in done.choices] == texts
    assert [choice.index for choice in done.choices] == list(range(len(texts)))


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
def test_echo_begins_with_the_prompt_in_both_modes(client: openai.OpenAI, prompt: Any) -> None:
    done = client.completions.create(model=MODEL, prompt=prompt, echo=True, n=2)
    assert [choice.text for choice in done.choices] == ["hiHello!", "hiHello!"]
    assert done.usage.prompt_tokens == 2
    stream = client.completions.create(model=MODEL, prompt=prompt, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hiHello!"


def test_completions_are_sixteen_tokens_long_by_default(client: openai.OpenAI, server: Any) -> None:
    client.completions.create(model=MODEL, prompt="hi")
    assert server.generator.seen[-1].max_tokens == 16


BAD_CHAT = [
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": 3}, "stop", "invalid_value"),
    ({"logit_bias": {"256": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "name": "bo"}]},
        "messages[0].name",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages", "context_length_exceeded"),
    (
        {"messages": [{"role": "user", "content": "x" * 9999}]},
        "messages",
        "context_length_exceeded",
    ),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter"),
    ({"best_off": 3}, "best_off", "unknown_parameter"),
    (
        {"chat_template_kwargs": {"enable_thought": True}},
        "chat_template_kwargs.enable_thought",
        "unknown_parameter",
    ),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_CHAT)
def test_a_wrong_field_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    body = {"messages": USER_HI, **fields}
    messages = body.pop("messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, extra_body=body)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


NEUTRAL = [
    {"logprobs": False},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"user": "u", "metadata": {"a": "b"}, "store": False},
    {"service_tier": "auto", "modalities": ["text"]},
]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_fields_that_ask_for_nothing_are_accepted(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    assert chat(client, "hi", extra_body=fields).choices[0].message.content == "Hello!"


BAD_COMPLETION = [
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
    ({"prompt": [256]}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": "x" * 400}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": "a", "best_of": 2}, "best_of", "unsupported_parameter"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    ({"prompt": None}, "prompt", "missing_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_COMPLETION)
def test_a_wrong_completion_field_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_limit_is_named_when_the_prompt_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"400 tokens.*411 tokens"):
        chat(client, "x" * (411 - len("[user][assistant]")))


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=USER_HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_failure_in_mid_stream_reaches_the_client_without_its_inside(
    client: openai.OpenAI,
) -> None:
    seen = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(chat(client, "boom", stream=True))
    assert [c.choices[0].delta.content for c in seen] == ["", "so far"]
    assert "secret" not in str(caught.value)
    assert chat(client, "hi").choices[0].message.content == "Hello!"  # the next one is not harmed


def test_a_failure_without_stream_is_a_500_without_its_inside(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, "boom")
    assert "secret" not in json.dumps(caught.value.response.json())


def test_the_key_is_required_where_there_is_one(serve: Any, scripted: Any) -> None:
    with serve(scripted(), api_key="sésame") as server:
        base = f"{server.url}/v1"
        for wrong in ("x", "sesame"):
            with (
                openai.OpenAI(base_url=base, api_key=wrong, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError),
            ):
                client.models.list()


def test_a_full_queue_is_a_429_and_the_waiting_ones_are_served(serve: Any, scripted: Any) -> None:
    with (
        serve(scripted(), max_waiting=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        working = chat(client, "slow", stream=True)
        next(working)
        next(working)  # a token has come: this one is in work, not in the queue
        waiting = chat(client, "hi", stream=True)
        next(waiting)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, "hi")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "overloaded"
        working.close()
        assert "".join(c.choices[0].delta.content or "" for c in waiting) == "Hello!"
