"""Causal attention within documents, for training on a CPU.

PyTorch's kernel spends as much time beside its products as in them, and with a mask it computes
what the mask forbids. Here a block of queries at a time is attended to, in many rows at once, from
the earliest document that one of them belongs to: what lies in the future, and most of what lies
in other documents, costs nothing. Weights are computed again in the backward pass (Dao et al.
2022), so that only a number for each query is kept. Scores are fp32: of large ones, rounded to
bf16, the weights would be off by percents.

B batch · T positions · H query heads · G key/value heads · K key size · U value size
M rows at work times heads · C queries of a block · S keys that one of them sees
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import compute_dtype, kernels_for, kernels_of

BLOCK = 128
"""Queries of a block: more compute more of the future, fewer make small products."""

STEP = 64
"""Keys begin at multiples of it: oneDNN makes code for every size of bf16 product that it sees."""

ROOM_BYTES = 4 * 2**20
"""Scores at work, which should stay in the last-level cache; those of one row may be more."""


@dataclass(frozen=True, slots=True)
class Documents:
    """What an attention layer has for a mask: the place where each token's document starts."""

    starts: Tensor
    """`(B, T)`, int32."""


def documents_to_attend(module: Any, x_BTD: Tensor, places_BT: Tensor | None) -> Documents | None:
    """Return the documents of a training batch, or None where another implementation must do.

    Args:
        module: The model, for its config; knows whether it is trained.
        x_BTD: Its input, for its device and dtype.
        places_BT: Positions that restart with each document, or None: each row is one.
    """
    config = module.config
    if not (module.training and torch.is_grad_enabled() and kernels_for(x_BTD)):
        return None
    if config._attn_implementation != "sdpa" or config.attention_dropout:
        return None
    batch, length = x_BTD.shape[:2]
    if places_BT is None:
        return Documents(torch.zeros(batch, length, dtype=torch.int32))
    is_start_BT = places_BT.diff(dim=-1, prepend=places_BT[:, :1] - 2) != 1
    start_BT = (is_start_BT * torch.arange(length)).cummax(-1).values
    return Documents(start_BT.expand(batch, -1).to(torch.int32).contiguous())


def attend_documents(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return `softmax(q k^T * scaling) v` within each document; arguments as `eager_attention`."""
    dtype = compute_dtype(query)
    given = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        out_BTHU: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            *given, scaling, attention_mask.starts
        )
    return out_BTHU, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGU: Tensor, scaling: float, start_BT: Tensor
    ) -> Tensor:
        """Return the output; keep the log of each query's sum of weights."""
        batch, length, heads = q_BTHK.shape[:3]
        kernels = kernels_of(q_BTHK)
        out_BTHU = q_BTHK.new_empty(batch, length, heads, v_BTGU.shape[-1])
        log_sum_BHT = torch.empty(batch, heads, length)
        for rows in _parts(batch, heads, length):
            q_MTK = _heads(q_BTHK[rows]) * scaling
            k_MTK, v_MTU = _heads(k_BTGK[rows], heads), _heads(v_BTGU[rows], heads)
            q32_MTK, k32_MTK = q_MTK.float(), k_MTK.float()
            for at, keys, place in _query_blocks(start_BT[rows], heads):
                s_MCS = torch.bmm(q32_MTK[:, at], k32_MTK[:, keys].mT)
                w_MCS = _room_for_weights(s_MCS, q_MTK.dtype)
                log_sum_MC, sum_MC = (torch.empty(s_MCS.shape[:2]) for _ in range(2))
                kernels.attend(s_MCS, w_MCS, *s_MCS.shape, *place, log_sum_MC, sum_MC)
                out_MCU = torch.bmm(w_MCS, v_MTU[:, keys]).div_(sum_MC.unsqueeze(-1))
                out_BTHU[rows, at] = out_MCU.unflatten(0, (-1, heads)).transpose(1, 2)
                log_sum_BHT[rows, :, at] = log_sum_MC.unflatten(0, (-1, heads))
        ctx.scaling = scaling
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGU, start_BT, out_BTHU, log_sum_BHT)
        return out_BTHU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTHU: Tensor) -> tuple[Tensor | None, ...]:
        """With p the weights: dv = p^T g, ds = p (g v^T - mean), dq = ds k, dk = ds^T q."""
        q_BTHK, k_BTGK, v_BTGU, start_BT, out_BTHU, log_sum_BHT = ctx.saved_tensors
        kernels, (batch, length, heads) = kernels_of(q_BTHK), q_BTHK.shape[:3]
        dq, dk, dv = (torch.empty_like(x) for x in (q_BTHK, k_BTGK, v_BTGU))
        mean_BTH = (g_BTHU * out_BTHU).sum(-1, dtype=torch.float32)
        for rows in _parts(batch, heads, length):
            q_MTK = _heads(q_BTHK[rows]) * ctx.scaling
            k_MTK, v_MTU = _heads(k_BTGK[rows], heads), _heads(v_BTGU[rows], heads)
            q32_MTK, k32_MTK = q_MTK.float(), k_MTK.float()
            g_MTU = _heads(g_BTHU[rows])
            log_sum_MT = log_sum_BHT[rows].flatten(0, 1)
            mean_MT = mean_BTH[rows].transpose(1, 2).flatten(0, 1)
            dk_MTK, dv_MTU = (torch.zeros_like(x, dtype=torch.float32) for x in (k_MTK, v_MTU))
            for at, keys, place in _query_blocks(start_BT[rows], heads):
                s_MCS = torch.bmm(q32_MTK[:, at], k32_MTK[:, keys].mT)
                w_MCS = _room_for_weights(s_MCS, q_MTK.dtype)
                d_MCS = torch.bmm(g_MTU[:, at], v_MTU[:, keys].mT)
                given = (log_sum_MT[:, at].contiguous(), mean_MT[:, at].contiguous())
                kernels.attend_backward(s_MCS, w_MCS, *s_MCS.shape, *place, d_MCS, *given)
                _add_to_sum(dv_MTU[:, keys], w_MCS.mT, g_MTU[:, at])
                _add_to_sum(dk_MTK[:, keys], d_MCS.mT, q_MTK[:, at])
                dq_MCK = torch.bmm(d_MCS, k_MTK[:, keys]).unflatten(0, (-1, heads))
                torch.mul(dq_MCK.transpose(1, 2), ctx.scaling, out=dq[rows, at])
            _add_groups(dk_MTK, dk[rows])
            _add_groups(dv_MTU, dv[rows])
        return dq, dk, dv, None, None


