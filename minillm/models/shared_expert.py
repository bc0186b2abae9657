"""A mixture with a shared expert, routed by softmax, and the loss that keeps its experts busy.

As in Qwen2-MoE and Qwen3-Next.

B batch · T positions · D model · N = B * T tokens · K experts of a token · E experts · L layers
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.gates import swiglu
from minillm.models.loss import IGNORE
from minillm.models.moe import Experts


class SwiGLU(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class SoftmaxRouter(nn.Module):
    """Softmax over all experts, then the best few."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.num_chosen, self.is_normed = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of all experts, weights and indices of the chosen ones; all fp32."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
            weight_NK, index_NK = logits_NE.softmax(-1).topk(self.num_chosen, dim=-1)
            if self.is_normed:
                weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return logits_NE, weight_NK, index_NK


class SharedExpertMoE(nn.Module):
    """A few experts of many, chosen for each token, and one that a gate mixes in for all."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.gate = SoftmaxRouter(config)
        self.experts = Experts(config.num_experts, size, config.moe_intermediate_size)
        self.shared_expert = SwiGLU(size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(size, 1, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        x_ND = x_BTD.flatten(0, 1)
        _, weight_NK, index_NK = self.gate(x_ND)
        shared_ND = self.shared_expert_gate(x_ND).sigmoid() * self.shared_expert(x_ND)
        out_ND: Tensor = self.experts(x_ND, index_NK, weight_NK) + shared_ND
        return out_ND.view_as(x_BTD)


def load_balancing(
    logits_LNE: Sequence[Tensor], num_chosen: int, mask_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `E * sum over e of load[e] * probability[e]` (Fedus et al. 2021, eq. 4), and the load.

    Load is the share of tokens that chose an expert, probability the router's mean; both are taken
    over all layers together, as in transformers. At balance the loss is `num_chosen`.

    Args:
        logits_LNE: What the router of each layer gave.
        num_chosen: Experts of a token.
        mask_BT: 0 where a token is padding and does not count.

    Returns:
        The loss, and the load of each layer, `(L, E)`.
    """
    logits = torch.stack(tuple(logits_LNE))
    prob_LNE = logits.softmax(-1).float()
    chosen_LNE = torch.zeros_like(prob_LNE).scatter(-1, prob_LNE.topk(num_chosen).indices, 1.0)
    if mask_BT is None:
        load_LE, mean_LE = chosen_LNE.mean(1), prob_LNE.mean(1)
    else:
        weight_N = mask_BT.flatten().to(prob_LNE)
        weight_N = weight_N / weight_N.sum()
        load_LE, mean_LE = weight_N @ chosen_LNE, weight_N @ prob_LNE
    return logits.shape[-1] * (load_LE.mean(0) * mean_LE.mean(0)).sum(), load_LE


def label_share(labels: Tensor | None, **kwargs: Any) -> Tensor | float:
    """Return how much of the step's labels this micro-batch has; arguments as `causal_lm_loss`.

    A loss that is no sum over labels is weighed by it, so that a step cut into more micro-batches
    does not count it more often.
    """
    num_items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if num_items is None:
        return 1.0
    if shifted is None:
        assert labels is not None
        shifted = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
    share: Tensor = (shifted != IGNORE).sum() / num_items
    return share
