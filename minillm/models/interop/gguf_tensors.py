"""Weights by llama.cpp's names and layouts: one table of names, and what needs rearranging."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.models.base import MiniPreTrainedModel

State = dict[str, Tensor]

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
}


def convert(model: MiniPreTrainedModel, state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's names and tensors, all fp32."""
    config: Any = model.config
    for key, tensor in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if match is None:
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if key in _TOP:
                is_centred = key == "model.norm.weight" and model.official_type == "qwen3_next"
                yield _TOP[key], tensor + 1 if is_centred else tensor
            continue  # rotary buffers and the blocks of multi-token prediction
        if int(match[1]) >= config.num_hidden_layers:
            continue
        rearrange = _REARRANGE[model.official_type]
        for name, value in rearrange(match[2], tensor, config):
            yield f"blk.{match[1]}.{name}", value
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_factors(config.rope_parameters, config.head_dim)


def our_name(name: str) -> str:
    """Return our name of a Llama tensor, or an empty string."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return {theirs: ours for ours, theirs in _TOP.items()}.get(name, "")
    for ours, theirs in _LAYER.items():
        if theirs == f"{match[2]}.weight":
            return f"model.layers.{match[1]}.{ours.removesuffix('weight')}{match[3]}"
    return ""


def pairs_to_halves(key: str, tensor: Tensor, config: Any) -> Tensor:
    """Undo for a tensor of Llama, by our name, what `convert` rearranges."""
    if (heads := _num_rotary_heads(key, config)) is None:
        return tensor
    # (head, pair, half, D) -> (head, half, pair, D)
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _num_rotary_heads(key: str, config: Any) -> int | None:
    if "q_proj." in key:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj." in key else None


def _llama(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    if (heads := _num_rotary_heads(name, config)) is not None:
        # (head, half, pair, D) -> (head, pair, half, D), and biases without D
        tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    kind = "bias" if name.endswith(".bias") else "weight"
    yield _LAYER[name.removesuffix(kind) + "weight"].removesuffix("weight") + kind, tensor


def _experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name == "mlp.experts.gate_up_proj":
        gate_EFD, up_EFD = tensor.chunk(2, dim=1)
        yield "ffn_gate_exps.weight", gate_EFD
        yield "ffn_up_exps.weight", up_EFD
    else:
        yield _LAYER[name], tensor


def _deepseek(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    if not config.rope_interleave:
        tensor = _pair_rotary(name, tensor, config)
    if name == "self_attn.kv_b_proj.weight":
        parts = (config.qk_nope_head_dim, config.v_head_dim)
        k_HKR, v_HKR = tensor.view(config.num_attention_heads, sum(parts), -1).split(parts, dim=1)
        yield "attn_k_b.weight", k_HKR.transpose(1, 2)
        yield "attn_v_b.weight", v_HKR
    else:
        yield from _experts(name, tensor)


def _pair_rotary(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Reorder rotary rows from halves to pairs, as llama.cpp always has them in DeepSeek."""
    heads, size = 1, config.qk_rope_head_dim
    if name in ("self_attn.q_b_proj.weight", "self_attn.q_proj.weight"):
        heads = config.num_attention_heads
    elif name != "self_attn.kv_a_proj_with_mqa.weight":
        return tensor
    rows = tensor.reshape(heads, -1, tensor.shape[-1])
    rest, turned = rows.split((rows.shape[1] - size, size), dim=1)
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([rest, turned], dim=1).flatten(0, 1)


def _qwen(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    if name == "linear_attn.in_proj_qkvz.weight":
        # rows by key head: its query, key, and the values and gates of its value heads
        groups, k_dim = config.linear_num_key_heads, config.linear_key_head_dim
        v_dim = config.linear_num_value_heads // groups * config.linear_value_head_dim
        rows = tensor.view(groups, 2 * k_dim + 2 * v_dim, -1)
        q, k, v, z = (part.flatten(0, 1) for part in rows.split((k_dim, k_dim, v_dim, v_dim), 1))
        yield "attn_qkv.weight", torch.cat([q, k, v])
        yield "attn_gate.weight", z
    elif name == "linear_attn.A_log":
        yield "ssm_a", -tensor.exp()
    elif name == "linear_attn.conv1d.weight":
        yield _LAYER[name], tensor.squeeze(1)
    elif name == "mlp.shared_expert_gate.weight":
        yield _LAYER[name], tensor.squeeze(0)
    elif name == "post_attention_layernorm.weight":
        yield "post_attention_norm.weight", tensor + 1
    elif name.endswith("norm.weight") and name != "linear_attn.norm.weight":
        yield _LAYER[name], tensor + 1  # zero-centred
    else:
        yield from _experts(name, tensor)


_REARRANGE = {"llama": _llama, "deepseek_v3": _deepseek, "qwen3_next": _qwen}


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return what llama.cpp divides each rotary frequency by (Llama 3.1's long contexts), (K/2)."""
    low, high, factor = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    original = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(head_dim // 2):
        length = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = min(max((original / length - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
