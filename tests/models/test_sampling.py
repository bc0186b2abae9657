"""Each rule against transformers' own, against brute force, and the draw against its odds."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minillm.errors import ConfigError
from minillm.models.sampling import (
    Sampler,
    SamplingParams,
    apply_count_penalties,
    apply_repetition_penalty,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)

VOCAB = 60


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def transformed(processor: Any, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return processor(torch.tensor([ids]), logits[None].clone())[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keep_top_k(x, 1), TopKLogitsWarper(1)),
        (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_top_p(x, 0.5), TopPLogitsWarper(0.5)),
        (lambda x: keep_top_p(x, 0.95), TopPLogitsWarper(0.95)),
        (lambda x: keep_min_p(x, 0.05), MinPLogitsWarper(0.05)),
        (lambda x: keep_min_p(x, 1.0), MinPLogitsWarper(1.0)),
    ],
    ids=["top_1", "top_7", "p_.01", "p_.5", "p_.95", "min_p_.05", "min_p_1"],
)
def test_truncation_is_that_of_transformers(
    ours: Callable[[torch.Tensor], torch.Tensor], theirs: Any, seed: int
) -> None:
    logits = random_logits(seed)
    assert torch.equal(ours(logits), transformed(theirs, logits, [0]))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, ids = random_logits(0), [3, 3, 9, 41]
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[ids] = True
    expected = transformed(RepetitionPenaltyLogitsProcessor(penalty), logits, ids)
    torch.testing.assert_close(apply_repetition_penalty(logits, seen, penalty), expected)


def test_all_rules_together_are_those_of_transformers() -> None:
    params = SamplingParams(
        temperature=0.6, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2
    )
    prompt, logits = [4, 8, 8, 50], random_logits(5)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    ours = Sampler(params, torch.tensor(prompt), VOCAB).adjust(logits)
    torch.testing.assert_close(ours, transformed(chain, logits, prompt))


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(values: list[float], p: float) -> None:
    logits = torch.tensor(values)
    kept = torch.isfinite(keep_top_p(logits, p))
    probs = logits.double().softmax(-1)
    mass, least = float(probs[kept].sum()), float(probs[kept].min())
    assert mass >= p - 1e-5
    assert mass - least < p + 1e-5  # without its least likely token it would not reach p
    assert float(probs[~kept].max() if (~kept).any() else 0) <= least + 1e-6


def test_count_penalties_follow_openais_formula() -> None:
    logits = random_logits(1)
    counts = torch.zeros(VOCAB)
    counts[3], counts[7] = 4, 1
    ours = apply_count_penalties(logits, counts, frequency=0.5, presence=0.25)
    for token in range(VOCAB):
        count = {3: 4, 7: 1}.get(token, 0)
        expected = float(logits[token]) - 0.5 * count - 0.25 * (count > 0)
        assert float(ours[token]) == pytest.approx(expected, abs=1e-6)


def test_count_penalties_see_the_answer_but_not_the_prompt() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0, presence_penalty=0.5)
    sampler = Sampler(params, torch.tensor([5, 5]), 10)
    logits = torch.zeros(10)
    logits[5] = 2.0
    # 2.0, then 2 - 1.5 = 0.5, then 2 - 2.5 < 0
    assert [int(sampler.next_token(logits)) for _ in range(3)] == [5, 5, 0]


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    sampler = Sampler(params, torch.tensor([1]), 4)
    logits = torch.tensor([1.0, 1.9, 1.5, 0.0])
    # token 1 is in the prompt: 0.95; 2 is taken, then halved to 0.75; 0 is taken, then 0.5
    assert [int(sampler.next_token(logits)) for _ in range(3)] == [2, 0, 1]


def test_logit_bias_is_added_and_unknown_tokens_are_ignored() -> None:
    params = SamplingParams(temperature=0, logit_bias={2: 5.0, 999: 100.0})
    assert int(Sampler(params, torch.tensor([0]), 4).next_token(torch.zeros(4))) == 2


def test_end_of_text_is_impossible_before_min_tokens() -> None:
    params = SamplingParams(temperature=0, min_tokens=2)
    sampler = Sampler(params, torch.tensor([0]), 4, eos_ids=(3,))
    logits = torch.tensor([0.0, 1.0, 0.0, 9.0])
    assert [int(sampler.next_token(logits)) for _ in range(3)] == [1, 1, 3]


def test_zero_temperature_takes_the_likeliest_whatever_the_truncation() -> None:
    params = SamplingParams(temperature=0, top_k=5, top_p=0.3, min_p=0.5, seed=1)
    logits = random_logits(2)
    assert int(Sampler(params, torch.tensor([0]), VOCAB).next_token(logits)) == logits.argmax()


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(SamplingParams(temperature=2.0, seed=0), torch.tensor([0]), 4)
    draws = 6_000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampler.next_token(logits)] += 1
    expected = (logits / 2).softmax(-1)
    for share, odds in zip((counts / draws).tolist(), expected.tolist(), strict=True):
        assert share == pytest.approx(odds, abs=4 * math.sqrt(odds * (1 - odds) / draws))


def draw(seed: int | None, num: int = 20) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed), torch.tensor([0]), VOCAB)
    return [int(sampler.next_token(random_logits(0))) for _ in range(num)]


def test_a_seed_repeats_the_draws_whatever_torch_was_seeded_with() -> None:
    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert draw(7) == first
    assert draw(8) != first


def test_draws_leave_torchs_own_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    draw(None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_without_a_seed_differ() -> None:
    assert draw(None) != draw(None)


def test_rules_leave_their_input_alone() -> None:
    logits = random_logits(3)
    before = logits.clone()
    params = SamplingParams(
        top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.5, frequency_penalty=1.0,
        logit_bias={1: 3.0}, min_tokens=1,
    )  # fmt: skip
    Sampler(params, torch.tensor([0]), VOCAB, eos_ids=(2,)).next_token(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("max_tokens", 0),
        ("min_tokens", 1_000),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("stop", ("",)),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_config_errors_that_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{field}`"):
        SamplingParams(**{field: value})
