"""The short convolution before the delta rule and its silu, for training on a CPU.

One walk through memory forward and one backward, where shifted products take a dozen.

B batch · T positions · D channels · W width of the convolution
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import kernels_for, kernels_of


def has_conv_kernel(x_BTD: Tensor, weight_DW: Tensor) -> bool:
    """Tell whether `conv_silu` can be used here: training on a CPU with a compiler."""
    is_trained = torch.is_grad_enabled() and weight_DW.dtype == torch.float32
    return is_trained and kernels_for(x_BTD) is not None


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
        weight_WD = weight_DW.T.contiguous()
        pre_BTD, y_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
        sizes = *x_BTD.shape, len(weight_WD)
        kernels_of(x_BTD).conv(x_BTD, weight_WD, before_BT, pre_BTD, y_BTD, *sizes)
        ctx.save_for_backward(x_BTD, weight_WD, before_BT, pre_BTD)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of x and weight."""
        x_BTD, weight_WD, before_BT, pre_BTD = ctx.saved_tensors
        dx_BTD = torch.empty_like(x_BTD)
        dw_BWD, room_BWD = (weight_WD.new_zeros(len(x_BTD), *weight_WD.shape) for _ in range(2))
        given = x_BTD, weight_WD, before_BT, pre_BTD, g_BTD.contiguous(), dx_BTD, dw_BWD, room_BWD
        kernels_of(x_BTD).conv_backward(*given, *x_BTD.shape, len(weight_WD))
        return dx_BTD, dw_BWD.sum(0).T, None
