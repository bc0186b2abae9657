"""Documents in one row, told apart by positions that restart, do not see each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

LENGTHS = (5, 1, 9, 7)


def packed(vocab_size: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab_size, (1, sum(LENGTHS)), generator=draw)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, positions


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch and transformers
@pytest.mark.parametrize(
    "implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_packed_logits_are_those_of_each_document_alone(
    make_model: Callable[..., Any], implementation: str
) -> None:
    model = make_model()
    model.set_attn_implementation(implementation)
    ids, positions = packed()
    together = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(piece, use_cache=False).logits for piece in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_packed_gradients_are_those_of_each_document_alone(make_model: Callable[..., Any]) -> None:
    ids, positions = packed()
    labels = ids.clone()
    labels[positions == 0] = -100  # no document is asked for the first token of the next
    together, alone = make_model().train(), make_model().train()
    num = (labels != -100).sum()
    together(
        ids, position_ids=positions, labels=labels, num_items_in_batch=num, use_cache=False
    ).loss.backward()
    for piece in ids.split(LENGTHS, 1):
        if piece.shape[1] > 1:
            alone(piece, labels=piece, num_items_in_batch=num).loss.backward()
    for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_rows_of_a_batch_may_be_packed_differently(model: Any) -> None:
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[*range(4), *range(6)], [*range(10)]])
    together = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[1:], model(ids[1:]).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:1, 4:], model(ids[:1, 4:]).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_after_the_last_document_changes_nothing_before_it(model: Any) -> None:
    ids, positions = packed()
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    places = torch.cat([positions, torch.zeros(1, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(
        model(padded, position_ids=places, use_cache=False).logits[:, : ids.shape[1]],
        model(ids, position_ids=positions, use_cache=False).logits,
        atol=1e-5,
        rtol=0,
    )
