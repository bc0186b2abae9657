"""Training and decoding through the real compiler: one graph, compiled once, the same numbers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

from minillm.models import registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, by its compiler
]
LENGTH, VOCAB = 128, 512
DOCUMENTS = [(100, 28), (128,), (1,) * 128, (*[7] * 18, 2), (64, 64), (63, 1, 64), (31, 97)]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return registry.build_model(registry.build_config(f"{name}:tiny", vocab_size=VOCAB))


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_compiled_once() -> None:
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["inductor"]


@pytest.mark.parametrize("name", ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"])
def test_training_compiles_once_for_all_documents(name: str) -> None:
    plain, compiled = build(name).train(), build(name).train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4) for m in (plain, compiled)]
    forward = torch.compile(compiled, fullgraph=True, dynamic=False)
    for step, lengths in enumerate(DOCUMENTS):
        row = tokens(step, 1, LENGTH)
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        kwargs = {"labels": row, "position_ids": places, "use_cache": False, "skip_logits": True}
        losses = [plain(row, **kwargs).loss]
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            losses.append(forward(row, **kwargs).loss)
        torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=0)
        for loss in losses:
            loss.backward()
        if step == 0:
            for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
        for model, optimizer in zip((plain, compiled), optimizers, strict=True):
            if hasattr(model, "update_router_bias"):
                model.update_router_bias()
            optimizer.step()
            optimizer.zero_grad()
    assert_compiled_once()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"])
def test_decoding_with_a_static_cache_compiles_once(name: str) -> None:
    model = build(name).eval()
    row, cache = tokens(0, 2, 24), StaticCache(config=model.config, max_cache_len=32)
    model(row[:, :10], past_key_values=cache)
    full = model(row).logits
    step = torch.compile(model, fullgraph=True, dynamic=False)
    for at in range(10, 24):
        place = torch.full((2, 1), at)
        with torch.compiler.set_stance("fail_on_recompile" if at > 10 else "default"):
            logits = step(row[:, at : at + 1], past_key_values=cache, position_ids=place).logits
        torch.testing.assert_close(logits[:, 0], full[:, at], atol=1e-5, rtol=0)
    assert_compiled_once()
