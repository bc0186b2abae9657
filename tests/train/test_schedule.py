"""Learning-rate schedules against closed forms and transformers' own."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from minillm.settings import OptimConfig
from minillm.train.schedule import lr_share


def test_wsd_warms_up_holds_and_decays_to_the_floor() -> None:
    cfg = OptimConfig(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.4, min_lr_ratio=0.1)
    shares = [lr_share(step, 100, cfg) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10:61] == pytest.approx([1.0] * 51)
    assert shares[60:] == pytest.approx([0.1 + 0.9 * (40 - i) / 40 for i in range(41)])


def test_cosine_is_transformers_cosine_after_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    cfg = OptimConfig(schedule="cosine", warmup_ratio=0.1)
    for step in range(100):
        if step >= 10:  # warm-up differs by design: ours never spends a step at rate 0
            assert lr_share(step, 100, cfg) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()
