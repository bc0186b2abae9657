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
from minillm.models.loss import linear_cross_entropy
from minillm.models.moe import Experts
from minillm.models.norm import GatedRMSNorm, RMSNorm
from minillm.models.rope import apply_rope

kernels = train_kernels.load_kernels(torch.float32)
pytestmark = pytest.mark.skipif(kernels is None, reason="no C++ compiler")


@pytest.mark.parametrize("room", [1, 2**20])
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("groups", "value_size"), [(6, 8), (2, 8), (3, 5)])
def test_documents_are_attended_to_as_with_a_mask(
    monkeypatch: pytest.MonkeyPatch, room: int, block: int, groups: int, value_size: int
) -> None:
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    monkeypatch.setattr(cpu_attention, "ROOM_BYTES", room)
    torch.manual_seed(0)
    ends = [[0, 1, 9, 23], [0, 23]]
    mask = torch.zeros(2, 1, 23, 23, dtype=torch.bool)
    start = torch.zeros(2, 23, dtype=torch.int32)
    for row in (0, 1):
        for a, b in zip(ends[row][:-1], ends[row][1:], strict=True):
            mask[row, 0, a:b, a:b] = torch.ones(b - a, b - a).tril()
            start[row, a:b] = a
    documents = Documents(start)
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
    found = documents_to_attend(model.model.train(), x, None)
    assert found is not None
    assert found.starts.tolist() == [[0] * 4] * 2
    places = torch.tensor([[0, 1, 0, 1], [3, 4, 5, 6]])
    found = documents_to_attend(model.model, x, places)
    assert found is not None
    assert found.starts.tolist() == [[0, 0, 2, 2], [0] * 4]
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


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def assert_near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare with fp64: to rounding in fp32, or to the one rounding to bf16 that results get."""
    bound = 1e-5 if ours.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.double(), exact, atol=bound, rtol=bound)


def in_fp64(function: Any, inputs: tuple[torch.Tensor, ...], g: torch.Tensor) -> list[torch.Tensor]:
    """Return the result and the gradients of `inputs`."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = function(*exact)
    return [y.detach(), *torch.autograd.grad(y, exact, g.double())]


@DTYPES
def test_gates_are_those_of_silu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h = (8 * torch.randn(3, 5, 14)).to(dtype).requires_grad_()
    gate, up = (part.detach().clone().requires_grad_() for part in h.chunk(2, -1))
    g = torch.randn(3, 5, 7).to(dtype)
    expected, *wanted = in_fp64(lambda gate, up: F.silu(gate) * up, (gate, up), g)
    ours = swiglu(gate, up)
    assert ours.dtype == dtype
    assert_near(ours, expected)
    for mine, other in zip(torch.autograd.grad(ours, (gate, up), g), wanted, strict=True):
        assert_near(mine, other)
    packed = packed_swiglu(h)
    assert_near(packed, expected)
    (mine,) = torch.autograd.grad(packed, h, g)
    assert_near(mine, torch.cat(wanted, -1))


