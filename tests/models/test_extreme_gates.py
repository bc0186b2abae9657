"""mini_qwen3_next with gates at their ends, judged by transformers' class computing in fp64.

Decays from 1 - 1e-30 to 0, corrections from 1e-25 to whole, output gates open and shut. There the
official class in fp32 may itself be further than 2e-5 from its result in fp64: a rounding at one
token is kept for all that follow, and loud weights amplify it. Then ours is asked to be no further.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from tests.models.test_mini_qwen3_next import TOLERANCE, VARIANTS, ids, make

LENGTH, PADDING = 70, 5
WAYS = ("whole", "padded", "by_one", "by_five")


def extreme(seed: int) -> Any:
    """A random variant; each layer's gates are scaled by chance."""
    draw = random.Random(seed)
    model = make(seed, **VARIANTS[draw.choice(sorted(VARIANTS))])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-11, 5)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-12, 12)
            elif name.endswith("in_proj_ba.weight"):
                parameter.mul_(draw.choice([1, 10, 40]))
            elif name.endswith(("in_proj_qkvz.weight", "q_proj.weight")):
                parameter.mul_(draw.choice([1, 5]))
            elif name.endswith("shared_expert_gate.weight"):
                parameter.mul_(draw.choice([1, 20]))
    return model


class _WideTorch:
    """torch, whose fp32 is fp64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def computing_in_fp64() -> Iterator[None]:
    """Let the official modeling file, which casts to fp32 in many places, cast to fp64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3_next, "torch", _WideTorch())
        patch.setattr(Tensor, "float", Tensor.double)
        yield


@torch.no_grad()
def logits(model: Any, way: str) -> Tensor:
    """Logits of one row of tokens, `(LENGTH, V)`."""
    tokens = ids(1, LENGTH)
    if way == "whole":
        return model(tokens).logits[0]
    if way == "padded":
        padded = torch.cat((torch.zeros(1, PADDING, dtype=torch.long), tokens), dim=1)
        return model(padded, attention_mask=(padded != 0).long()).logits[0, PADDING:]
    cache, parts = None, []
    for piece in tokens.split(1 if way == "by_one" else 5, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits[0])
    return torch.cat(parts)


def exact_logits(model: Any) -> Tensor:
    with computing_in_fp64():
        wide = model.export_official().double()
        wide.set_experts_implementation("eager")  # the other has no fp64
        exact, again = logits(wide, "whole"), logits(wide, "by_one")
    assert exact.dtype == torch.float64
    assert (exact - again).abs().max() < 1e-10  # it is fp64 that was computed
    return exact


def distances(seed: int) -> tuple[Tensor, Tensor]:
    """Distance of ours and of the official class from fp64, each `(ways, LENGTH, V)`."""
    ours = extreme(seed)
    exact = exact_logits(ours)
    assert exact.std() > 0.2
    both = [
        torch.stack([(logits(model, way) - exact).abs() for way in WAYS])
        for model in (ours, ours.export_official())
    ]
    return both[0], both[1]


def rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def assert_no_further(ours: Tensor, official: Tensor) -> None:
    assert float(ours.max()) <= max(TOLERANCE, float(official.max()))


@pytest.mark.parametrize("seed", [0, 5, 19])
def test_logits_are_no_further_from_fp64_than_those_of_qwen(seed: int) -> None:
    ours, official = distances(seed)
    assert float(official.max()) > TOLERANCE  # a hard one
    assert_no_further(ours, official)


@pytest.mark.slow
def test_over_many_configurations_ours_is_the_nearer() -> None:
    """One of forty is further, by chance: seed 35, 2.9e-5 where the official class has 1.5e-5."""
    ratios, further = [], []
    for seed in range(40):
        ours, official = distances(seed)
        ratios.append(rms(ours) / rms(official))
        worst = float(ours.max()), float(official.max())
        if worst[0] > max(TOLERANCE, worst[1]):
            further.append(seed)
    assert float(torch.tensor(ratios).log().mean().exp()) < 0.5
    assert sum(ratio < 1 for ratio in ratios) >= 32
    assert len(further) <= 1


@pytest.mark.parametrize("seed", [0, 5, 19])
def test_greedy_answers_and_loss_are_those_of_qwen(seed: int) -> None:
    ours = extreme(seed)
    models = ours, ours.export_official()
    given = {"attention_mask": torch.ones(1, 8), "do_sample": False, "pad_token_id": 0}
    answers = [m.generate(ids(1, 8), max_new_tokens=16, **given).tolist() for m in models]
    assert answers[0] == answers[1]
    with torch.no_grad():
        tokens = ids(2, LENGTH)
        losses = [m(tokens, labels=tokens, num_items_in_batch=100).loss for m in models]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
