"""Cross entropy of a linear head without ever storing the logits of all positions.

The head is multiplied a few hundred positions at a time; each block's probabilities become its
gradient in place while they are still in cache, and only the gradients of the inputs and of the
head are kept. On two cores, forward and backward of 4,096 x 256 into 6,144 words take 330 ms
against 400, and memory for the logits falls from 300 MB to 12. The price: no logits to look at,
and no second derivative.

N positions · C positions of a block · D model · V vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minillm.models.train_kernels import kernels_for

IGNORE = -100
"""Label of a position that has no loss, as everywhere in PyTorch."""

BLOCK_BYTES = 8 * 2**20
"""Size of a block of logits on a CPU, which should stay in the last-level cache."""

GPU_BLOCK_BYTES = 2**30
"""On a GPU a block must be large enough to fill the device."""


def causal_lm_loss(
    model: PreTrainedModel, hidden_BTD: Tensor, logits_BTV: Tensor | None, **kwargs: Any
) -> Tensor | None:
    """Return the loss that a causal LM's keyword arguments ask for, or None.

    Args:
        model: Gives the head and `loss_function`.
        hidden_BTD: Input of the head.
        logits_BTV: Its output, or None to compute the loss without storing it.
        **kwargs: `labels` (shifted here) or `shift_labels` (shifted already), and
            `num_items_in_batch`: the mean is taken over that many labels, not over those here.
    """
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if labels is None and shift_labels is None:
        return None
    head = model.get_output_embeddings()
    if logits_BTV is None and isinstance(head.weight, DTensor):  # a shard; the head knows how
        logits_BTV = head(hidden_BTD)
    if logits_BTV is not None:
        loss: Tensor = model.loss_function(
            logits=logits_BTV,
            labels=labels,
            vocab_size=logits_BTV.shape[-1],
            shift_labels=shift_labels,
            **kwargs,
        )
        return loss
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
    weight_VD: Tensor = head.weight
    num_items: int | Tensor | None = kwargs.get("num_items_in_batch")
    if num_items is None:
        num_items = (shift_labels != IGNORE).sum()
    return linear_cross_entropy(
        hidden_BTD.flatten(0, -2), weight_VD, shift_labels.flatten(), num_items
    )


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, num_items: int | Tensor = 1
) -> Tensor:
    """Return the sum over labelled positions of `-log softmax(x @ weight.T)[label]`, in fp32.

    Equals `F.cross_entropy(x @ weight.T, labels, reduction="sum") / num_items` to rounding,
    autocast included.
    """
    device = x_ND.device.type
    if torch.compiler.is_compiling():  # inductor fuses the plain form well enough
        logits_NV = F.linear(x_ND, weight_VD).float()
        total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
        return total / num_items
    if torch.is_autocast_enabled(device):
        x_ND = x_ND.to(torch.get_autocast_dtype(device))
    if device == "cpu":
        # answers are a part of a fine-tuning row: the rest needs no head at all
        kept_N = labels_N != IGNORE
        if not bool(kept_N.all()):
            x_ND, labels_N = x_ND[kept_N], labels_N[kept_N]
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_ND, weight_VD, labels_N, num_items
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, num_items: int | Tensor
    ) -> Tensor:
        """Return the summed loss over `num_items`, and keep its gradients.

        The mean is a factor of rows, which the products take anyway.
        """
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        w_VD = weight_VD.to(x_ND.dtype)
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        # summed over blocks in the weights' own dtype: bf16 sums would lose the small ones
        dw_VD = torch.zeros_like(weight_VD) if needs_weight else None
        total = x_ND.new_zeros((), dtype=torch.float32)
        block = _block_rows(x_ND, len(weight_VD))
        room_CW = _room(x_ND, block, len(weight_VD))
        for start in range(0, len(x_ND), block):
            x_CD = x_ND[start : start + block]
            labels_C1 = labels_N[start : start + block, None]
            valid_C1 = labels_C1 != IGNORE
            index_C1 = labels_C1.where(valid_C1, 0)
            logits_CV = None if room_CW is None else room_CW[: len(x_CD), : len(weight_VD)]
            loss_C1, d_CV, share_C1 = _unscaled(
                torch.mm(x_CD, w_VD.T, out=logits_CV), index_C1, valid_C1 / num_items
            )
            total += (loss_C1 * valid_C1).sum()
            if dx_ND is not None:
                dx_CD = dx_ND[start : start + block]
                torch.mm(d_CV, w_VD, out=dx_CD).mul_(share_C1)
            if dw_VD is not None:
                _add_product(dw_VD, d_CV, (x_CD * share_C1).to(x_CD.dtype))
        ctx.save_for_backward(dx_ND, dw_VD)
        return total / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times `g`."""
        grads: list[Tensor | None] = list(ctx.saved_tensors)
        if g.device.type != "cpu" or float(g) != 1.0:  # to look at it costs a sync on a GPU
            grads = [None if d is None else d * g.to(d.dtype) for d in grads]
        return (*grads, None, None)


