"""SwiGLU (Shazeer 2020, eq. 6), `silu(gate) * up`, without keeping what can be had again.

On a CPU one walk through memory forward and one backward; elsewhere PyTorch's operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import kernels_for, kernels_of


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`; both `(..., F)`."""
    if torch.is_grad_enabled() and kernels_for(gate, up):
        y: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
        return y
    return F.silu(gate) * up


def packed_swiglu(h_M2F: Tensor) -> Tensor:
    """Return silu(first half) * second half."""
    if torch.is_grad_enabled() and kernels_for(h_M2F):
        y: Tensor = _PackedSwiGLU.apply(h_M2F.contiguous())  # type: ignore[no-untyped-call]
        return y
    gate_MF, up_MF = h_M2F.chunk(2, dim=-1)
    return F.silu(gate_MF) * up_MF


def _gate(gate: Tensor, up: Tensor, stride: int) -> Tensor:
    """Return `silu(gate) * up` of rows that begin every `stride` numbers."""
    y, size = gate.new_empty(gate.shape), gate.shape[-1]
    rows = y.numel() // max(size, 1)
    kernels_of(gate).swiglu(gate, up, y, rows, size, stride)
    return y


def _gate_backward(
    gate: Tensor, up: Tensor, g: Tensor, d_gate: Tensor, d_up: Tensor, stride: int
) -> None:
    """Fill in the gradients of gate and up."""
    g, size = g.contiguous(), gate.shape[-1]
    rows = g.numel() // max(size, 1)
    kernels_of(gate).swiglu_backward(gate, up, g, d_gate, d_up, rows, size, stride)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return `silu(gate) * up`."""
        ctx.save_for_backward(gate, up)
        return _gate(gate, up, gate.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both."""
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _gate_backward(gate, up, g, d_gate, d_up, gate.shape[-1])
        return d_gate, d_up


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_M2F: Tensor) -> Tensor:
        """Return silu(first half) * second half."""
        ctx.save_for_backward(h_M2F)
        gate_MF, up_MF = h_M2F.chunk(2, dim=-1)
        return _gate(gate_MF, up_MF, h_M2F.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Return the gradient of both halves in one."""
        (h_M2F,) = ctx.saved_tensors
        d_M2F = torch.empty_like(h_M2F)
        gate_MF, up_MF = h_M2F.chunk(2, dim=-1)
        d_gate_MF, d_up_MF = d_M2F.chunk(2, dim=-1)
        _gate_backward(gate_MF, up_MF, g, d_gate_MF, d_up_MF, h_M2F.shape[-1])
        return d_M2F
