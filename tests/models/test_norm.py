"""RMSNorm against the definition and torch's own operation."""

import pytest
import torch
import torch.nn.functional as F

from minillm.models.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (2, 1, 4, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_output_and_gradients_are_those_of_autograd(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    norm.weight.data.normal_(1, 0.2)
    x = (torch.randn(shape) * scale).requires_grad_()
    g = torch.randn(shape)
    y = norm(x)
    ours = torch.autograd.grad(y, (x, norm.weight), g)

    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double()
    weight.requires_grad_()
    expected = weight * exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    theirs = torch.autograd.grad(expected, (exact, weight), g.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0].double() * scale, theirs[0] * scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1].double(), theirs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_output_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.randn(5, 16, dtype=dtype)
    norm = RMSNorm(16, eps=1e-5).to(dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))


def test_zero_input_gives_zero() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    y = RMSNorm(16)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 16))
    assert torch.isfinite(x.grad).all()
