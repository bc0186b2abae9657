"""RMSNorm (Zhang & Sennrich 2019, eq. 4): scale by the root mean square, no mean, no bias.

PyTorch has a fused kernel for it on GPUs. On a CPU it is a chain of elementwise operations whose
automatic backward pass rereads every intermediate; training there walks through memory once
forward and once backward, in C++. The result is in the dtype of the products that follow. The
price: no second derivative on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import compute_dtype, kernels_for, kernels_of

PARTS = 16
"""Sums over rows are made of that many, so that their order does not depend on the threads."""


class RMSNorm(nn.Module):
    """`y = weight * x / sqrt(mean(x^2) + eps)` over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape `(..., size)`; statistics are fp32 whatever its dtype."""
        if _has_kernel(x, self.weight):
            return _CpuRMSNorm.apply(x, self.weight, None, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        if x.dtype != self.weight.dtype:  # autocast: PyTorch's fused kernel wants one dtype
            y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
            return y.to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show size and eps when printed."""
        return f"{self.weight.numel()}, eps={self.eps}"


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored as its distance from 1, so that weight decay pulls to 1."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, in fp32 to the end: bf16 would round the small distances away."""
        weight = 1.0 + self.weight.float()
        if _has_kernel(x, weight):
            return _CpuRMSNorm.apply(x, weight, None, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """`rms_norm(x) * silu(gate)`."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `x`, then let the gate through; both `(..., size)`."""
        if _has_kernel(x, self.weight) and gate.dtype == compute_dtype(x):
            return _CpuRMSNorm.apply(x, self.weight, gate, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return (super().forward(x) * F.silu(gate.float())).to(x.dtype)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `x` is normalised by the passes in C++: in training on a CPU."""
    is_plain = x.dtype in (torch.float32, compute_dtype(x)) and weight.dtype == torch.float32
    return is_plain and torch.is_grad_enabled() and kernels_for(x) is not None


class _CpuRMSNorm(torch.autograd.Function):
    """With n = x * r and r = 1/rms: dx = r * (w*g - n * mean(w*g*n)), dw = sum(g * n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        """Return `weight * x / rms`, times `silu(gate)` if there is one."""
        x, gate = x.contiguous(), None if gate is None else gate.contiguous()
        y = torch.empty_like(x, dtype=compute_dtype(x))
        size = x.shape[-1]
        rows = x.numel() // size
        r = x.new_empty(rows, dtype=torch.float32)
        kernels = kernels_of(y)
        norm = kernels.norm if x.dtype == y.dtype else kernels.norm_wide
        norm(x, weight, gate, y, r, rows, size, float(eps))
        ctx.save_for_backward(x, weight, gate, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Return the gradients of x, weight and gate."""
        x, weight, gate, r = ctx.saved_tensors
        g, size = g.contiguous(), x.shape[-1]
        d_x, d_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        d_weight = weight.new_zeros(PARTS, size)
        kernels = kernels_of(g)
        back = kernels.norm_backward if x.dtype == g.dtype else kernels.norm_wide_backward
        back(x, weight, gate, r, g, d_x, d_weight, d_gate, len(r), size, PARTS)
        return d_x, d_weight.sum(0), d_gate, None
