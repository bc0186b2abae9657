"""The gated delta rule in C++ against a loop over tokens in fp64, written from the equation."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minillm.models import cpu_delta, train_kernels
from minillm.models import gated_delta as gd
from minillm.models.cpu_delta import has_delta_kernel, train_delta_rule

kernels = train_kernels.load_kernels(torch.float32)
pytestmark = pytest.mark.skipif(kernels is None, reason="no C++ compiler")

SEGMENTS = {
    "one": [[75], [75]],
    "inside_chunks": [[10, 40, 25], [50, 25]],
    "at_their_ends": [[32, 32, 11], [64, 11]],
    "beside_their_ends": [[31, 2, 42], [33, 30, 12]],
    "of_one_token": [[1, 1, 30, 1, 31, 1, 9, 1], [75]],
}
SIZES = {"one_head_each": (2, 2, 5, 7), "two_heads": (2, 4, 16, 24), "three_heads": (1, 3, 33, 64)}


def draw(
    length: int = 75, sizes: tuple[int, int, int, int] = (2, 4, 16, 24), seed: int = 0
) -> list[Tensor]:
    """Return q, k, v, g and beta of two rows; decays from nearly 1 to nearly 0."""
    random = torch.Generator().manual_seed(seed)
    groups, heads, keys, values = sizes
    shapes = [(groups, keys)] * 2 + [(heads, values), (heads,), (heads,)]
    q, k, v, g, beta = (torch.randn(2, length, *shape, generator=random) for shape in shapes)
    return [q, k, v, -(2 * g).exp(), (2 * beta).sigmoid()]


def ids_of(lengths: list[list[int]] | None) -> Tensor | None:
    """Return the document of each token."""
    if lengths is None:
        return None
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(rows)


def loop(given: list[Tensor], segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row by row and token by token, forgetting everything at the start of a document."""
    q, k, v, g, beta = (x.double() for x in given)
    ratio = v.shape[2] // k.shape[2]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(ratio, dim=2) for x in (q, k))
    outs, lasts = [], []
    for b in range(len(v)):
        s, out = torch.zeros(v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.double), []
        for t in range(v.shape[1]):
            starts = segment is not None and t > 0 and segment[b, t] != segment[b, t - 1]
            s = s * (0.0 if starts else g[b, t].exp()[:, None, None])
            lack = v[b, t] - torch.einsum("hkv,hk->hv", s, k[b, t])
            s = s + torch.einsum("hk,hv,h->hkv", k[b, t], lack, beta[b, t])
            out.append(torch.einsum("hkv,hk->hv", s, q[b, t]) * k.shape[-1] ** -0.5)
        outs.append(torch.stack(out))
        lasts.append(s)
    return torch.stack(outs), torch.stack(lasts)


def assert_near(mine: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(exact.detach().abs().max()))
    torch.testing.assert_close(
        mine.double() / scale, exact.double() / scale, atol=tolerance, rtol=0
    )


def assert_is_the_loop(given: list[Tensor], segment: Tensor | None, tolerance: float) -> None:
    """Compare output, S after the last token, and the gradients of all that is given."""
    given = [x.detach().requires_grad_() for x in given]
    wide = [x.detach().double().requires_grad_() for x in given]
    ours, theirs = train_delta_rule(*given, segment), loop(wide, segment)
    assert ours[0].dtype == given[2].dtype
    g = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in ours]
    g = [x.to(y.dtype) for x, y in zip(g, ours, strict=True)]
    for mine, exact in zip(ours, theirs, strict=True):
        assert_near(mine, exact, tolerance)
    mine_all = torch.autograd.grad(ours, given, g)
    exact_all = torch.autograd.grad(theirs, wide, [x.double() for x in g])
    for mine, exact in zip(mine_all, exact_all, strict=True):
        assert mine.isfinite().all()
        assert_near(mine, exact, tolerance)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
def test_outputs_and_gradients_are_those_of_the_loop(
    lengths: list[list[int]], sizes: tuple[int, int, int, int]
) -> None:
    assert_is_the_loop(draw(sizes=sizes), ids_of(lengths), 3e-6)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 96])
def test_any_length(length: int) -> None:
    assert_is_the_loop(draw(length), None, 3e-6)


