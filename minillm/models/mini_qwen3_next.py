"""mini_qwen3_next: the Qwen3-Next decoder (Qwen team 2025) at laptop size.

Three layers of four replace attention by a memory of fixed size, Gated DeltaNet (Yang et al.
2025); the fourth attends, with an output gate. Each is followed by a mixture of experts with a
gated shared expert. Equal to transformers' `Qwen3NextForCausalLM` weight by weight; a checkpoint
becomes one by renaming its `model_type`.

B batch · T query positions · S key positions · D model · V vocabulary · N = B * T tokens
H query or value heads · G key heads · K head size · L layers · E experts
"""

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
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import (
    OutputRecorder,
    capture_outputs,
    maybe_install_capturing_hooks,
)

from minillm.models.attention import causal_mask, choose_attention
from minillm.models.base import MiniPreTrainedModel
from minillm.models.cache import ReservedLayer
from minillm.models.gated_delta_net import GatedDeltaNet
from minillm.models.loss import causal_lm_loss
from minillm.models.mini_qwen3_next_config import FULL, LINEAR, PRESETS, MiniQwen3NextConfig
from minillm.models.norm import ZeroCentredRMSNorm
from minillm.models.packing import document_positions, segments_if_packed
from minillm.models.rope import RotaryEmbedding, apply_rope
from minillm.models.shared_expert import (
    SharedExpertMoE,
    SoftmaxRouter,
    SwiGLU,
    label_share,
    load_balancing,
)


class MiniQwen3NextAttention(nn.Module):
    """Causal attention with grouped queries, normed queries and keys, and an output gate."""

    def __init__(self, config: MiniQwen3NextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout, self.is_causal = config.attention_dropout, True
        size, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, 2 * q_size, bias=bias)
        self.k_proj = nn.Linear(size, kv_size, bias=bias)
        self.v_proj = nn.Linear(size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, size, bias=bias)
        self.q_norm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `(B, T, D)` and, from the eager implementation, the weights `(B, H, T, S)`."""
        # 1. project; a query's rows are followed by its gate's
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BTHK, gate_BTHK = (
            self.q_proj(hidden_states).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        )
        k_BTGK = self.k_proj(hidden_states).view(heads)
        v_BGSK = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        # 2. norm queries and keys, turn them by their positions
        q_BHTK = apply_rope(self.q_norm(q_BTHK), *position_embeddings).transpose(1, 2)
        k_BGSK = apply_rope(self.k_norm(k_BTGK), *position_embeddings).transpose(1, 2)

        # 3. append to the keys and values seen before
        if past_key_values is not None:
            k_BGSK, v_BGSK = past_key_values.update(k_BGSK, v_BGSK, self.layer_idx)

        # 4. softmax(q k^T / sqrt(K)) v
        attend = choose_attention(self.config, attention_mask)
        qkv = q_BHTK, k_BGSK, v_BGSK
        out_BTHK, weights_BHTS = attend(
            self,
            *qkv,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

        # 5. let the gate through, mix the heads
        return self.o_proj((out_BTHK * gate_BTHK.sigmoid()).flatten(-2)), weights_BHTS


class MiniQwen3NextDecoderLayer(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + experts(norm(x))`."""

    def __init__(self, config: MiniQwen3NextConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.is_linear = config.layer_types[layer_idx] == LINEAR
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config, layer_idx)
        else:
            self.self_attn = MiniQwen3NextAttention(config, layer_idx)
        size = config.hidden_size
        self.mlp: nn.Module = (
            SharedExpertMoE(config)
            if config.is_sparse(layer_idx)
            else SwiGLU(size, config.intermediate_size)
        )
        self.input_layernorm = ZeroCentredRMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        segment_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `kwargs` go to the attention."""
        x_BTD = hidden_states
        h_BTD = self.input_layernorm(x_BTD)
        if self.is_linear:
            h_BTD = self.linear_attn(h_BTD, attention_mask, past_key_values, segment_BT)
        else:
            h_BTD = self.self_attn(
                h_BTD, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )[0]
        x_BTD = x_BTD + h_BTD
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class MiniQwen3NextPreTrainedModel(MiniPreTrainedModel):
    """What the base model and its heads declare to transformers."""

    config: MiniQwen3NextConfig
    official_type = "qwen3_next"
    lora_targets = ("q_proj", "v_proj", "in_proj_qkvz", "out_proj")
    _is_stateful = True  # a memory cannot be cut back to an earlier token
    _no_split_modules = ["MiniQwen3NextDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp.*"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(SoftmaxRouter, index=0),
        "hidden_states": MiniQwen3NextDecoderLayer,
        "attentions": MiniQwen3NextAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroCentredRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, SoftmaxRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, GatedDeltaNet):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log())

    @property
    def num_idle_params(self) -> int:
        """Parameters of the experts that a token does not pass through."""
        config = self.config
        layers = sum(config.is_sparse(idx) for idx in range(config.num_hidden_layers))
        num_idle = max(0, config.num_experts - config.num_experts_per_tok)
        return layers * num_idle * 3 * config.hidden_size * config.moe_intermediate_size

    @property
    def attention_width(self) -> int:
        """Heads * head size over the layers that attend; the others cost the same at any length."""
        num_full = (self.config.layer_types or []).count(FULL)
        return num_full * self.config.num_attention_heads * self.config.head_dim

    def make_cache(self, num_slots: int, max_len: int) -> Cache:
        """Return an empty cache: keys and values of some layers, the memory of the others."""
        return Cache(
            layers=[
                LinearAttentionLayer() if kind == LINEAR else ReservedLayer(max_len)
                for kind in self.config.layer_types or []
            ]
        )


class MiniQwen3NextModel(MiniQwen3NextPreTrainedModel):
    """Embedding, blocks, last norm."""

    def __init__(self, config: MiniQwen3NextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            MiniQwen3NextDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

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
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return the normed hidden states `(B, T, D)` and the cache."""
        # 1. embed
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # 2. documents: where given positions restart, or by their cumulative lengths
        places_BT = position_ids
        if (lengths := kwargs.get("cu_seq_lens_q")) is not None:
            places_BT = document_positions(lengths, *x_BTD.shape[:2])
            position_ids = places_BT if position_ids is None else position_ids
            attention_mask = None
        segment_BT = None
        if places_BT is not None and attention_mask is None and past_key_values is None:
            segment_BT = segments_if_packed(places_BT)

        # 3. who may look at whom, and which tokens are padding
        if not isinstance(masks := attention_mask, dict):
            given = self.config, x_BTD, attention_mask, past_key_values
            masks = {
                FULL: causal_mask(self, *given[1:], places_BT),
                LINEAR: create_recurrent_attention_mask(*given),
            }
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + num_past
        cos_sin = self.rotary_emb(x_BTD, position_ids=position_ids)

        # 4. blocks
        for layer, kind in zip(self.layers, self.config.layer_types or [], strict=True):
            x_BTD = layer(
                x_BTD,
                attention_mask=masks[kind],
                position_embeddings=cos_sin,
                position_ids=position_ids,
                past_key_values=past_key_values,
                segment_BT=segment_BT,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values
        )


