"""Attention in plain operations, for reading and for looking at the weights; and the choice.

Faster implementations (sdpa, flex, flash) come from transformers under the same signature;
`attn_implementation="eager"` chooses this one. Price: it stores all T x S weights of every head.
In place of sdpa, training on a CPU has `minillm.models.cpu_attention`.

B batch · T queries · S keys · H heads · G key/value heads · K head size
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minillm.models.cpu_attention import Documents, attend_documents, documents_to_attend

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def causal_mask(
    model: Any,
    x_BTD: Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Any:
    """Return who may look at whom, in the form that the implementation to be chosen takes.

    Positions that restart make a block for each document, without a cache and a given mask.
    """
    if attention_mask is None and past_key_values is None:
        documents = documents_to_attend(model, x_BTD, position_ids)
        if documents is not None:
            return documents
    return create_causal_mask(
        config=model.config,
        inputs_embeds=x_BTD,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def choose_attention(config: Any, mask: Any) -> Attention:
    """Return the function that the config names, or the one that the mask is for."""
    if isinstance(mask, Documents):
        return attend_documents
    chosen: Attention = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention
    )
    return chosen


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
