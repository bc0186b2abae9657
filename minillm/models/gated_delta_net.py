"""Gated DeltaNet (Yang et al. 2025, figure 1): a token mixer with a memory of fixed size.

Short convolution, gated delta rule, gated norm; the arithmetic is in `gated_delta.py`.

B batch · T positions · D model · G key heads · H value heads · K key size · V value size
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from minillm.models.cpu_conv import conv_silu, has_conv_kernel
from minillm.models.gated_delta import gated_delta_rule, short_conv
from minillm.models.norm import GatedRMSNorm


class GatedDeltaNet(nn.Module):
    """A memory of fixed size: short convolution, gated delta rule, gated norm."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_k_heads, self.num_v_heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )
        self.head_k_dim, self.head_v_dim = (
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        self.key_dim = self.num_k_heads * self.head_k_dim
        self.value_dim = self.num_v_heads * self.head_v_dim
        width, channels = config.linear_conv_kernel_dim, 2 * self.key_dim + self.value_dim
        self.in_proj_qkvz = nn.Linear(config.hidden_size, channels + self.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.num_v_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.num_v_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.norm = GatedRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)

    @property
    def state_bytes(self) -> int:
        """What a sequence keeps here: the last inputs of the convolution, and the fp32 memory."""
        inputs = self.conv1d.weight.nbytes
        memory: int = self.num_v_heads * self.head_k_dim * self.head_v_dim * torch.float32.itemsize
        return inputs + memory

    def extra_flops(self, seq_len: int) -> dict[str, float]:
        """FLOPs of a token in training that no parameter stands for, forward and backward.

        The chunk form (Yang et al. 2024, section 3) as transformers computes it, in chunks of 64:
        its matrix products, and the triangular system as half a product. The form that we compute
        may need less; MFU is about the work that the model is, not about how it is done.
        """
        chunk, keys, values = min(64, seq_len), self.head_k_dim, self.head_v_dim
        forward = 5 * chunk * keys + 3 * chunk * values + 6 * keys * values
        return {"delta rule": 3.0 * self.num_v_heads * forward}

    def forward(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        segment_BT: Tensor | None = None,
    ) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        # 1. project; rows are grouped by key head: q, k, its values, their output gates z
        if attention_mask is not None:
            x_BTD = x_BTD * attention_mask.unsqueeze(-1).to(x_BTD.dtype)
        values = self.value_dim // self.num_k_heads
        sizes = (self.head_k_dim, self.head_k_dim, values, values)
        q, k, v, z = self.in_proj_qkvz(x_BTD).unflatten(-1, (self.num_k_heads, -1)).split(sizes, -1)
        b, a = self.in_proj_ba(x_BTD).unflatten(-1, (self.num_k_heads, -1)).chunk(2, dim=-1)
        b_BTH, a_BTH = b.flatten(-2), a.flatten(-2)
        z_BTHV = z.flatten(-2).unflatten(-1, (self.num_v_heads, -1))

        # 2. mix each channel with its last values
        qkv = torch.cat((q.flatten(-2), k.flatten(-2), v.flatten(-2)), dim=-1)
        weight = self.conv1d.weight.squeeze(1)
        state, num_past = None, 0
        if past_key_values is not None:
            state = past_key_values.get_recurrent_state(self.layer_idx)
            seen = past_key_values.update_conv_state(
                qkv.mT, self.layer_idx, conv_kernel_size=weight.shape[1]
            )
            if segment_BT is None:  # a packed row has no past
                num_past, qkv = seen.shape[-1] - qkv.shape[1], seen.mT
        if past_key_values is None and has_conv_kernel(qkv, weight):
            qkv = conv_silu(qkv, weight, segment_BT)
        else:
            qkv = F.silu(short_conv(qkv, weight.to(qkv.dtype), segment_BT, num_past))
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)

        # 3. remember and read; decay in fp32, since its exponent is of thousands of tokens
        g_BTH = -self.A_log.float().exp() * softplus(a_BTH.float() + self.dt_bias.float())
        out_BTHV, state = gated_delta_rule(
            q.unflatten(-1, (self.num_k_heads, -1)),
            k.unflatten(-1, (self.num_k_heads, -1)),
            v.unflatten(-1, (self.num_v_heads, -1)),
            g_BTH,
            b_BTH.sigmoid(),
            segment_BT=segment_BT,
            state_BHKV=state,
        )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)

        # 4. norm each head, gate, mix the heads
        out_BTD: Tensor = self.out_proj(self.norm(out_BTHV, z_BTHV).flatten(-2))
        return out_BTD


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)).

    Not `F.softplus`: the compiler is wrong about the memory layout of its gradient (torch 2.13).
    """
    return torch.logaddexp(x, x.new_zeros(()))