class MiniQwen3NextForCausalLM(MiniQwen3NextPreTrainedModel, GenerationMixin):
    """The language model: base model and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniQwen3NextConfig) -> None:
        super().__init__(config)
        self.model = MiniQwen3NextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._metrics: dict[str, Tensor] = {}
        self.post_init()  # type: ignore[no-untyped-call]
        # now and not at the first use, which may be inside a compiled graph
        maybe_install_capturing_hooks(self.model)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Router loss, and the load of each expert in each layer; 1 is balance."""
        return self._metrics

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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits `(B, T, V)`, and a loss where there are labels.

        Arguments are those of `MiniLlama3ForCausalLM.forward`, and `output_router_logits`: return
        what the routers said, and add their balance to the loss. In training it is always added.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        coef, num_chosen = self.config.router_aux_loss_coef, self.config.num_experts_per_tok
        is_balanced = output_router_logits or (self.training and coef > 0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=is_balanced,
            **kwargs,
        )
        h_BTD = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits_BTV = None if skip_logits else self.lm_head(h_BTD)
        loss = causal_lm_loss(self, h_BTD, logits_BTV, labels=labels, **kwargs)
        aux_loss = None
        if is_balanced and outputs.router_logits:
            is_2d = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
            mask_BT = attention_mask if is_2d else None
            aux_loss, load_LE = load_balancing(outputs.router_logits, num_chosen, mask_BT)
            share = label_share(labels, **kwargs) if self.training and loss is not None else 1.0
            loss = None if loss is None else loss + coef * aux_loss * share
            sparse = filter(self.config.is_sparse, range(self.config.num_hidden_layers))
            load_LE = load_LE * (load_LE.shape[1] / num_chosen)
            self._metrics = {
                f"expert_load/layer_{idx}": x for idx, x in zip(sparse, load_LE, strict=True)
            } | {"router_loss": aux_loss.detach()}
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class MiniQwen3NextForSequenceClassification(
    GenericForSequenceClassification, MiniQwen3NextPreTrainedModel
):
    """A label for each sequence, from its last token."""


class MiniQwen3NextForTokenClassification(
    GenericForTokenClassification, MiniQwen3NextPreTrainedModel
):
    """A label for each token."""


__all__ = ["PRESETS", "MiniQwen3NextForCausalLM", "MiniQwen3NextModel"]

register_checkpoint_conversion_mapping(
    "mini_qwen3_next", get_checkpoint_conversion_mapping("qwen3_next"), overwrite=True
)
AutoConfig.register("mini_qwen3_next", MiniQwen3NextConfig, exist_ok=True)
AutoModel.register(MiniQwen3NextConfig, MiniQwen3NextModel, exist_ok=True)
AutoModelForCausalLM.register(MiniQwen3NextConfig, MiniQwen3NextForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MiniQwen3NextConfig, MiniQwen3NextForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    MiniQwen3NextConfig, MiniQwen3NextForTokenClassification, exist_ok=True
)
