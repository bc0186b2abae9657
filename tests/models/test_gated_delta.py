"""The gated delta rule against a loop over tokens written from the equation."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minillm.models import gated_delta as gd
from minillm.models.gated_delta_net import softplus
from minillm.models.packing import document_positions, documents, segments_if_packed

B, T, G, H, K, V = 2, 200, 2, 4, 8, 12
BOUNDARIES = {
    "one": (200,),
    "inside_a_chunk": (37, 163),
    "at_a_chunk": (64, 136),
    "after_a_chunk": (65, 135),
    "two_in_a_row": (130, 1, 69),
    "many": (37, 27, 1, 65, 1, 69),
    "every_7": (*[7] * 28, 4),
}


def inputs(seed: int = 0, length: int = T, decay: float = 1.0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, length, G, K)] * 2 + [(B, length, H, V)] + [(B, length, H)] * 2
    q, k, v, g, beta = (torch.randn(shape, generator=draw) for shape in shapes)
    return [q, k, v, -decay * g.exp(), beta.sigmoid()]


def segments(lengths: tuple[int, ...]) -> torch.Tensor:
    return documents(torch.cat([torch.arange(n) for n in lengths])[None])


def oracle(
    q: Any, k: Any, v: Any, g: Any, beta: Any, segment: Any = None, state: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token in fp64, forgetting everything at the start of a document."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    ratio = v.shape[2] // k.shape[2]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(ratio, dim=2) for x in (q, k))
    s = torch.zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.double)
    s = s if state is None else state.double()
    out = []
    for t in range(v.shape[1]):
        if segment is not None and t and segment[0, t] != segment[0, t - 1]:
            s = torch.zeros_like(s)
        s = s * g[:, t, :, None, None].exp()
        found = torch.einsum("bhkv,bhk->bhv", s, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - found)
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
        out.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t]) / k.shape[-1] ** 0.5)
    return torch.stack(out, 1), s


@pytest.mark.parametrize("lengths", BOUNDARIES.values(), ids=BOUNDARIES)
@pytest.mark.parametrize("decay", [0.02, 1.0])
def test_chunks_give_the_outputs_and_gradients_of_the_loop(
    lengths: tuple[int, ...], decay: float
) -> None:
    segment = segments(lengths) if len(lengths) > 1 else None
    ours, theirs = ([x.requires_grad_() for x in inputs(decay=decay)] for _ in range(2))
    out, state = gd.chunk_gated_delta_rule(*ours, segment_BT=segment)
    expected, last = oracle(*theirs, segment)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.double(), last, atol=1e-5, rtol=0)
    g_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    g_state = torch.randn(state.shape, generator=torch.Generator().manual_seed(2))
    ((out * g_out).sum() + (state * g_state).sum()).backward()
    ((expected * g_out).sum() + (last * g_state).sum()).backward()
    for mine, exact in zip(ours, theirs, strict=True):
        scale = max(1.0, float(exact.grad.abs().max()))
        torch.testing.assert_close(mine.grad / scale, exact.grad / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [(200,), (1,) * 20 + (180,), (63, 1, 2, 134), (5,) * 40])
def test_any_number_of_tokens_continues_from_a_state(pieces: tuple[int, ...]) -> None:
    state, outs = torch.zeros(B, H, K, V), []
    for piece in zip(*(x.split(pieces, dim=1) for x in inputs()), strict=True):
        out, state = gd.gated_delta_rule(*piece, state_BHKV=state)
        outs.append(out)
    expected, last = oracle(*inputs())
    torch.testing.assert_close(torch.cat(outs, 1).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.double(), last, atol=1e-5, rtol=0)


def test_extreme_decay_neither_overflows_nor_leaves_nan() -> None:
    given = [x.requires_grad_() for x in inputs(decay=40.0)]
    out, state = gd.chunk_gated_delta_rule(*given)
    (out.sum() + state.sum()).backward()
    torch.testing.assert_close(out.double(), oracle(*given)[0], atol=2e-6, rtol=0)
    assert all(torch.isfinite(x.grad).all() for x in given)


def test_autocast_changes_nothing() -> None:
    expected = gd.gated_delta_rule(*inputs())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gd.gated_delta_rule(*inputs())[0], expected)


@pytest.mark.parametrize("lengths", BOUNDARIES.values(), ids=BOUNDARIES)
def test_convolution_is_conv1d_of_each_document(lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, 6, generator=draw)
    weight = torch.randn(6, 4, generator=draw)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    out = gd.short_conv(x, ours, segments(lengths))
    expected = torch.cat(
        [
            F.conv1d(F.pad(piece.mT, (3, 0)), theirs[:, None], groups=6).mT
            for piece in x.split(lengths, 1)
        ],
        dim=1,
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    (out * x).sum().backward()
    (expected * x).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_past", [0, 3, 4, 9])
def test_convolution_continues_from_context(num_past: int) -> None:
    x, weight = torch.randn(B, 20, 6), torch.randn(6, 4)
    whole = gd.short_conv(x, weight)
    torch.testing.assert_close(gd.short_conv(x, weight, None, num_past), whole[:, num_past:])


def test_documents_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [4, 5, 6, 7, 9, 10]])
    assert documents(positions).tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 1]]
    assert segments_if_packed(positions[1:, :4]) is None


def test_cumulative_lengths_count_over_rows() -> None:
    lengths = torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    assert document_positions(lengths, 2, 4).tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]


def test_soft_reset_is_a_reset_for_kernels_without_segments() -> None:
    q, k, v, g, beta = inputs(decay=0.1)
    segment = segments(BOUNDARIES["every_7"])
    out, _ = gd.chunk_gated_delta_rule(q, k, v, gd.forget_at_starts(g, segment), beta)
    torch.testing.assert_close(
        out.double(), oracle(q, k, v, g, beta, segment)[0], atol=5e-5, rtol=0
    )


def test_importable_gpu_kernel_is_not_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setattr(gd, "_gpu_kernel", lambda: pytest.fail("asked for a GPU kernel"))
    given = [x.to(torch.bfloat16) for x in inputs()]
    assert gd.gated_delta_rule(*given)[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its compiler
@pytest.mark.parametrize("is_packed", [False, True])
def test_training_step_is_one_graph(is_packed: bool) -> None:
    torch._dynamo.reset()
    segment = segments((37, 27, 1, 15)) if is_packed else None
    plain, compiled = ([x.requires_grad_() for x in inputs(length=80)] for _ in range(2))

    def step(*given: torch.Tensor) -> torch.Tensor:
        return gd.gated_delta_rule(*given, segment_BT=segment)[0].square().sum()

    step(*plain).backward()
    torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(*compiled).backward()
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_softplus_is_that_of_torch() -> None:
    x = torch.linspace(-100, 100, 201)
    torch.testing.assert_close(softplus(x), F.softplus(x))
