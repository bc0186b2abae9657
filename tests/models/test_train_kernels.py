"""Attention of documents on a CPU, and the row passes in C++, against PyTorch's operations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minillm.models import cpu_attention, registry, train_kernels
from minillm.models.cpu_attention import Documents, attend_documents, documents_to_attend
from minillm.models.cpu_conv import conv_silu
from minillm.models.gated_delta import short_conv
from minillm.models.gates import packed_swiglu, swiglu
from minillm.models.moe import Experts

kernels = train_kernels.load_kernels(torch.float32)
pytestmark = pytest.mark.skipif(kernels is None, reason="no C++ compiler")


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("groups", "value_size"), [(6, 8), (2, 8), (3, 5)])
def test_documents_are_attended_to_as_with_a_mask(
    monkeypatch: pytest.MonkeyPatch, block: int, groups: int, value_size: int
) -> None:
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    torch.manual_seed(0)
    ends = [[0, 1, 9, 23], [0, 23]]
    documents = Documents(
        (row, a, b) for row in (0, 1) for a, b in zip(ends[row][:-1], ends[row][1:], strict=True)
    )
    mask = torch.zeros(2, 1, 23, 23, dtype=torch.bool)
    for row, a, b in documents:
        mask[row, 0, a:b, a:b] = torch.ones(b - a, b - a).tril()
    q = torch.randn(2, 6, 23, 8, requires_grad=True)
    k = torch.randn(2, groups, 23, 8, requires_grad=True)
    v = torch.randn(2, groups, 23, value_size, requires_grad=True)
    ours, _ = attend_documents(None, q, k, v, documents, scaling=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-5, rtol=1e-5)
    g = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), g),
        torch.autograd.grad(theirs, (q, k, v), g.transpose(1, 2)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["mini_llama3:tiny", "mini_deepseekv3:tiny", "mini_qwen3_next:tiny"]
)
def test_training_with_documents_is_that_with_a_mask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = registry.build_model(registry.build_config(name, vocab_size=99)).train()
    ids = torch.randint(99, (2, 12))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 0], list(range(12))])
    found = []
    for load in (train_kernels.load_kernels, lambda dtype: None):
        monkeypatch.setattr(train_kernels, "load_kernels", load)
        model.zero_grad()
        loss = model(
            ids, position_ids=positions, labels=ids, use_cache=False, skip_logits=True
        ).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def test_documents_are_found_where_positions_restart_and_only_in_training() -> None:
    model: Any = registry.build_model(registry.build_config("mini_llama3:tiny", vocab_size=9))
    x = torch.zeros(2, 4, 1)
    assert documents_to_attend(model.model.train(), x, None) == [(0, 0, 4), (1, 0, 4)]
    places = torch.tensor([[0, 1, 0, 1], [3, 4, 5, 6]])
    assert documents_to_attend(model.model, x, places) == [(0, 0, 2), (0, 2, 4), (1, 0, 4)]
    assert documents_to_attend(model.model, x.double(), places) is None
    with torch.no_grad():
        assert documents_to_attend(model.model, x, places) is None
    assert documents_to_attend(model.model.eval(), x, places) is None


def test_exponentials_are_right_over_their_whole_range() -> None:
    x = torch.cat((torch.linspace(-86, 0, 5_000), torch.tensor([-1e30, -torch.inf, -87.5])))[None]
    expected = x.double().exp()
    top, total = torch.empty(1), torch.empty(1)
    kernels.exp_rows(x, 1, x.shape[1], x.shape[1], top, total)
    torch.testing.assert_close(x.double(), expected, rtol=3e-7, atol=1e-37)
    assert float(top) == 0
    x[0, 7] = torch.nan
    kernels.exp_rows(x, 1, x.shape[1], x.shape[1], top, total)
    assert total.isnan().all()


def test_gates_are_those_of_silu() -> None:
    torch.manual_seed(0)
    h = (8 * torch.randn(3, 5, 14)).requires_grad_()
    gate, up = (part.detach().clone().requires_grad_() for part in h.chunk(2, -1))
    g = torch.randn(3, 5, 7)
    expected = F.silu(gate) * up
    wanted = torch.autograd.grad(expected, (gate, up), g)
    ours = swiglu(gate, up)
    torch.testing.assert_close(ours, expected)
    for mine, other in zip(torch.autograd.grad(ours, (gate, up), g), wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    packed = packed_swiglu(h)
    torch.testing.assert_close(packed, expected)
    (mine,) = torch.autograd.grad(packed, h, g)
    torch.testing.assert_close(mine, torch.cat(wanted, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1, 1, 1, 1, 2], [4, 5, 5, 5, 5, 5, 5, 5]]])
def test_convolution_is_the_sum_of_shifted_products(segments: list[list[int]] | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    segment = None if segments is None else torch.tensor(segments)
    ours, theirs = conv_silu(x, weight, segment), F.silu(short_conv(x, weight, segment))
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), g),
        torch.autograd.grad(theirs, (x, weight), g),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_experts_are_mixed_as_without_kernels(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 16, 8)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(9, 16, requires_grad=True)
    share = torch.rand(9, num, requires_grad=True)
    index = torch.rand(9, 4).topk(num).indices
    found = []
    for load in (train_kernels.load_kernels, lambda dtype: None):
        monkeypatch.setattr(train_kernels, "load_kernels", load)
        y = experts(x, index, share)
        grads = torch.autograd.grad(y.square().sum(), (x, share, *experts.parameters()))
        found.append((y.detach(), *grads))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
