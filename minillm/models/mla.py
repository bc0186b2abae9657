"""Multi-head latent attention (DeepSeek-AI 2024, §2.1.1): a small cache for many heads.

B batch · T query positions · S key positions · D model · H heads · L latent
R rotated part of a head · P unrotated part · K = P + R · U value size
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from minillm.models.attention import choose_attention
from minillm.models.cpu_attention import Documents
from minillm.models.deepseek_config import MiniDeepseekV3Config, score_scale
from minillm.models.norm import RMSNorm
from minillm.models.rope import apply_rope


class MiniDeepseekV3Attention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, §2.1.1, eq. 1-11).

    A token leaves a latent of L numbers, from which every head's keys and values are made, and R
    numbers that carry its position, the same for all heads. With short queries the heads attend
    to the latents themselves: `q (W c) = (q W) c`, so that W is applied to the query and not to
    everything remembered.
    """

    def __init__(self, config: MiniDeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.qk_head_dim
        self.num_key_value_groups = 1
        self.scaling = score_scale(config)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        size, rank, bias = config.hidden_size, config.q_lora_rank, config.attention_bias
        if rank is None:
            self.q_proj = nn.Linear(size, self.num_heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, rank, bias=bias)
            self.q_a_layernorm = RMSNorm(rank)
            self.q_b_proj = nn.Linear(rank, self.num_heads * self.head_dim, bias=False)
        latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(size, latent + rotated, bias=bias)
        self.kv_a_layernorm = RMSNorm(latent)
        self.kv_sizes = [config.qk_nope_head_dim, config.v_head_dim]
        self.kv_b_proj = nn.Linear(latent, self.num_heads * sum(self.kv_sizes), bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `(B, T, D)` and, from the eager implementation, the weights `(B, H, T, S)`."""
        config = self.config
        # 1. queries of every head, by way of a narrow layer
        if config.q_lora_rank is None:
            q_BTJ = self.q_proj(hidden_states)
        else:
            q_BTJ = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q_BTHK = q_BTJ.unflatten(-1, (self.num_heads, self.head_dim))
        q_BTHP, q_BTHR = q_BTHK.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

        # 2. what is remembered: a latent, and one rotated key for all heads
        c_BTL, k_BTR = self.kv_a_proj_with_mqa(hidden_states).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        q_BTHR = self.rotate(q_BTHR, position_embeddings)
        k_B1SR = self.rotate(k_BTR.unsqueeze(2), position_embeddings).transpose(1, 2)
        c_B1SL = self.kv_a_layernorm(c_BTL).unsqueeze(1)
        if past_key_values is not None:
            c_B1SL, k_B1SR = past_key_values.update(c_B1SL, k_B1SR, self.layer_idx)

        # 3. softmax(q k^T * scaling) v
        q_BHTP, q_BHTR = q_BTHP.transpose(1, 2), q_BTHR.transpose(1, 2)
        is_short = past_key_values is not None and self.is_short(q_BHTP.shape[2], attention_mask)
        attend = self.attend_to_latents if is_short else self.attend_to_heads
        out_BTHU, weights_BHTS = attend(q_BHTP, q_BHTR, c_B1SL, k_B1SR, attention_mask, **kwargs)

        # 4. mix the heads
        return self.o_proj(out_BTHU.flatten(-2)), weights_BHTS

    def rotate(self, x_BTHR: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Turn by the position; DeepSeek's pairs are neighbours (2i, 2i + 1)."""
        if self.config.rope_interleave:
            x_BTHR = x_BTHR.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rope(x_BTHR, *cos_sin)

    def is_short(self, num_queries: int, mask: Any) -> bool:
        """Tell whether attending to latents costs less than making keys and values of them."""
        if self.config._attn_implementation not in ("eager", "sdpa"):
            return False  # kernels for heads of this size, and masks of other kinds
        if self.config._attn_implementation == "eager" and torch.is_grad_enabled():
            return False  # the weights returned must be those that the gradient passes through
        if type(self.kv_b_proj) is not nn.Linear:
            return False  # wrapped, e.g. by PEFT: its weight is not all that it does
        if not (isinstance(mask, Tensor) or (mask is None and num_queries == 1)):
            return False
        latent, made = self.config.kv_lora_rank, sum(self.kv_sizes)
        return num_queries * (2 * latent - made) < latent * made

    def attend_to_heads(
        self, q_BHTP: Tensor, q_BHTR: Tensor, c_B1SL: Tensor, k_B1SR: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Make every head's keys and values, and attend as usual."""
        kv_BSHJ = self.kv_b_proj(c_B1SL.squeeze(1)).unflatten(-1, (self.num_heads, -1))
        k_BHSP, v_BHSU = kv_BSHJ.transpose(1, 2).split(self.kv_sizes, dim=-1)
        k_BHSK = torch.cat((k_BHSP, k_B1SR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        q_BHTK = torch.cat((q_BHTP, q_BHTR), dim=-1)
        # fast kernels want one size: on a CPU 260 ms instead of 410 for 4 x 512 x 12 heads
        missing = q_BHTK.shape[-1] - v_BHSU.shape[-1]
        pads = missing > 0 and self.config._attn_implementation != "eager"
        pads = pads and not isinstance(mask, Documents)
        out_BTHU, weights_BHTS = self.attend(
            q_BHTK, k_BHSK, F.pad(v_BHSU, (0, missing)) if pads else v_BHSU, mask, **kw
        )
        return (out_BTHU[..., :-missing] if pads else out_BTHU), weights_BHTS

    def attend_to_latents(
        self, q_BHTP: Tensor, q_BHTR: Tensor, c_B1SL: Tensor, k_B1SR: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the latents, with all heads as queries of one: the same, for short queries."""
        w_HJL = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        wk_HPL, wv_HUL = w_HJL.to(q_BHTP.dtype).split(self.kv_sizes, dim=1)
        q_BHTJ = torch.cat((q_BHTP @ wk_HPL, q_BHTR), dim=-1)  # J = L + R
        k_B1SJ = torch.cat((c_B1SL, k_B1SR), dim=-1)
        length = q_BHTJ.shape[2]
        if mask is not None:
            mask = mask.expand(-1, self.num_heads, -1, -1).flatten(1, 2).unsqueeze(1)
        kw["is_causal"] = False  # the mask says it all
        out, weights = self.attend(q_BHTJ.flatten(1, 2).unsqueeze(1), k_B1SJ, c_B1SL, mask, **kw)
        out_BHTL = out.squeeze(2).unflatten(1, (self.num_heads, length))
        out_BTHU = (out_BHTL @ wv_HUL.mT).transpose(1, 2)
        if weights is not None:
            weights = weights.squeeze(1).unflatten(1, (self.num_heads, length))
        return out_BTHU, weights

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call the chosen implementation."""
        dropout = self.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling}
        return choose_attention(self.config, mask)(self, query, key, value, mask, **kwargs)
