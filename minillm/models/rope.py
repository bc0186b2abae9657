"""Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Llama.

Each pair of features (i, i + K/2) is turned by the angle `position * theta^(-2i/K)`, so that the
product of a query and a key depends on their distance only. Frequency scaling for longer
contexts (linear, dynamic, yarn, longrope, llama3) comes from transformers by the `rope_type`.

B batch · T positions · H heads · K head size
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from minillm.models.train_kernels import kernels_for, kernels_of


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables for given positions.

    Attribute and buffer names are those that transformers looks for when it loads a model on the
    meta device and when a scaling changes with the length.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, **_: Any) -> tuple[Tensor, float]:
        """Return the K/2 frequencies and the factor of the tables (1: unscaled).

        With a `partial_rotary_factor`, K is that share of the head.
        """
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of shape `(B, T, 1, K)` in the dtype of `x`.

        The first half of sin is negated: `apply_rope` then needs no negation.
        """
        # fp32 whatever the model's dtype: bf16 cannot tell position 257 from 258
        angles = position_ids[..., None, None].float() * self.inv_freq.to(x.device, torch.float)
        cos, sin = angles.cos(), angles.sin()
        scale = self.attention_scaling
        cos_BT1K = torch.cat((cos, cos), dim=-1).mul_(scale).to(x.dtype)
        sin_BT1K = torch.cat((-sin, sin), dim=-1).mul_(scale).to(x.dtype)
        return cos_BT1K, sin_BT1K


def apply_rope(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Turn every feature pair of `x` by its position's angle.

    Works on the layout in which projections come out, so that nothing is copied to transpose.
    Features beyond the table's size stay as they are.
    """
    is_trained = torch.is_grad_enabled() and cos_BT1K.dtype == torch.float32
    if is_trained and x_BTHK.stride(-1) == 1 and kernels_for(x_BTHK):
        y_BTHK: Tensor = _CpuRope.apply(x_BTHK, cos_BT1K, sin_BT1K)  # type: ignore[no-untyped-call]
        return y_BTHK
    size = cos_BT1K.shape[-1]
    if size < x_BTHK.shape[-1]:
        turned = apply_rope(x_BTHK[..., :size], cos_BT1K, sin_BT1K)
        return torch.cat((turned, x_BTHK[..., size:]), dim=-1)
    swapped_BTHK = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BTHK * cos_BT1K, swapped_BTHK, sin_BT1K)


class _CpuRope(torch.autograd.Function):
    """One walk through memory; the gradient is turned the other way."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
        """Return the turned features, in the dtype of `x`."""
        ctx.save_for_backward(cos_BT1K, sin_BT1K)
        return _turn(x_BTHK, cos_BT1K, sin_BT1K, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTHK: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of `x`."""
        cos_BT1K, sin_BT1K = ctx.saved_tensors
        return _turn(g_BTHK.contiguous(), cos_BT1K, sin_BT1K, -1), None, None


def _turn(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor, sign: int) -> Tensor:
    if x_BTHK.stride(0) != x_BTHK.shape[1] * x_BTHK.stride(1):
        x_BTHK = x_BTHK.contiguous()
    batch, length, heads, size = x_BTHK.shape
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    turned, places = cos_BT1K.shape[-1], cos_BT1K.shape[0] * length
    kernels_of(x_BTHK).rope(
        x_BTHK, cos_BT1K.contiguous(), sin_BT1K.contiguous(), y_BTHK, batch * length, heads, size,
        turned, places, x_BTHK.stride(1), x_BTHK.stride(2), sign,
    )  # fmt: skip
    return y_BTHK