@pytest.mark.parametrize("lengths", [None, SEGMENTS["inside_chunks"]])
def test_sums_are_fp32_and_results_bf16(lengths: list[list[int]] | None) -> None:
    given = draw(sizes=(1, 2, 64, 64))
    given = [x.bfloat16() for x in given[:3]] + given[3:]
    assert_is_the_loop(given, ids_of(lengths), 2**-8)
    for mine, exact in zip(train_delta_rule(*given), loop(given, None), strict=True):
        error = (mine.double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 1e-6).all()  # one rounding, at the end


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("decay", [-1e-30, -0.02, -39.0])
def test_gates_at_their_ends(decay: float, beta: float) -> None:
    given = draw()
    given[3], given[4] = torch.full_like(given[3], decay), torch.full_like(given[4], beta)
    assert_is_the_loop(given, ids_of(SEGMENTS["inside_chunks"]), 1e-5)


def test_decay_beyond_the_end_of_numbers_forgets() -> None:
    given = draw()
    given[3][:, ::7] = -1e30
    assert_is_the_loop(given, None, 1e-5)
    given = [x.requires_grad_() for x in given]
    grad = torch.autograd.grad(train_delta_rule(*given)[0].sum(), given[3])[0]
    assert (grad[:, ::7] == 0).all()


def test_nothing_of_a_document_is_seen_in_another() -> None:
    given, segment = draw(), ids_of(SEGMENTS["inside_chunks"])
    whole = train_delta_rule(*given, segment)[0]
    assert segment is not None
    for row, document in ((0, 1), (0, 2), (1, 1)):
        alone = train_delta_rule(*(x[row][segment[row] == document][None] for x in given))[0]
        torch.testing.assert_close(whole[row][segment[row] == document][None], alone)


def test_gradients_of_a_document_have_nothing_of_those_that_follow() -> None:
    given, segment = [x.requires_grad_() for x in draw()], ids_of(SEGMENTS["inside_chunks"])
    assert segment is not None
    out, _ = train_delta_rule(*given, segment)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    is_first = segment == 0
    found = [
        torch.autograd.grad(
            out, given, torch.where(is_first[..., None, None], g, by * g), retain_graph=True
        )
        for by in (0.0, 1e6)
    ]
    for without, loud in zip(*found, strict=True):
        assert torch.equal(without[is_first], loud[is_first])


def test_parts_of_a_wider_tensor_are_read_where_they_are() -> None:
    q, k, v, g, beta = draw()
    wide = torch.cat([x.flatten(2) for x in (q, k, v)], -1).requires_grad_()
    parts = wide.split((32, 32, 96), -1)
    views = [x.unflatten(-1, (n, -1)) for x, n in zip(parts, (2, 2, 4), strict=True)]
    assert [cpu_delta._by_tokens(x) is x for x in views] == [True] * 3
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    expected = train_delta_rule(q, k, v, g, beta)[0]
    assert torch.equal(train_delta_rule(*views, g, beta)[0], expected)
    assert torch.equal(train_delta_rule(q, k, turned, g, beta)[0], expected)
    (mine,) = torch.autograd.grad(train_delta_rule(*views, g, beta)[0].sum(), wide)
    given = [x.requires_grad_() for x in (q, k, v)]
    apart = torch.autograd.grad(train_delta_rule(*given, g, beta)[0].sum(), given)
    assert torch.equal(mine, torch.cat([x.flatten(2) for x in apart], -1))


@pytest.mark.parametrize("which", [0, 1], ids=["output", "last_state"])
def test_only_one_result_may_have_a_gradient(which: int) -> None:
    given = [x.requires_grad_() for x in draw()]
    mine = torch.autograd.grad(train_delta_rule(*given)[which].square().sum(), given)
    result = loop(given, None)[which]
    exact = torch.autograd.grad(result.square().sum(), given, materialize_grads=True)
    for ours, theirs in zip(mine, exact, strict=True):
        assert_near(ours, theirs, 3e-6)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_bits_do_not_depend_on_the_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = [x.requires_grad_() for x in draw()]
        out, last = train_delta_rule(*given, ids_of(SEGMENTS["inside_chunks"]))
        grads = torch.autograd.grad(out.square().sum() + last.square().sum(), given)
        found.append((out, last, *grads))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_it_is_used_in_training_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw()
    calls: list[int] = []

    def count(*args: Tensor | None) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return train_delta_rule(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gd, "train_delta_rule", count)
    trained = gd.gated_delta_rule(*given)
    assert calls == [1]
    with torch.no_grad():
        expected = gd.gated_delta_rule(*given)
    gd.gated_delta_rule(*given, state_BHKV=torch.zeros_like(expected[1]))
    assert calls == [1]
    for mine, other in zip(trained, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    q, k, v = given[:3]
    assert not has_delta_kernel(q, k, v.bfloat16())
    assert not has_delta_kernel(q.double(), k.double(), v.double())
    assert not has_delta_kernel(q.to("meta"), k.to("meta"), v.to("meta"))
