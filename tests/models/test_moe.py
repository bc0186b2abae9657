"""Experts against a loop over tokens, forward and backward, on every path."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minillm.models import moe
from minillm.models.moe import Experts

SHAPES = {
    "plain": (5, 32, 48, 40, 2),
    "rows_of_no_whole_16_bytes": (4, 30, 7, 33, 3),
    "one_token": (4, 16, 8, 1, 2),
    "one_expert": (1, 16, 8, 9, 1),
    "more_experts_than_rows": (64, 16, 8, 3, 2),
}


def problem(
    num_experts: int, size: int, inner: int, tokens: int, chosen: int
) -> tuple[Experts, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    experts = Experts(num_experts, size, inner)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    # uneven, and some experts get nothing
    chances = torch.rand(tokens, num_experts) * torch.linspace(0.1, 1, num_experts)
    index = chances.topk(chosen).indices
    x = torch.randn(tokens, size, requires_grad=True)
    weight = torch.rand(tokens, chosen, requires_grad=True)
    return experts, x, index, weight


def loop(
    experts: Experts, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    rows = []
    for n in range(len(x)):
        total = torch.zeros_like(x[n])
        for k, e in enumerate(index[n].tolist()):
            gate, up = (experts.gate_up_proj[e] @ x[n]).chunk(2)
            total = total + weight[n, k] * (experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def gradients(
    run: Any, experts: Experts, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x, weight, experts.gate_up_proj, experts.down_proj]
    y = run(experts, x, index, weight)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)]


def assert_all_close(ours: Any, expected: Any, atol: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_a_loop(shape: tuple[int, ...]) -> None:
    parts = problem(*shape)
    run = gradients(lambda experts, *args: experts(*args), *parts)
    assert_all_close(run, gradients(loop, *parts), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its compiler
@pytest.mark.parametrize("shape", ["plain", "rows_of_no_whole_16_bytes"])
def test_compiled_without_a_break_it_is_the_same(shape: str) -> None:
    experts, x, index, weight = problem(*SHAPES[shape])
    compiled = torch.compile(experts, fullgraph=True)
    run = gradients(lambda _, *args: compiled(*args), experts, x, index, weight)
    assert_all_close(run, gradients(loop, experts, x, index, weight), atol=1e-5)


@torch.no_grad()
def test_each_row_by_its_own_copy_of_the_weights_is_the_same() -> None:
    experts, x, index, weight = problem(*SHAPES["plain"])
    flat = index.flatten()
    h = moe.packed_swiglu(moe._row_mm(x.repeat_interleave(2, 0), experts.gate_up_proj, flat))
    y = moe._row_mm(h, experts.down_proj, flat).unflatten(0, (-1, 2))
    torch.testing.assert_close(
        experts._mix(y, weight, x), experts(x, index, weight), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", ["plain", "rows_of_no_whole_16_bytes"])
def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32(shape: str) -> None:
    experts, x, index, weight = problem(*SHAPES[shape])
    with torch.autocast("cpu", torch.bfloat16):
        run = gradients(lambda _, *args: experts(*args), experts, x, index, weight)
    exact = gradients(loop, experts, x, index, weight)
    for ours, expected in zip(run, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < (ours - expected).norm() / expected.norm() < 0.02


def test_an_expert_without_tokens_has_gradient_zero() -> None:
    for size, inner in ((32, 48), (30, 7)):
        experts, x, _, weight = problem(4, size, inner, 10, 1)
        index = torch.full((10, 1), 2)
        _, _, _, d_gate_up, d_down = gradients(
            lambda experts, *args: experts(*args), experts, x, index, weight
        )
        for gradient in (d_gate_up, d_down):
            assert [bool(g.any()) for g in gradient] == [False, False, True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its compiler
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_whole_model_in_bf16_with_and_without_the_hardware(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, is_compiled: bool
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(moe, "has_bf16", lambda _: has_bf16)
    experts, x, index, weight = problem(*SHAPES["plain"])
    exact = gradients(loop, experts, x, index, weight)
    experts.to(torch.bfloat16)
    run: Any = experts
    if is_compiled:
        run = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x = x.detach().bfloat16().requires_grad_()
    ours = gradients(lambda _, *args: run(*args), experts, x, index, weight)
    for value, expected in zip(ours, exact, strict=True):
        assert (value.float() - expected).norm() / expected.norm() < 0.02
    half = torch.bfloat16
    assert [value.dtype for value in ours] == [half, half, torch.float32, half, half]


@torch.no_grad()
def test_cpu_without_bf16_multiplies_in_fp32_and_rounds_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe, "has_bf16", lambda _: False)
    monkeypatch.setattr(F, "grouped_mm", lambda *_, **__: pytest.fail("emulated"))
    x, weight = torch.randn(9, 32).bfloat16(), torch.randn(3, 48, 32).bfloat16()
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    exact = torch.cat([x[:4].float() @ weight[0].float().T, x[4:].float() @ weight[2].float().T])
    assert torch.equal(moe.grouped_mm(x, weight, ends), exact.bfloat16())
