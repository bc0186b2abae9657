"""Twenty training steps of every tiny preset reach the losses that they always reached.

No test of parts sees everything that shapes a loss: initialisation, router bias, auxiliary losses,
order of sums. After a wanted change: `python tests/models/test_golden.py` prints the new table.
"""

from functools import cache
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.models import registry, train_kernels

STEPS, ROWS, LENGTH, VOCAB = 20, 2, 64, 2_048
GOLDEN: dict[str, list[float]] = {
    "mini_llama3:tiny": [7.678658, 7.688171, 7.508854, 7.38208, 7.270155],
    "mini_deepseekv3:tiny": [7.683959, 7.658743, 7.525626, 7.311431, 7.354326],
    "mini_qwen3_next:tiny": [7.616363, 7.653052, 7.541387, 7.398482, 7.292242],
}
"""Losses of steps 1, 5, 10, 15 and 20."""


@cache
def tokens() -> torch.Tensor:
    """The beginning of the bundled corpus, `(STEPS, ROWS, LENGTH)`, in a small vocabulary."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.BUNDLED_TOKENIZER)
    table = pq.read_table(paths.BUNDLED_CORPUS, columns=["text"])
    ids: list[int] = []
    for text in table.column("text").to_pylist():
        ids += tokenizer.encode(text[:2_000])
        if len(ids) >= STEPS * ROWS * LENGTH:
            break
    return torch.tensor(ids[: STEPS * ROWS * LENGTH]).view(STEPS, ROWS, LENGTH) % VOCAB


def train(name: str, steps: int = STEPS) -> list[float]:
    torch.manual_seed(0)
    model: Any = registry.build_model(registry.build_config(name, vocab_size=VOCAB)).train()
    # eps of 1e-3: where a gradient is rounding alone, AdamW's usual 1e-8 makes whole steps of its
    # sign, which is another on each kind of processor, and experts are chosen by it
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-3, foreach=False
    )
    losses = []
    for batch in tokens()[:steps]:
        optimizer.zero_grad()
        loss = model(batch, labels=batch, use_cache=False, skip_logits=True).loss
        loss.backward()
        model.update_router_bias()
        optimizer.step()
        losses.append(loss.item())
    return losses


def table() -> dict[str, list[float]]:
    return {name: pick(train(name)) for name in registry.names() if name.endswith(":tiny")}


def pick(losses: list[float]) -> list[float]:
    return [round(losses[step - 1], 6) for step in (1, 5, 10, 15, 20) if step <= len(losses)]


def test_every_tiny_preset_is_here() -> None:
    assert set(GOLDEN) == {name for name in registry.names() if name.endswith(":tiny")}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_losses_are_those_of_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # by PyTorch's operations, which are there on every machine: with another order of sums
    # tokens soon go to other experts
    monkeypatch.setattr(train_kernels, "load_kernels", lambda dtype: None)
    assert pick(train(name)) == pytest.approx(GOLDEN[name], rel=1e-5)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_losses_with_kernels_begin_as_those_without(name: str) -> None:
    assert pick(train(name, steps=5))[:2] == pytest.approx(GOLDEN[name][:2], rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_kernels.load_kernels = lambda dtype: None  # type: ignore[assignment]
    for preset, values in table().items():
        print(f'    "{preset}": {values},')  # noqa: T201