def _unscaled(
    logits_CV: Tensor, index_C1: Tensor, factor_C1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `(C, 1)`, and the gradient of the logits as a product `(C, V)`, `(C, 1)`.

    d loss / d logits = p - onehot; what scales whole rows is left to the smaller factor of the
    products to come. May overwrite the logits.
    """
    kernels = kernels_for(logits_CV)
    if kernels is None:
        logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
        loss_C1 = -logp_CV.gather(1, index_C1)
        p_CV = logp_CV.exp_()
        p_CV.scatter_add_(1, index_C1, p_CV.new_full(index_C1.shape, -1.0))
        return loss_C1, p_CV.to(logits_CV.dtype), factor_C1
    picked_C1 = logits_CV.gather(1, index_C1).float()
    top_C1, sum_C1 = torch.empty_like(picked_C1), torch.empty_like(picked_C1)
    kernels.exp_rows(logits_CV, *logits_CV.shape, logits_CV.stride(0), top_C1, sum_C1)
    loss_C1 = sum_C1.log() + top_C1 - picked_C1
    # p - 1 where the label is, times the row's sum: from fp32, since 1 - p may be small
    own_C1 = (torch.expm1(-loss_C1) * sum_C1).to(logits_CV.dtype)
    # not `scatter_`, which copies all of a table whose rows are padded, twice
    logits_CV[torch.arange(len(index_C1)), index_C1[:, 0]] = own_C1[:, 0]
    return loss_C1, logits_CV, factor_C1 / sum_C1


def _add_product(sum_VD: Tensor, d_CV: Tensor, x_CD: Tensor) -> None:
    """Add `d^T x` to `sum`."""
    if d_CV.dtype == sum_VD.dtype:  # in place: no second table of gradients per block
        sum_VD.addmm_(d_CV.T, x_CD)
        return
    part_VD = d_CV.T @ x_CD
    kernels = kernels_for(part_VD)
    if kernels is None or sum_VD.dtype != torch.float32:
        sum_VD += part_VD
    else:
        kernels.add_to(sum_VD, part_VD, part_VD.numel())


def _room(x_ND: Tensor, block: int, vocab_size: int) -> Tensor | None:
    """Return memory for a block of logits on a CPU.

    Rows begin at multiples of 256 bytes: 32,004 words in a row else cost a sixth of the product.
    """
    if x_ND.device.type != "cpu":
        return None
    row = -(-vocab_size * x_ND.element_size() // 256) * 256 // x_ND.element_size()
    return x_ND.new_empty(min(block, len(x_ND)), row)


def _block_rows(x_ND: Tensor, vocab_size: int) -> int:
    if x_ND.device.type != "cpu":
        return max(64, GPU_BLOCK_BYTES // (4 * vocab_size))
    # every block also reads and writes the (V, D) gradient table once: with fewer than D rows
    # that would move more bytes than the logits themselves; sums of bf16 products move twice that
    least = x_ND.shape[1] * (1 if x_ND.dtype == torch.float32 else 2)
    return max(least, BLOCK_BYTES // (4 * vocab_size))
