"""The published Mini-LLM checkpoints (`WKQ9411/...`): their names and conventions become ours.

They carry our `model_type`, but feed-forward weights are `w1` (gate), `w3` (up) and `w2` (down),
experts are separate, and DeepSeek's rotary rows lie in halves where the official ones lie in pairs.
Their block for multi-token prediction is of another kind than the official one, and is left out.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

State = dict[str, Tensor]

_RENAMES = (
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv_a\.", ".kv_a_proj_with_mqa."),
    (r"\.wkv_b\.", ".kv_b_proj."),
    (r"\.wo\.", ".o_proj."),
)
_DEEPSEEK_RENAMES = (
    (r"self_attn\.q_norm\.", "self_attn.q_a_layernorm."),
    (r"self_attn\.kv_norm\.", "self_attn.kv_a_layernorm."),
    (r"mlp\.gate\.(\w*bias)$", "mlp.gate.e_score_correction_bias"),
)
_DEEPSEEK_FIELDS = {
    "num_dense_layers": "first_k_dense_replace",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "bias_update_speed": "router_bias_update_speed",
    "seq_aux_alpha": "aux_loss_alpha",
}


def read_published(folder: Path) -> tuple[PreTrainedConfig, State] | None:
    """Return config and weights of a published checkpoint, or None if it is not one."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str(fields.get("model_type"))
    if kind not in ("mini_llama3", "mini_deepseekv3", "mini_qwen3_next"):
        return None
    files = sorted(folder.glob("model*.safetensors"))
    if not any(".w1." in name for path in files for name in _keys(path)):
        return None
    state: State = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    config = convert_config(fields)
    return config, convert_state(state, config)


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as tensors:
        return list(tensors.keys())


def convert_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """Return our config for the fields of a published `config.json`."""
    kind = str(fields["model_type"])
    given = {_DEEPSEEK_FIELDS.get(name, name): value for name, value in fields.items()}
    rope = dict(given.get("rope_parameters") or given.pop("rope_scaling", None) or {})
    if rope.get("rope_type") == "yarn":
        # theirs was trained at a part of the length, whatever the config says
        length = int(given["max_position_embeddings"] / rope["factor"])
        rope["original_max_position_embeddings"] = length
    if kind == "mini_deepseekv3":
        given |= {"num_nextn_predict_layers": 0, "rope_interleave": True, "norm_topk_prob": True}
    if kind == "mini_qwen3_next":
        rope = rope or {"rope_type": "default", "rope_theta": given.get("rope_theta", 10_000.0)}
        rope["partial_rotary_factor"] = 1.0  # theirs turns every feature, whatever the config says
        given.setdefault("mlp_only_layers", [0, 1, 2])
        given.setdefault("tie_word_embeddings", True)
        given["output_router_logits"] = False
        # their balance loss is 1 at balance, the official one is the number of chosen experts
        chosen = int(given.get("num_experts_per_tok", 2))
        given["router_aux_loss_coef"] = given.get("router_aux_loss_coef", 0.001) / chosen
    if rope:
        given["rope_parameters"] = rope
    config_class: Any = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), "rope_theta"} - {"architectures", "auto_map", "model_type"}
    made: PreTrainedConfig = config_class(**{k: v for k, v in given.items() if k in known})
    return made


def convert_state(state: State, config: Any) -> State:
    """Return the weights by our names and in our layouts."""
    is_deepseek = config.model_type == "mini_deepseekv3"
    renames = _RENAMES + (_DEEPSEEK_RENAMES if is_deepseek else ())
    made: State = {}
    for name, tensor in state.items():
        if "mtp" in name or "rotary_emb" in name:
            continue
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        made[name] = tensor
    if is_deepseek:
        _pair_rotary_rows(made, config)
    return _pack_experts(made)


def _pair_rotary_rows(state: State, config: Any) -> None:
    """Reorder rotary rows from halves to pairs: row i to 2i, row i + R/2 to 2i + 1."""
    size = config.qk_rope_head_dim
    order = torch.arange(size).view(2, -1).T.flatten()
    for name, tensor in state.items():
        if name.endswith("self_attn.q_b_proj.weight"):
            heads = tensor.clone().view(config.num_attention_heads, -1, tensor.shape[-1])
            heads[:, -size:] = heads[:, -size:][:, order]
            state[name] = heads.flatten(0, 1)
        elif name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
            rows = tensor.clone()
            rows[-size:] = rows[-size:][order]
            state[name] = rows


def _pack_experts(state: State) -> State:
    """Stack the experts of each layer: `(E, 2F, D)` and `(E, D, F)`."""
    made, experts = State(), dict[str, dict[tuple[int, str], Tensor]]()
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if match is None:
            made[name] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for name, parts in experts.items():
        count = range(1 + max(index for index, _ in parts))
        gate_up = [torch.cat([parts[i, "gate"], parts[i, "up"]]) for i in count]
        made[f"{name}.gate_up_proj"] = torch.stack(gate_up)
        made[f"{name}.down_proj"] = torch.stack([parts[i, "down"] for i in count])
    return made
