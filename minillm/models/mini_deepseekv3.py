"""mini_deepseekv3: DeepSeek-V3 (DeepSeek-AI 2024) at laptop size.

New beside Llama: multi-head latent attention (`mla.py`), which remembers one small vector of a
token instead of keys and values of every head; feed-forward layers of many experts, of which a
token uses a few (`router.py`, `moe.py`); and a block that learns the token after the next
(`mtp.py`). Equal to transformers' `DeepseekV3ForCausalLM` weight by weight; a checkpoint becomes
one by renaming its `model_type`.

B batch · T positions · D model · V vocabulary · N = B * T tokens · E experts · K chosen experts
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from minillm.models.attention import causal_mask
from minillm.models.base import MiniPreTrainedModel
from minillm.models.deepseek_config import MiniDeepseekV3Config
from minillm.models.deepseek_training import TrainingExtras
from minillm.models.gates import swiglu
from minillm.models.loss import causal_lm_loss
from minillm.models.mla import MiniDeepseekV3Attention
from minillm.models.moe import Experts
from minillm.models.mtp import Join
from minillm.models.norm import RMSNorm
from minillm.models.packing import document_positions
from minillm.models.rope import RotaryEmbedding
from minillm.models.router import Route, TopkRouter


class MiniDeepseekV3MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        out_BTD: Tensor = self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return out_BTD


class MiniDeepseekV3MoE(nn.Module):
    """Some of many experts, weighted, and one that every token uses."""

    def __init__(self, config: MiniDeepseekV3Config) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.moe_intermediate_size
        self.experts = Experts(config.n_routed_experts, size, inner)
        self.gate = TopkRouter(config)
        self.shared_experts = MiniDeepseekV3MLP(size, inner * config.n_shared_experts)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(B, T, D)`, and the router's logits `(N, E)` and choice `(N, K)`."""
        x_ND = x_BTD.flatten(0, -2)
        logits_NE, weight_NK, index_NK = self.gate(x_ND)
        y_BTD = self.experts(x_ND, index_NK, weight_NK).view_as(x_BTD)
        return y_BTD + self.shared_experts(x_BTD), logits_NE, index_NK


class MiniDeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; dense in the first layers."""

    def __init__(self, config: MiniDeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MiniDeepseekV3Attention(config, layer_idx)
        self.mlp: nn.Module
        if layer_idx < config.first_k_dense_replace:
            self.mlp = MiniDeepseekV3MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MiniDeepseekV3MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Map `(B, T, D)` to `(B, T, D)`; with `routed`, also return what the router did."""
        is_asked = kwargs.pop("routed", False)
        x_BTD = hidden_states
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), **kwargs)[0]
        y = self.mlp(self.post_attention_layernorm(x_BTD))
        y_BTD, *route = y if isinstance(y, tuple) else (y,)
        return (x_BTD + y_BTD, *route) if is_asked else x_BTD + y_BTD


