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

from minillm.models.train_kernels import compute_dtype, kernels_for, kernels_of

BLOCK = 128
"""Queries of a block: more compute more of the future, fewer make small products."""


class Documents(list[tuple[int, int, int]]):
    """Row, first position and end of each document: what an attention layer has for a mask."""


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
    dtype = compute_dtype(query)
    given = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        out_BTHU: Tensor = _Attention.apply(*given, scaling, attention_mask)  # type: ignore[no-untyped-call]
    return out_BTHU, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGU: Tensor, scaling: float, docs: Documents
    ) -> Tensor:
        """Return the output; keep the log of each query's sum of weights."""
        batch, length, heads = q_BTHK.shape[:3]
        ctx.scaling, ctx.docs, kernels = scaling, docs, kernels_of(q_BTHK)
        out_BTHU = q_BTHK.new_empty(batch, length, heads, v_BTGU.shape[-1])
        log_sums = []
        for row, start, end in docs:
            q_HLK = _heads(q_BTHK[row, start:end]) * scaling
            k_HLK = _heads(k_BTGK[row, start:end], heads)
            v_HLU = _heads(v_BTGU[row, start:end], heads)
            scores = _Scores(q_HLK, k_HLK)
            log_sum_HL = torch.empty(q_HLK.shape[:2])
            for a, e in _query_blocks(end - start):
                s_HCS, w_HCS = scores(a, e)
                log_sum_HC, sum_HC = (torch.empty(heads, e - a) for _ in range(2))
                kernels.attend(s_HCS, w_HCS, *s_HCS.shape, a, log_sum_HC, sum_HC)
                log_sum_HL[:, a:e] = log_sum_HC
                out_HCU = torch.bmm(w_HCS, v_HLU[:, :e]).div_(sum_HC.unsqueeze(-1))
                out_BTHU[row, start + a : start + e] = out_HCU.transpose(0, 1)
            log_sums.append(log_sum_HL)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGU, out_BTHU, *log_sums)
        return out_BTHU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTHU: Tensor) -> tuple[Tensor | None, ...]:
        """With p the weights: dv = p^T g, ds = p (g v^T - mean), dq = ds k, dk = ds^T q."""
        q_BTHK, k_BTGK, v_BTGU, out_BTHU, *log_sums = ctx.saved_tensors
        kernels = kernels_of(q_BTHK)
        dq, dk, dv = (torch.empty_like(x) for x in (q_BTHK, k_BTGK, v_BTGU))
        heads = q_BTHK.shape[2]
        mean_BTH = (g_BTHU * out_BTHU).sum(-1, dtype=torch.float32)
        for (row, start, end), log_sum_HL in zip(ctx.docs, log_sums, strict=True):
            q_HLK = _heads(q_BTHK[row, start:end]) * ctx.scaling
            k_HLK = _heads(k_BTGK[row, start:end], heads)
            v_HLU = _heads(v_BTGU[row, start:end], heads)
            g_HLU = _heads(g_BTHU[row, start:end])
            mean_HL, scores = mean_BTH[row, start:end].T, _Scores(q_HLK, k_HLK)
            dk_HLK, dv_HLU = (torch.zeros_like(x, dtype=torch.float32) for x in (k_HLK, v_HLU))
            for a, e in _query_blocks(end - start):
                g_HCU = g_HLU[:, a:e]
                s_HCS, w_HCS = scores(a, e)
                d_HCS = torch.bmm(g_HCU, v_HLU[:, :e].mT)
                given = (log_sum_HL[:, a:e].contiguous(), mean_HL[:, a:e].contiguous())
                kernels.attend_backward(s_HCS, w_HCS, d_HCS, *s_HCS.shape, a, *given)
                _add_product(dv_HLU[:, :e], w_HCS.mT, g_HCU)
                _add_product(dk_HLK[:, :e], d_HCS.mT, q_HLK[:, a:e])
                dq_HCK = torch.bmm(d_HCS, k_HLK[:, :e])
                torch.mul(dq_HCK.transpose(0, 1), ctx.scaling, out=dq[row, start + a : start + e])
            _add_groups(dk_HLK, dk[row, start:end])
            _add_groups(dv_HLU, dv[row, start:end])
        return dq, dk, dv, None, None


class _Scores:
    """Scores of a block of queries, in fp32: rounded to bf16 large ones are off by percents."""

    def __init__(self, q_HLK: Tensor, k_HLK: Tensor) -> None:
        self.dtype = q_HLK.dtype
        self.q_HLK, self.k_HLK = q_HLK.float(), k_HLK.float()

    def __call__(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return `(H, C, S)`, and room for the weights."""
        s_HCS = torch.bmm(self.q_HLK[:, first:end], self.k_HLK[:, :end].mT)
        is_same = self.dtype == torch.float32
        return s_HCS, s_HCS if is_same else torch.empty_like(s_HCS, dtype=self.dtype)


def _query_blocks(length: int) -> Iterator[tuple[int, int]]:
    for a in range(0, length, BLOCK):
        yield a, min(a + BLOCK, length)


def _add_product(sum_HSK: Tensor, a_HSC: Tensor, b_HCK: Tensor) -> None:
    """Add `a @ b` to a sum that is fp32."""
    if a_HSC.dtype == sum_HSK.dtype:
        sum_HSK.baddbmm_(a_HSC, b_HCK)
    else:
        sum_HSK += torch.bmm(a_HSC, b_HCK)


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
