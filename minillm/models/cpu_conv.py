"""The short convolution before the delta rule and its silu, for training on a CPU.

One walk through memory forward and one backward, where shifted products take a dozen.

B batch · T positions · D channels · W width of the convolution
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import call, kernels_for


def has_conv_kernel(x_BTD: Tensor, weight_DW: Tensor) -> bool:
    """Tell whether `conv_silu` can be used here: training in fp32 on a CPU with a compiler."""
    return torch.is_grad_enabled() and kernels_for(x_BTD, weight_DW) is not None


def conv_silu(x_BTD: Tensor, weight_DW: Tensor, segment_BT: Tensor | None = None) -> Tensor:
    """Return `silu(short_conv(x, weight, segment))`."""
    batch, length = x_BTD.shape[:2]
    before_BT = torch.arange(length).expand(batch, -1)
    if segment_BT is not None:
        is_start_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0))
        before_BT = before_BT - (before_BT * is_start_BT).cummax(1).values
    y_BTD: Tensor = _ConvSilu.apply(  # type: ignore[no-untyped-call]
        x_BTD.contiguous(), weight_DW, before_BT.to(torch.int32).contiguous()
    )
    return y_BTD


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DW: Tensor, before_BT: Tensor) -> Tensor:
        """Return the output; `before` is how many tokens of its document precede each."""
        kernels, weight_WD = kernels_for(x_BTD), weight_DW.T.contiguous()
        pre_BTD, y_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
        sizes = *x_BTD.shape, len(weight_WD)
        call(kernels.minillm_conv, x_BTD, weight_WD, before_BT, pre_BTD, *sizes)
        call(kernels.minillm_silu, pre_BTD, y_BTD, pre_BTD.numel())
        ctx.save_for_backward(x_BTD, weight_WD, before_BT, pre_BTD)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of x and weight."""
        x_BTD, weight_WD, before_BT, pre_BTD = ctx.saved_tensors
        dx_BTD, d_BTD = torch.empty_like(x_BTD), g_BTD.clone(memory_format=torch.contiguous_format)
        dw_BWD = x_BTD.new_zeros(len(x_BTD), *weight_WD.shape)
        given = x_BTD, weight_WD, before_BT, pre_BTD, d_BTD, dx_BTD, dw_BWD
        kernel = kernels_for(x_BTD).minillm_conv_backward
        call(kernel, *given, *x_BTD.shape, len(weight_WD))
        return dx_BTD, dw_BWD.sum(0).T, None
