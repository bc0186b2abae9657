"""Config of mini_deepseekv3; field names are those of `DeepseekV3Config`."""

import math
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class MiniDeepseekV3Config(PreTrainedConfig):
    """The defaults are the published shape: 165M weights, 101M of them for one token."""

    model_type = "mini_deepseekv3"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    default_theta = 10_000.0

    vocab_size: int = 32_004
    hidden_size: int = 768
    intermediate_size: int = 3_072
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: int | float = 1.0
    q_lora_rank: int | None = 384
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 2_048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    output_router_logits: bool = False
    # training: blocks that predict further tokens and the weight of their loss (paper, §4.2), the
    # step of the router's bias, and the weight of the balance loss
    num_nextn_predict_layers: int = 1
    mtp_loss_weight: int | float = 0.3
    router_bias_update_speed: int | float = 0.01
    aux_loss_alpha: int | float = 0.0001
    # transformers knows one kind of router and does not write these; vLLM, SGLang and llama.cpp
    # read them, and otherwise take another kind
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    seq_aux: bool = True
    auto_map: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the fields that follow from others."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim  # what rotary embeddings look for
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Refuse shapes that cannot be built; called by `strict`."""
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups or experts // groups < 2:
            raise ValueError(f"n_routed_experts {experts} is not n_group {groups} times 2 or more")
        if not 1 <= self.topk_group <= groups:
            raise ValueError(f"topk_group {self.topk_group} is not 1 to n_group {groups}")
        choice = experts // groups * self.topk_group
        if not 1 <= self.num_experts_per_tok <= choice:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is not 1 to {choice}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        for name, only in (
            ("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"),
            ("moe_layer_freq", 1), ("num_key_value_heads", self.num_attention_heads),
        ):  # fmt: skip
            if getattr(self, name) not in (only, None):
                raise ValueError(f"{name} must be `{only}`, not `{getattr(self, name)}`")


def score_scale(config: MiniDeepseekV3Config) -> float:
    """Return the factor of the scores: `K ** -0.5`, and more for YaRN (Peng et al. 2023, §3.4)."""
    scale: float = config.qk_head_dim**-0.5
    rope: Any = config.rope_parameters
    weight = rope.get("mscale_all_dim", 0)
    if rope["rope_type"] != "default" and weight and rope["factor"] > 1:
        scale *= (0.1 * weight * math.log(rope["factor"]) + 1) ** 2
    return scale
