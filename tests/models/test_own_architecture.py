"""The worked example of docs/models.md: a fourth architecture as one file passes the gauntlet."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MinistralForCausalLM

from minillm.models.verify import randomize
from minillm.models.verify import verify as run_checks
from tests.models import sliding_window
from tests.models.gauntlet import IDS, Gauntlet, small_config


@pytest.fixture
def model_type() -> str:
    return sliding_window.SlidingConfig.model_type


class TestSlidingWindow(Gauntlet):
    """The same tests as for the three of the registry."""

    # transformers' static window counts tokens in a Python number: one graph for the first
    # number, one for all others
    num_decoding_graphs = 2


def build(**overrides: Any) -> Any:
    shape = {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": None}
    config = small_config("mini_sliding", **shape | overrides)
    return randomize(AutoModelForCausalLM.from_config(config)).eval()


@torch.no_grad()
def test_a_short_window_is_that_of_ministral() -> None:
    model = build()
    official = model.export_official().eval()
    assert isinstance(official, MinistralForCausalLM)
    assert official.config.layer_types == [*["sliding_attention"] * 3, "full_attention"]
    torch.testing.assert_close(official(IDS).logits, model(IDS).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_token_further_back_than_the_window_is_not_seen() -> None:
    model = build(layer_types=["sliding_attention"] * 4)
    reach = 4 * (6 - 1)  # each layer looks five tokens further back
    ids = torch.cat([IDS[:1], IDS[1:]], 1)
    changed = ids.clone()
    changed[0, 0] = 3 + (int(ids[0, 0]) + 1) % 90
    moved = (model(changed).logits - model(ids).logits).abs().amax(-1)[0]
    assert moved[reach] > 0
    assert moved[reach + 1 :].max() == 0


def test_verify_takes_it_too() -> None:
    checks = list(run_checks(build(), num_tokens=24, with_compile=False))
    assert len(checks) == 6
    assert all(check.is_ok for check in checks), checks
