"""What each parameter is updated by, and how fast."""

import pytest
import torch

from minillm.models import registry
from minillm.settings import OptimConfig
from minillm.train.optim import build_optimizers


def adamw_rate(width: int, cfg: OptimConfig) -> float:
    config = registry.build_config(
        "mini_llama3:nano", vocab_size=300, hidden_size=width, intermediate_size=64
    )
    optimizers = build_optimizers(registry.build_model(config), cfg, torch.device("cpu"))
    rates = {group["peak_lr"] for group in optimizers[-1].param_groups}
    (rate,) = rates
    return float(rate)


def test_the_rate_of_adamw_falls_with_the_width_unless_given() -> None:
    narrow, wide = (adamw_rate(width, OptimConfig()) for width in (128, 512))
    assert narrow == pytest.approx(4 * wide)
    assert adamw_rate(512, OptimConfig(lr=0.125)) == 0.125
    # alone it also has the matrices, which do not bear as much
    assert adamw_rate(128, OptimConfig(optimizer="adamw")) < narrow / 2