class MiniDeepseekV3MTPLayer(MiniDeepseekV3DecoderLayer, Join):
    """The block after the last: a decoder layer between `join` and the norm of the head."""

    def __init__(self, config: MiniDeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_join(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """Map hidden states and the embeddings one token further to normed hidden states."""
        assert embeds is not None
        out = super().forward(self.join(hidden_states, embeds), routed=True, **kwargs)
        return (self.shared_head.norm(out[0]), *out[1:])


class MiniDeepseekV3PreTrainedModel(MiniPreTrainedModel):
    """What the base model and its heads declare to transformers."""

    config: MiniDeepseekV3Config
    official_type = "deepseek_v3"
    lora_targets = ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    official_fields = {"num_nextn_predict_layers": 0}  # the official class has no such block
    _no_split_modules = ["MiniDeepseekV3DecoderLayer", "MiniDeepseekV3MTPLayer"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": MiniDeepseekV3DecoderLayer,
        "attentions": MiniDeepseekV3Attention,
        "router_logits": OutputRecorder(TopkRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TopkRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, TopkRouter | MiniDeepseekV3ForCausalLM):
            for _, buffer in module.named_buffers(recurse=False):
                init.zeros_(buffer)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for attention in this file

    @property
    def attention_width(self) -> int:
        """Half of it for keys, half for values."""
        config = self.config
        both = config.qk_head_dim + config.v_head_dim
        return config.num_hidden_layers * config.num_attention_heads * both // 2

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """One latent and one rotated key for all heads."""
        return 1, self.config.kv_lora_rank, self.config.qk_rope_head_dim

    @property
    def num_idle_params(self) -> int:
        """Experts that a token does not use, and the blocks that decoding does not use."""
        config, idle = self.config, 0
        share = 1 - config.num_experts_per_tok / config.n_routed_experts
        layers: Any = self.base_model.layers
        for layer in layers:
            is_block = isinstance(layer, MiniDeepseekV3MTPLayer)
            part = layer if is_block else getattr(layer.mlp, "experts", nn.Identity())
            idle += int(sum(p.numel() for p in part.parameters()) * (1 if is_block else share))
        return idle


class MiniDeepseekV3Model(MiniDeepseekV3PreTrainedModel):
    """Embedding, blocks, last norm."""

    def __init__(self, config: MiniDeepseekV3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            MiniDeepseekV3DecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        # a causal LM's checkpoint has the blocks of `mtp.py` after these layers
        extra = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected = [rf"(^|\.)layers\.{n}\." for n in extra]
        self.post_init()  # type: ignore[no-untyped-call]

    def place(
        self,
        x_BTD: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the layers' arguments on who may look at whom, and on positions."""
        starts = position_ids
        if cu_seq_lens is not None and past_key_values is None:
            starts = document_positions(cu_seq_lens, *x_BTD.shape[:2])
            position_ids = starts if position_ids is None else position_ids
        # given positions that restart make a block for each document; positions made here
        # cannot restart, and are not searched for it (a device sync)
        mask = causal_mask(self, x_BTD, attention_mask, past_key_values, starts)
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + num_past
        cos_sin = self.rotary_emb(x_BTD, position_ids=position_ids)
        return {
            "attention_mask": mask, "position_embeddings": cos_sin, "position_ids": position_ids,
        }  # fmt: skip

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routes: list[Route] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return the normed hidden states `(B, T, D)` and the cache.

        `routes`, if given, takes what each layer's router did.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        kwargs |= self.place(x_BTD, attention_mask, position_ids, past_key_values, cu_seq_lens)
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        layers: Any = self.layers[: self.config.num_hidden_layers]
        for layer in layers:
            if routes is None:
                x_BTD = layer(x_BTD, **kwargs)
                continue
            x_BTD, *route = layer(x_BTD, routed=True, **kwargs)
            if route:
                routes.append(Route(layer.mlp.gate, *route))
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values
        )


class MiniDeepseekV3ForCausalLM(TrainingExtras, MiniDeepseekV3PreTrainedModel, GenerationMixin):
    """The language model: base model, head, and the blocks that look further ahead."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniDeepseekV3Config) -> None:
        super().__init__(config)
        self.model = MiniDeepseekV3Model(config)
        first = config.num_hidden_layers
        self.model.layers.extend(
            MiniDeepseekV3MTPLayer(config, first + n) for n in range(config.num_mtp_layers)
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.add_meters()
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits `(B, T, V)`, and a loss where there are labels.

        Arguments are those of `MiniLlama3ForCausalLM`. The loss is the cross entropy alone. In
        training its gradient is that of the balance and the further tokens' losses too, whose
        values are in `metrics`.
        """
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        routes: list[Route] | None = [] if self.training and has_labels else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routes=routes,
            **{name: value for name, value in kwargs.items() if name != "shift_labels"},
        )
        hidden_BTD = outputs.last_hidden_state
        h_BTD = slice_logits_to_keep(hidden_BTD, logits_to_keep)
        logits_BTV = None if skip_logits else self.lm_head(h_BTD)
        loss = causal_lm_loss(self, h_BTD, logits_BTV, labels=labels, **kwargs)
        if loss is not None and routes is not None:
            embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            extra = self.extra_loss(
                hidden_BTD, embeds, attention_mask, position_ids, labels, routes, **kwargs
            )
            loss = loss + (extra - extra.detach())
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class MiniDeepseekV3ForSequenceClassification(
    GenericForSequenceClassification, MiniDeepseekV3PreTrainedModel
):
    """A label for each sequence, from its last token."""


class MiniDeepseekV3ForTokenClassification(
    GenericForTokenClassification, MiniDeepseekV3PreTrainedModel
):
    """A label for each token."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "": {},  # the published shape
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1_024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
    },
    "tiny": {  # the demo's size: two CPU cores
        "hidden_size": 256,
        "intermediate_size": 688,
        "moe_intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "max_position_embeddings": 1_024,
    },
}

# on disk each expert's matrices lie apart, as in every published checkpoint
register_checkpoint_conversion_mapping(
    "mini_deepseekv3", get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)
AutoConfig.register("mini_deepseekv3", MiniDeepseekV3Config, exist_ok=True)
AutoModel.register(MiniDeepseekV3Config, MiniDeepseekV3Model, exist_ok=True)
AutoModelForCausalLM.register(MiniDeepseekV3Config, MiniDeepseekV3ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MiniDeepseekV3Config, MiniDeepseekV3ForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    MiniDeepseekV3Config, MiniDeepseekV3ForTokenClassification, exist_ok=True
)
