"""The head's loss in blocks against cross entropy on all logits."""

import pytest
import torch
import torch.nn.functional as F

from minillm.models import loss as module
from minillm.models.loss import linear_cross_entropy


def problem(num: int = 300, size: int = 8, vocab: int = 50) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(num, size, requires_grad=True)
    weight = torch.randn(vocab, size, requires_grad=True)
    labels = torch.randint(0, vocab, (num,))
    labels[torch.rand(num) < 0.3] = -100
    return x, weight, labels


@pytest.mark.parametrize("block_bytes", [1, 4 * 50 * 100, 2**24], ids=["64", "100", "all"])
def test_loss_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    x, weight, labels = problem()
    ours = linear_cross_entropy(x, weight, labels)
    theirs = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours * 0.5, (x, weight)),
        torch.autograd.grad(theirs * 0.5, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_blocks_with_ignored_rows_are_those_of_cross_entropy() -> None:
    # as on a GPU, where rows without a label are not taken out first
    x, weight, labels = problem()
    ours = module._LinearCrossEntropy.apply(x, weight, labels, 1)
    theirs = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight)),
        torch.autograd.grad(theirs, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_frozen_head_gets_no_gradient() -> None:
    x, weight, labels = problem()
    weight = weight.detach()
    linear_cross_entropy(x, weight, labels).backward()
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.T, labels, reduction="sum"), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_autocast_loss_is_that_of_the_plain_form_under_autocast() -> None:
    x, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, labels)
        theirs = F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    mine = torch.autograd.grad(ours, (x, weight))
    other = torch.autograd.grad(theirs, (x, weight))
    for a, b in zip(mine, other, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.03 * float(b.abs().max()), rtol=0)


def test_no_labels_give_zero() -> None:
    x, weight, labels = problem()
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert float(x.grad.abs().max()) == 0