def _parts(batch: int, heads: int, length: int) -> Iterator[slice]:
    """Yield the rows that are worked on together."""
    size = max(1, ROOM_BYTES // (4 * heads * min(BLOCK, length) * length))
    for first in range(0, batch, size):
        yield slice(first, min(first + size, batch))


def _query_blocks(start_BT: Tensor, heads: int) -> Iterator[tuple[slice, slice, tuple[Any, ...]]]:
    """Yield blocks of queries, the keys that they see, and where both are for the kernel."""
    length = start_BT.shape[1]
    for first in range(0, length, BLOCK):
        end, key = min(first + BLOCK, length), int(start_BT[:, first].min()) // STEP * STEP
        yield slice(first, end), slice(key, end), (start_BT, heads, length, first, key)


def _room_for_weights(s_MCS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where the weights go: over the scores if they are of one dtype."""
    return s_MCS if dtype == s_MCS.dtype else torch.empty_like(s_MCS, dtype=dtype)


def _add_to_sum(sum_MSK: Tensor, a_MSC: Tensor, b_MCK: Tensor) -> None:
    """Add `a @ b` to a sum that is fp32."""
    if a_MSC.dtype == sum_MSK.dtype:
        sum_MSK.baddbmm_(a_MSC, b_MCK)
    else:
        sum_MSK += torch.bmm(a_MSC, b_MCK)


def _heads(x_BTGK: Tensor, heads: int = 0) -> Tensor:
    """`(B, T, G, K)` to `(M, T, K)` in one piece, each as often as there are query heads for it."""
    x_BGTK = x_BTGK.transpose(1, 2)
    ratio = heads // x_BGTK.shape[1] if heads else 1
    x_BHTK = x_BGTK.repeat_interleave(ratio, 1) if ratio > 1 else x_BGTK
    return x_BHTK.flatten(0, 1).contiguous()


def _add_groups(d_MTK: Tensor, out_BTGK: Tensor) -> None:
    """Sum over the query heads of each key head, into `out`."""
    batch, _, groups, _ = out_BTGK.shape
    d_BGRTK = d_MTK.unflatten(0, (batch, groups, -1))
    d_BGTK = d_BGRTK.sum(2) if d_BGRTK.shape[2] > 1 else d_BGRTK.squeeze(2)
    out_BTGK.copy_(d_BGTK.transpose(1, 2))
