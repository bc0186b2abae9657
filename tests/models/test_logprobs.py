"""Log-probabilities, stop ids and constraints of `Generator`, against one plain forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minillm.errors import ConfigError, InputError
from minillm.models import registry
from minillm.models.generator import PIECE_TOKENS, Generator
from minillm.models.sampling import SamplingParams, measure_tokens

PROMPT = [5, 9, 13, 40, 41, 7, 99, 250]
NAMES = ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"]


@pytest.fixture(params=NAMES)
def generator(request: Any, tokenizer: PreTrainedTokenizerFast) -> Generator:
    torch.manual_seed(0)
    config = registry.build_config(f"{request.param}:tiny", vocab_size=len(tokenizer))
    return Generator(registry.build_model(config).eval(), tokenizer)


def expected(generator: Generator, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every next token, by the definition."""
    with torch.no_grad():
        logits = generator.model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def test_logprobs_of_answer_and_prompt_are_those_of_one_pass(generator: Generator) -> None:
    params = SamplingParams(
        seed=3, temperature=1.7, top_k=50, repetition_penalty=1.5, max_tokens=20, min_tokens=20,
        logprobs=4, prompt_logprobs=2,
    )  # fmt: skip
    done = generator.generate(PROMPT, params)
    ids = [*PROMPT, *done.token_ids]
    whole = expected(generator, ids)
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    found = [*done.prompt_logprobs[1:], *done.logprobs]
    assert [one.token_id for one in found] == ids[1:]
    for at, one in enumerate(found):
        assert one.logprob == pytest.approx(float(whole[at, ids[at + 1]]), abs=2e-4)
        values, order = whole[at].sort(descending=True)
        num = 2 if at + 1 < len(PROMPT) else 4
        assert [token for token, _ in one.top] == order[:num].tolist()
        assert [value for _, value in one.top] == pytest.approx(values[:num].tolist(), abs=2e-4)


def test_a_prompt_in_several_pieces_is_measured_as_one(generator: Generator) -> None:
    ids = torch.randint(3, 280, (PIECE_TOKENS + 40,)).tolist()
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    (delta,) = generator.stream(ids, params)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (), "length")
    assert delta.prompt_logprobs is not None
    whole = expected(generator, ids)
    exact = [float(whole[at, token]) for at, token in enumerate(ids[1:])]
    got = [one.logprob for one in delta.prompt_logprobs[1:] if one]
    assert got == pytest.approx(exact, abs=2e-4)


def test_measuring_the_prompt_does_not_change_the_answer(generator: Generator) -> None:
    plain = SamplingParams(temperature=0, max_tokens=20)
    measured = SamplingParams(temperature=0, max_tokens=20, logprobs=0, prompt_logprobs=0)
    for prompt in (PROMPT, PROMPT[:1]):
        answers = [generator.generate(prompt, params) for params in (plain, measured)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].logprobs is None
        assert len(answers[1].prompt_logprobs or ()) == len(prompt)


def test_deltas_carry_as_many_logprobs_as_tokens(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(seed=1, max_tokens=80, logprobs=1, prompt_logprobs=0, stop=("e", "t"))
    deltas = list(
        Generator(make_model(vocab_size=len(tokenizer)), tokenizer).stream(PROMPT, params)
    )
    for delta in deltas:
        assert [one.token_id for one in delta.logprobs or ()] == list(delta.token_ids)
    assert [delta.prompt_logprobs is not None for delta in deltas] == [
        at == 0 for at in range(len(deltas))
    ]


def test_a_full_context_can_be_measured_but_not_continued(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = Generator(make_model(vocab_size=len(tokenizer)), tokenizer)
    prompt = [5] * generator.max_context
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    assert len(generator.generate(prompt, params).prompt_logprobs or ()) == len(prompt)
    with pytest.raises(InputError):
        generator.generate([*prompt, 5], params)
    with pytest.raises(InputError):
        generator.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))


def test_a_stop_id_ends_the_answer_and_its_text_is_not_shown(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = Generator(make_model(vocab_size=len(tokenizer)), tokenizer)
    free = generator.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20))
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=20, stop_ids=(stop,))
    done = generator.generate(PROMPT, params)
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: first + 1]
    text = tokenizer.decode(free.token_ids[:first], skip_special_tokens=True)
    assert done.text == text.rstrip("\ufffd")
    params = SamplingParams(temperature=0, max_tokens=20, stop_ids=(stop,), min_tokens=20)
    assert stop not in generator.generate(PROMPT, params).token_ids


class Countdown:
    """Allows one token at a time, from a list, then only end-of-text."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self.left, self.size = [*tokens, 2], vocab_size
        self.seen: list[int] = []

    def mask_V(self) -> torch.Tensor:  # noqa: N802
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[self.left[0]] = True
        return mask

    def accept(self, token: int) -> None:
        self.seen.append(token)
        del self.left[0]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_constraint_decides_what_may_come(generator: Generator, temperature: float) -> None:
    tokens = [70, 71, 200, 5]
    made: list[Countdown] = []

    def make() -> Countdown:
        made.append(Countdown(tokens, generator.vocab_size))
        return made[-1]

    params = SamplingParams(
        temperature=temperature, constraint=make, logit_bias={9: 100}, logprobs=0
    )
    for _ in range(2):
        done = generator.generate(PROMPT, params)
        assert list(done.token_ids) == made[-1].seen == [*tokens, 2]
        assert done.finish_reason == "stop"
        assert all(one.logprob < -0.01 for one in done.logprobs or ())  # of the free model
    assert len(made) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 21},
        {"logprobs": -1},
        {"prompt_logprobs": 21},
        {"max_tokens": 0},
        {"max_tokens": 0, "logprobs": 1},
        {"stop_ids": (-1,)},
        {"min_tokens": 1, "constraint": lambda: None},
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**fields)


def test_top_is_at_most_the_vocabulary() -> None:
    (one,) = measure_tokens(torch.tensor([[0.0, 1.0, 2.0]]), [1], 20)
    assert [token for token, _ in one.top] == [2, 1, 0]
    assert one.logprob == one.top[1][1]
