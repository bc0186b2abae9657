"""Shapes of mini_qwen3_next: its config and presets. The model is `mini_qwen3_next.py`."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LINEAR, FULL = "linear_attention", "full_attention"


@strict
class MiniQwen3NextConfig(PreTrainedConfig):
    """Field names are those of `Qwen3NextConfig`; the defaults are a shape every engine takes."""

    model_type = "mini_qwen3_next"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.linear_attn.in_proj_qkvz": "colwise_gather_output",
        "layers.*.linear_attn.in_proj_ba": "colwise_gather_output",
        "layers.*.linear_attn.out_proj": "colwise_gather_output",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        **{
            f"layers.*.mlp.{prefix}{name}": "rowwise" if name == "down_proj" else "colwise"
            for prefix in ("", "shared_expert.")
            for name in ("gate_proj", "up_proj", "down_proj")
        },
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32_004
    hidden_size: int = 768
    intermediate_size: int = 2_064
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 64
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
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    layer_types: list[str] | None = None
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_num_key_heads: int = 6
    linear_num_value_heads: int = 12
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: int | float = 0.001
    auto_map: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the fields that follow from others."""
        kwargs.setdefault("partial_rotary_factor", 0.25)
        interval = kwargs.pop("full_attention_interval", 4)
        self.mlp_only_layers = self.mlp_only_layers or []
        self.layer_types = self.layer_types or [
            FULL if number % interval == 0 else LINEAR
            for number in range(1, self.num_hidden_layers + 1)
        ]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def is_sparse(self, layer_idx: int) -> bool:
        """Tell whether a layer has experts."""
        is_turn = self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0
        return is_turn and layer_idx not in (self.mlp_only_layers or [])

    def validate_architecture(self) -> None:
        """Refuse shapes that cannot be built; called by `strict`."""
        for name, part_name in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, name) % getattr(self, part_name):
                raise ValueError(f"{name} is not a multiple of {part_name}")
        if FULL not in (self.layer_types or []) or LINEAR not in (self.layer_types or []):
            raise ValueError(f"layer_types must have both `{LINEAR}` and `{FULL}`")
        if self.num_experts_per_tok > self.num_experts > 0:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be `silu`, not `{self.hidden_act}`")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "published": {"mlp_only_layers": [0, 1, 2], "partial_rotary_factor": 1.0},
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 192,
        "max_position_embeddings": 1_024,
    },
}
