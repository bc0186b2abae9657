"""Causal attention within documents, for training on a CPU.

PyTorch's kernel spends as much time beside its products as in them, and with a mask it computes
what the mask forbids. Here every document is attended to on its own, a block of queries at a
time: what lies in the future or in another document costs nothing. Weights are computed again in
the backward pass (Dao et al. 2022), so that only a number for each query is kept.

B batch · T positions · H query heads · G key/value heads · R = H / G · K key size · U value size
L tokens of a document · C queries of a block · S keys that they see
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.models.train_kernels import call, kernels_for

BLOCK = 128
"""Queries of a block: more compute more of the future, fewer make small products."""


class Documents(list[tuple[int, int, int]]):
    """Row, first position and end of each document: what an attention layer has for a mask."""


def documents_to_attend(module: Any, x_BTD: Tensor, places_BT: Tensor | None) -> Documents | None:
    """Return the documents of a training batch, or None where another implementation must do.

    Args:
        module: The model, for its config; knows whether it is trained.
        x_BTD: Its input, fp32 on a CPU.
        places_BT: Positions that restart with each document, or None: each row is one.
    """
    config = module.config
    if not (module.training and torch.is_grad_enabled() and kernels_for(x_BTD)):
        return None
    if config._attn_implementation != "sdpa" or config.attention_dropout:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    batch, length = x_BTD.shape[:2]
    if places_BT is None:
        return Documents((row, 0, length) for row in range(batch))
    is_start_BT = places_BT.diff(dim=-1, prepend=places_BT[:, :1] - 2) != 1
    found = Documents()
    for row, is_start_T in enumerate(is_start_BT.expand(batch, -1)):
        starts = [*is_start_T.nonzero().flatten().tolist(), length]
        found += [(row, *ends) for ends in itertools.pairwise(starts)]
    return found


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
    out_BTHU: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        *(x.transpose(1, 2) for x in (query, key, value)), scaling, attention_mask
    )
    return out_BTHU, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGU: Tensor, scaling: float, docs: Documents
    ) -> Tensor:
        """Return the output; keep the log of each query's sum of weights."""
        batch, length, heads = q_BTHK.shape[:3]
        ctx.kernels, ctx.scaling, ctx.docs = kernels_for(q_BTHK), scaling, docs
        out_BTHU = q_BTHK.new_empty(batch, length, heads, v_BTGU.shape[-1])
        log_sums = []
        for row, start, end in docs:
            q_HLK = _heads(q_BTHK[row, start:end]) * scaling
            k_HLK = _heads(k_BTGK[row, start:end], heads)
            v_HLU = _heads(v_BTGU[row, start:end], heads)
            log_sum_HL = q_HLK.new_empty(q_HLK.shape[:2])
            for a, e in _query_blocks(end - start):
                s_HCS = torch.bmm(q_HLK[:, a:e], k_HLK[:, :e].mT)
                log_sum_HC, sum_HC = (q_HLK.new_empty(heads, e - a) for _ in range(2))
                call(ctx.kernels.minillm_attend, s_HCS, *s_HCS.shape, a, log_sum_HC, sum_HC)
                log_sum_HL[:, a:e] = log_sum_HC
                out_HCU = torch.bmm(s_HCS, v_HLU[:, :e]).div_(sum_HC.unsqueeze(-1))
                out_BTHU[row, start + a : start + e] = out_HCU.transpose(0, 1)
            log_sums.append(log_sum_HL)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGU, out_BTHU, *log_sums)
        return out_BTHU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTHU: Tensor) -> tuple[Tensor | None, ...]:
        """With p the weights: dv = p^T g, ds = p (g v^T - mean), dq = ds k, dk = ds^T q."""
        q_BTHK, k_BTGK, v_BTGU, out_BTHU, *log_sums = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q_BTHK, k_BTGK, v_BTGU))
        heads = q_BTHK.shape[2]
        mean_BTH = (g_BTHU * out_BTHU).sum(-1)
        for (row, start, end), log_sum_HL in zip(ctx.docs, log_sums, strict=True):
            q_HLK = _heads(q_BTHK[row, start:end]) * ctx.scaling
            k_HLK = _heads(k_BTGK[row, start:end], heads)
            v_HLU = _heads(v_BTGU[row, start:end], heads)
            g_HLU = _heads(g_BTHU[row, start:end])
            mean_HL = mean_BTH[row, start:end].T
            dk_HLK, dv_HLU = torch.zeros_like(k_HLK), torch.zeros_like(v_HLU)
            for a, e in _query_blocks(end - start):
                g_HCU = g_HLU[:, a:e]
                s_HCS = torch.bmm(q_HLK[:, a:e], k_HLK[:, :e].mT)
                d_HCS = torch.bmm(g_HCU, v_HLU[:, :e].mT)
                given = (log_sum_HL[:, a:e].contiguous(), mean_HL[:, a:e].contiguous())
                call(ctx.kernels.minillm_attend_backward, s_HCS, d_HCS, *s_HCS.shape, a, *given)
                dv_HLU[:, :e].baddbmm_(s_HCS.mT, g_HCU)
                dk_HLK[:, :e].baddbmm_(d_HCS.mT, q_HLK[:, a:e])
                dq_HCK = torch.bmm(d_HCS, k_HLK[:, :e])
                torch.mul(dq_HCK.transpose(0, 1), ctx.scaling, out=dq[row, start + a : start + e])
            _add_groups(dk_HLK, dk[row, start:end])
            _add_groups(dv_HLU, dv[row, start:end])
        return dq, dk, dv, None, None


def _query_blocks(length: int) -> Iterator[tuple[int, int]]:
    for a in range(0, length, BLOCK):
        yield a, min(a + BLOCK, length)


def _heads(x_LGK: Tensor, heads: int = 0) -> Tensor:
    """`(L, G, K)` to `(G, L, K)` in one piece, each as often as there are query heads for it."""
    x_GLK = x_LGK.transpose(0, 1)
    ratio = heads // len(x_GLK) if heads else 1
    return x_GLK.repeat_interleave(ratio, 0) if ratio > 1 else x_GLK.contiguous()


def _add_groups(d_HLK: Tensor, out_LGK: Tensor) -> None:
    """Sum over the query heads of each key head, into `out`."""
    groups = out_LGK.shape[1]
    if groups == len(d_HLK):
        out_LGK.copy_(d_HLK.transpose(0, 1))
    else:
        out_LGK.copy_(d_HLK.unflatten(0, (groups, -1)).sum(1).transpose(0, 1))
