"""The gated delta rule for training on a CPU: one C++ function forward, one backward.

The chunk form (Yang et al. 2024, section 3) of the rule (Yang et al. 2025, eq. 10), as in
`gated_delta.py`. There each of its steps is a PyTorch operation for all chunks at once, which
walks through memory and keeps its result for the gradient; here a chunk stays in the cache from
its first step to its last. Kept for the backward pass are, beside the inputs, what S lacks at each
token's key, as large as v in fp32, and S before each chunk, K / 32 times as large.

8 x 512 tokens, 6 value heads of 64, 2 threads of an AMD EPYC: 23 ms forward and backward instead
of 60, and 24 MiB kept instead of 97.

B batch · T positions · G key heads · H = G * R value heads · K key size · V value size · N chunks
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import Kernels, kernels_for, load_source

DELTA_SOURCE = "delta_kernels.cpp"

CHUNK = 32
"""Positions of a chunk, as in `delta_kernels.cpp`."""


def has_delta_kernel(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor) -> bool:
    """Tell whether `train_delta_rule` can be used here: training on a CPU with a compiler."""
    is_trained = torch.is_grad_enabled() and kernels_for(q_BTGK, k_BTGK, v_BTHV) is not None
    return is_trained and load_source(DELTA_SOURCE, v_BTHV.dtype) is not None


def _kernels(x: Tensor) -> Kernels:
    """Return the functions for `x` where `has_delta_kernel` has found them."""
    kernels = load_source(DELTA_SOURCE, x.dtype)
    assert kernels is not None
    return kernels


def train_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `gated_delta_rule` does, from an empty S."""
    out_BTHV, state_BHKV = _DeltaRule.apply(  # type: ignore[no-untyped-call]
        *(_by_tokens(x) for x in (q_BTGK, k_BTGK, v_BTHV)),
        g_BTH.float().contiguous(),
        beta_BTH.float().contiguous(),
        None if segment_BT is None else segment_BT.long().expand(len(v_BTHV), -1).contiguous(),
    )
    return out_BTHV, state_BHKV


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        g_BTH: Tensor,
        beta_BTH: Tensor,
        segment_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output, and S after the last token."""
        (batch, length, groups, keys), (heads, values) = q_BTGK.shape, v_BTHV.shape[2:]
        chunks = -(-length // CHUNK)
        out_BTHV = v_BTHV.new_empty(v_BTHV.shape)
        lack_BTHV = g_BTH.new_empty(v_BTHV.shape)
        states_BHNKV = g_BTH.new_empty(batch, heads, chunks, keys, values)
        last_BHKV = g_BTH.new_empty(batch, heads, keys, values)
        given = q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, segment_BT
        sizes = batch, length, groups, heads // groups, keys, values
        _kernels(v_BTHV).delta(
            *(*given, out_BTHV, lack_BTHV, states_BHNKV, last_BHKV, *sizes),
            *(x.stride(1) for x in (q_BTGK, k_BTGK, v_BTHV)),
        )
        ctx.save_for_backward(q_BTGK, k_BTGK, g_BTH, beta_BTH, segment_BT, lack_BTHV, states_BHNKV)
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        return out_BTHV, last_BHKV

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_out_BTHV: Tensor | None, g_last_BHKV: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, g and beta."""
        saved = ctx.saved_tensors  # once: under activation checkpointing they are computed again
        q_BTGK, k_BTGK, g_BTH, beta_BTH, _, lack_BTHV, _ = saved
        if g_out_BTHV is None:
            g_out_BTHV = q_BTGK.new_zeros(lack_BTHV.shape)
        if g_last_BHKV is not None:
            g_last_BHKV = g_last_BHKV.contiguous()
        grads = [x.new_empty(x.shape) for x in (q_BTGK, k_BTGK, g_out_BTHV, g_BTH, beta_BTH)]
        _kernels(q_BTGK).delta_backward(
            *(*saved, g_out_BTHV.contiguous(), g_last_BHKV, *grads, *ctx.sizes),
            *(x.stride(1) for x in (q_BTGK, k_BTGK)),
        )
        return *grads, None


def _by_tokens(x_BTHX: Tensor) -> Tensor:
    """Return x with the numbers of a token in one piece and tokens at equal distances."""
    _, length, heads, size = x_BTHX.shape
    token = x_BTHX.stride(1)
    is_even = x_BTHX.stride() == (length * token, token, size, 1) and token >= heads * size
    return x_BTHX if is_even else x_BTHX.contiguous()