@DTYPES
@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("is_cast", [False, True])
def test_norms_are_those_of_the_formula(dtype: torch.dtype, has_gate: bool, is_cast: bool) -> None:
    torch.manual_seed(0)
    kind = GatedRMSNorm if has_gate else RMSNorm
    norm = kind(12, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    made = torch.bfloat16 if is_cast else dtype
    x = (3 * torch.randn(3, 7, 12)).to(dtype).requires_grad_()
    gate = (3 * torch.randn(3, 7, 12)).to(made).requires_grad_()
    g = torch.randn(3, 7, 12).to(made)

    def exact(x: Any, weight: Any, gate: Any) -> Any:
        y = weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return y * F.silu(gate) if has_gate else y + 0 * gate

    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        ours = norm(x, gate) if has_gate else norm(x)
    assert type(ours.grad_fn).__name__ == "_CpuRMSNormBackward"
    assert ours.dtype == made
    wanted = in_fp64(exact, (x, norm.weight, gate), g)
    inputs = (x, norm.weight, gate)[: 2 + has_gate]
    found = [ours, *torch.autograd.grad(ours, inputs, g)]
    for mine, other in zip(found, wanted, strict=False):
        assert_near(mine, other)


@DTYPES
@pytest.mark.parametrize("size", [8, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotation_is_that_of_the_formula(dtype: torch.dtype, size: int, batch: int) -> None:
    torch.manual_seed(0)
    angles = 9 * torch.rand(batch, 5, 1, size // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    whole = torch.randn(3, 5, 2, 11).to(dtype).requires_grad_()  # a slice: rows are apart
    g = torch.randn(3, 5, 2, 8).to(dtype)

    def exact(x: Any) -> Any:
        x = x[..., :8]
        a, b = x[..., : size // 2], x[..., size // 2 : size]
        c, s = angles.double().cos(), angles.double().sin()
        return torch.cat((a * c - b * s, b * c + a * s, x[..., size:]), -1)

    ours = apply_rope(whole[..., :8], cos, sin)
    assert ours.dtype == dtype
    wanted, wanted_grad = in_fp64(exact, (whole,), g)
    assert_near(ours, wanted)
    (grad,) = torch.autograd.grad(ours, whole, g)
    assert_near(grad, wanted_grad)
    with torch.no_grad():
        assert_near(apply_rope(whole[..., :8].float(), cos, sin), wanted)  # without the kernel


@DTYPES
def test_the_loss_of_a_head_is_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 16).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(50, (300,))
    labels[::7] = -100

    def exact(x: Any, weight: Any) -> Any:
        logits = x @ weight.to(dtype).double().T  # what the products see
        return F.cross_entropy(logits, labels, reduction="sum") / 11

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = linear_cross_entropy(x, weight, labels, 11)
    wanted = in_fp64(exact, (x, weight), torch.ones(()))
    found = [ours, *torch.autograd.grad(ours, (x, weight))]
    bound = (
        1e-5 if dtype == torch.float32 else 2**-7
    )  # logits are rounded, then what is made of them
    for mine, other in zip(found, wanted, strict=True):
        error = (mine.double() - other).norm() / other.norm()
        assert error < bound


@pytest.mark.parametrize(
    "name", ["mini_llama3:tiny", "mini_deepseekv3:tiny", "mini_qwen3_next:tiny"]
)
def test_bf16_is_as_near_to_fp32_as_without_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a whole model; the routers choose as in fp32, lest they choose other experts."""
    torch.manual_seed(0)
    model: Any = registry.build_model(registry.build_config(name, vocab_size=99)).train()
    ids = torch.randint(99, (4, 40))
    positions = torch.cat((torch.arange(25), torch.arange(15))).expand(4, -1)
    chosen: list[torch.Tensor] = []

    def gradients(is_cast: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            out = model(ids, position_ids=positions, labels=ids, use_cache=False, skip_logits=True)
        out.loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def keep(module: Any, args: Any, kwargs: Any, experts: list[Any]) -> Any:
        x_ND, index_NK, weight_NK = args
        if len(experts) < num_layers:
            experts.append(index_NK)
            return None
        turn = calls[0] % num_layers
        calls[0] += 1
        return (x_ND, experts[turn], weight_NK), kwargs

    layers = [m for m in model.modules() if isinstance(m, Experts)]
    num_layers, calls = len(layers), [0]
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, a, k: keep(m, a, k, chosen), with_kwargs=True)
    exact, ours = gradients(False), gradients(True)
    monkeypatch.setattr(train_kernels, "load_kernels", lambda dtype: None)
    plain = gradients(True)

    def error(found: dict[str, torch.Tensor]) -> float:
        total = sum(float((found[n] - exact[n]).square().sum()) for n in exact)
        return (total / sum(float(g.square().sum()) for g in exact.values())) ** 0.5

    assert ours.keys() == plain.keys() == exact.keys()
    assert error(ours) < 1.1 * error(plain) < 0.1


@DTYPES
@pytest.mark.parametrize("size", [5, 150])
@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1, 1, 1, 1, 2], [4, 5, 5, 5, 5, 5, 5, 5]]])
def test_convolution_is_the_sum_of_shifted_products(
    dtype: torch.dtype, size: int, segments: list[list[int]] | None
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, size).to(dtype).requires_grad_()
    weight = torch.randn(size, 4, requires_grad=True)
    segment = None if segments is None else torch.tensor(segments)
    ours = conv_silu(x, weight, segment)
    assert ours.dtype == dtype
    g = torch.randn_like(ours)
    wanted = in_fp64(lambda x, w: F.silu(short_conv(x, w, segment)), (x, weight), g)
    # what silu is given is kept in bf16, and its gradient made of that
    bound = 1e-5 if dtype == torch.float32 else 3 * 2**-8
    for mine, other in zip((ours, *torch.autograd.grad(ours, (x, weight), g)), wanted, strict=True):
        torch.testing.assert_close(mine.double(), other, atol=bound, rtol=bound)


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


def test_autocast_to_a_dtype_without_kernels_takes_the_operations_of_pytorch() -> None:
    torch.manual_seed(0)
    model: Any = registry.build_model(registry.build_config("mini_llama3:tiny", vocab_size=99))
    ids = torch.randint(99, (2, 12))
    with torch.autocast("cpu", torch.float16):
        out = model.train()(ids, labels=ids, use_cache=False)
    out.loss.backward()
    exact = model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(out.loss.float(), exact, atol=0.01, rtol=0.01)
