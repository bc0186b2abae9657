"""What a request becomes."""

from typing import Any

import pytest

from minillm.serve.problems import ApiError, error_body, short
from minillm.serve.sampling_choice import Defaults, sampling_params
from minillm.serve.schema import ChatRequest, CompletionRequest, check_ids, parse

TURN = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, {"model": "m", "messages": [TURN], **fields})


def test_a_request_that_chooses_nothing_gets_the_defaults() -> None:
    params = sampling_params(chat(), Defaults(0.3, 0.8), room=99, choice=0)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.8, 99)
    assert (params.seed, params.stop, dict(params.logit_bias)) == (None, (), {})


def test_zero_is_a_choice() -> None:
    assert sampling_params(chat(temperature=0), Defaults(), room=9, choice=0).temperature == 0


def test_the_answer_is_cut_to_the_room_in_the_context() -> None:
    assert sampling_params(chat(max_tokens=50), Defaults(), room=7, choice=0).max_tokens == 7
    assert sampling_params(chat(max_tokens=5), Defaults(), room=7, choice=0).max_tokens == 5


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).limit == 9
    assert chat(max_tokens=5).limit == 5
    assert chat().limit is None


@pytest.mark.parametrize(
    ("seed", "choice", "expected"), [(7, 2, 9), (2**63 - 1, 1, 0), (-1, 0, 2**63 - 1)]
)
def test_choices_count_the_seed_up_within_63_bits(seed: int, choice: int, expected: int) -> None:
    params = sampling_params(chat(seed=seed), Defaults(), room=9, choice=choice)
    assert params.seed == expected


@pytest.mark.parametrize(("given", "stop"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_is_a_string_or_a_list(given: Any, stop: tuple[str, ...]) -> None:
    assert chat(stop=given).stop == stop


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_becomes_a_list_of_prompts(given: Any, prompts: list[Any]) -> None:
    assert parse(CompletionRequest, {"model": "m", "prompt": given}).prompt == prompts


@pytest.mark.parametrize("given", [[True], [1.0], [[1], "a"], {}, 3, [[True]], [None]])
def test_a_prompt_of_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, {"model": "m", "prompt": given})
    assert caught.value.param == "prompt"


def test_bias_keys_become_ids() -> None:
    assert chat(logit_bias={"3": -100, "40": 0.5}).logit_bias == {3: -100.0, 40: 0.5}


@pytest.mark.parametrize("key", ["-1", "1.0", "", "1" * 10, " 1", "٣"])
def test_a_bias_key_that_is_no_id_is_refused(key: str) -> None:
    with pytest.raises(ApiError, match="not a token id"):
        chat(logit_bias={key: 1})


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    check_ids([0, 9], 10, "prompt")
    with pytest.raises(ApiError, match="token 10; the vocabulary ends at 9"):
        check_ids([10], 10, "prompt")


def test_zero_is_not_taken_for_false() -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, {"model": "m", "prompt": "a", "store": 0})
    assert caught.value.code == "unsupported_parameter"


def test_too_many_turns_are_refused_before_each_is_checked() -> None:
    with pytest.raises(ApiError, match="more than 10000 turns"):
        chat(messages=[{}] * 10_001)


def test_a_bug_shows_nothing_of_its_inside() -> None:
    error = error_body(ValueError("secret"))["error"]
    assert "secret" not in str(error)
    assert error["type"] == "server_error"


def test_long_and_deep_values_are_shortened_for_messages() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert len(short("x" * 1000)) == 80
    assert len(short(deep)) < 80


def test_an_object_may_come_with_a_schema_as_llama_cpp_has_it() -> None:
    assert chat(response_format={"type": "json_object"}).response_format == {"type": "object"}
    form = {"type": "json_object", "schema": {"const": 1}}
    assert chat(response_format=form).response_format == {"const": 1}
    with pytest.raises(ApiError, match="must be text"):
        chat(response_format={"type": "json_object", "schema": 3})
