"""Attention in plain operations, for reading and for looking at the weights.

Faster implementations (sdpa, flex, flash) come from transformers under the same signature;
`attn_implementation="eager"` chooses this one. Price: it stores all T x S weights of every head.

B batch · T queries · S keys · H heads · G key/value heads · K head size
"""

from typing import Any

import torch
from torch import Tensor, nn


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v, with H/G query heads to each key head.

    Args:
        module: The attention module; tells whether dropout is on.
        query: `(B, H, T, K)`.
        key: `(B, G, S, K)`.
        value: `(B, G, S, K)`.
        attention_mask: Added to the scores, broadcast to `(B, H, T, S)`: 0 or a huge negative.
        scaling: Factor of the scores, usually `K ** -0.5`.
        dropout: Share of the weights set to zero in training.

    Returns:
        Output `(B, T, H, K)` and weights `(B, H, T, S)`.
    """
    num_groups = query.shape[1] // key.shape[1]
    k_BHSK = key.repeat_interleave(num_groups, dim=1)
    v_BHSK = value.repeat_interleave(num_groups, dim=1)
    scores_BHTS = query @ k_BHSK.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(query.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, dropout, training=module.training)
    return (weights_BHTS @ v_BHSK).transpose(1, 2).contiguous(), weights_BHTS
