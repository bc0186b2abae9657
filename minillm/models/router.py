"""Choosing experts as DeepSeek-V3 does, and keeping their load even (DeepSeek-AI 2024, §2.1.2).

Each expert has a bias that takes part in the choice but not in the weight; after every optimizer
step it moves up where an expert got less than its share, and down where it got more (Wang et al.
2024). A small loss on top keeps single documents from leaning on one expert.

N tokens · E experts · K experts of a token · B batch · T positions · L layers with experts
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig


class TopkRouter(nn.Module):
    """Sigmoid scores, the best groups, the best experts of those; all in fp32."""

    e_score_correction_bias: Tensor
    tokens_per_expert: Tensor
    load: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config: Any = config
        num_experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        # since the last update, and shares at that update
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts), persistent=False)
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `(N, E)`, and weights and indices of the chosen experts, `(N, K)`."""
        config = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid()
        choice_NE = scores_NE + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            # a group is as good as its two best experts; all others are out
            grouped_NGE = choice_NE.unflatten(-1, (config.n_group, -1))
            groups_NG = grouped_NGE.topk(2, dim=-1).values.sum(-1)
            best = groups_NG.topk(config.topk_group, dim=-1, sorted=False).indices
            is_out_NG = torch.ones_like(groups_NG, dtype=torch.bool).scatter(1, best, False)
            choice_NE = grouped_NGE.masked_fill(is_out_NG.unsqueeze(-1), -torch.inf).flatten(1)
        index_NK = choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weight_NK = scores_NE.gather(1, index_NK)
        if config.norm_topk_prob:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        return logits_NE, weight_NK * config.routed_scaling_factor, index_NK


@dataclass(frozen=True, slots=True)
class Route:
    """What a layer's router did, for the balance of its experts."""

    gate: TopkRouter
    logits: Tensor
    """`(N, E)`."""
    index: Tensor
    """`(N, K)`: the chosen experts."""


def balance_loss(
    routes: list[Route], valid_BT: Tensor, document_BT: Tensor | None, top_k: int
) -> Tensor:
    """Return the sequence-level balance loss (eq. 17-20), summed over tokens and layers.

    For each document E/K * sum over experts of (share of its tokens sent there) * (mean share of
    the scores), times its number of tokens; K perfectly balanced experts make 1 a token.
    Documents packed in a row are counted one by one.

    Args:
        routes: One for each layer.
        valid_BT: False for padding.
        document_BT: A number below T for each token's document, or None: one document a row.
        top_k: Experts of a token, K.
    """
    valid_BT1 = valid_BT.unsqueeze(-1).float()
    scores_LBTE = torch.stack([r.logits for r in routes]).sigmoid()
    scores_LBTE = scores_LBTE.unflatten(1, valid_BT.shape)
    shares_LBTE = scores_LBTE / scores_LBTE.sum(-1, keepdim=True) * valid_BT1
    index_LBTK = torch.stack([r.index for r in routes]).unflatten(1, valid_BT.shape)
    chosen_LBTE = torch.zeros_like(shares_LBTE).scatter(-1, index_LBTK, 1.0) * valid_BT1
    _count(routes, chosen_LBTE)
    if document_BT is None:
        size_B1 = valid_BT1.sum(1)
        chosen, shares = chosen_LBTE.sum(2), shares_LBTE.sum(2)
    else:
        size_B1 = torch.zeros_like(valid_BT1).scatter_add(1, document_BT.unsqueeze(-1), valid_BT1)
        place_LBTE = document_BT[None, ..., None].expand_as(shares_LBTE)
        chosen = torch.zeros_like(shares_LBTE).scatter_add(2, place_LBTE, chosen_LBTE)
        shares = torch.zeros_like(shares_LBTE).scatter_add(2, place_LBTE, shares_LBTE)
    total: Tensor = (chosen * shares / size_B1.clamp(min=1)).sum() * (shares.shape[-1] / top_k)
    return total


@torch.no_grad()
def _count(routes: list[Route], chosen_LBTE: Tensor) -> None:
    for route, count_E in zip(routes, chosen_LBTE.sum((1, 2)).unbind(), strict=True):
        route.gate.tokens_per_expert.add_(count_E)


@torch.no_grad()
def update_biases(gates: list[TopkRouter], speed: float) -> None:
    """Move each bias by `speed` towards an even load, counted over all devices; count anew."""
    if not gates:
        return
    counts_LE = torch.stack([gate.tokens_per_expert for gate in gates])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LE)
    direction_LE = (counts_LE.mean(-1, keepdim=True) - counts_LE).sign()
    # without its mean the step does not move all biases together
    step_LE = speed * (direction_LE - direction_LE.mean(-1, keepdim=True))
    load_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
    for gate, step_E, load_E in zip(gates, step_LE, load_LE, strict=True):
        gate.e_score_correction_bias.add_(step_E)
        gate.load.copy_(load_E)
        gate.tokens_per_expert.zero_()
