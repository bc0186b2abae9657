"""mini_llama3: the Llama 3 decoder (Grattafiori et al. 2024) at laptop size.

Token embedding, then blocks of `x + attention(norm(x))` and `x + mlp(norm(x))`, a last norm, and
a head that shares the embedding's matrix (Press & Wolf 2017). Equal to transformers'
`LlamaForCausalLM` weight by weight; a checkpoint becomes one by renaming its `model_type`.

B batch · T query positions · S key positions · D model · V vocabulary
H query heads · G key/value heads · K head size · F feed-forward
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from minillm.models.attention import causal_mask, choose_attention
from minillm.models.base import MiniPreTrainedModel
from minillm.models.gates import swiglu
from minillm.models.loss import causal_lm_loss
from minillm.models.norm import RMSNorm
from minillm.models.rope import RotaryEmbedding, apply_rope


@strict
class MiniLlama3Config(PreTrainedConfig):
    """Field names are those of `LlamaConfig`; the defaults are the published ~100M shape."""

    model_type = "mini_llama3"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    # Llama 3 has 500,000, for contexts of 8,192 and more; over 2,048 the usual base tells all apart
    default_theta = 10_000.0

    vocab_size: int = 32_004
    hidden_size: int = 768
    intermediate_size: int = 2_064
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 4
    head_dim: int | None = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 2_048  # trains in a reasonable time, dense scores fit a laptop
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
    mlp_bias: bool = False
    auto_map: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the fields that follow from others."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Refuse shapes that cannot be built; called by `strict`."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 1
        for name, whole, part in (
            ("hidden_size", self.hidden_size, heads),
            ("num_attention_heads", heads, kv_heads),
        ):
            if whole % part:
                raise ValueError(f"{name} {whole} is not a multiple of {part}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be `silu`, not `{self.hidden_act}`")


class MiniLlama3MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: MiniLlama3Config) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        h_BTF = swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        out_BTD: Tensor = self.down_proj(h_BTF)
        return out_BTD


class MiniLlama3Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023) and rotary positions.

    H/G query heads share one key/value head, so that the cache is H/G times smaller.
    """

    def __init__(self, config: MiniLlama3Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim or 1
        num_kv_heads = config.num_key_value_heads or 1
        self.num_key_value_groups = config.num_attention_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `(B, T, D)` and, from the eager implementation, the weights `(B, H, T, S)`."""
        # 1. project; heads are the last but one dimension
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BTHK = self.q_proj(hidden_states).view(heads)
        k_BTGK = self.k_proj(hidden_states).view(heads)
        v_BGTK = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        # 2. turn queries and keys by their positions
        q_BHTK = apply_rope(q_BTHK, *position_embeddings).transpose(1, 2)
        k_BGSK = apply_rope(k_BTGK, *position_embeddings).transpose(1, 2)

        # 3. append to the keys and values seen before
        v_BGSK = v_BGTK
        if past_key_values is not None:
            k_BGSK, v_BGSK = past_key_values.update(k_BGSK, v_BGSK, self.layer_idx)

        # 4. softmax(q k^T / sqrt(K)) v
        attend = choose_attention(self.config, attention_mask)
        out_BTHK, weights_BHTS = attend(
            self,
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

        # 5. mix the heads
        return self.o_proj(out_BTHK.flatten(-2)), weights_BHTS


class MiniLlama3DecoderLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: MiniLlama3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MiniLlama3Attention(config, layer_idx)
        self.mlp = MiniLlama3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `kwargs` go to the attention."""
        x_BTD = hidden_states
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), **kwargs)[0]
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class MiniLlama3PreTrainedModel(MiniPreTrainedModel):
    """What the base model and its heads declare to transformers."""

    config: MiniLlama3Config
    official_type = "llama"
    _no_split_modules = ["MiniLlama3DecoderLayer"]
    _can_record_outputs = {
        "hidden_states": MiniLlama3DecoderLayer,
        "attentions": MiniLlama3Attention,
    }


class MiniLlama3Model(MiniLlama3PreTrainedModel):
    """Embedding, blocks, last norm."""

    def __init__(self, config: MiniLlama3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            MiniLlama3DecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
    ) -> BaseModelOutputWithPast:
        """Return the normed hidden states `(B, T, D)` and the cache."""
        # 1. embed
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # 2. who may look at whom. Given positions that restart make a block for each document;
        # positions made here cannot restart, and are not searched for it (a device sync)
        mask = causal_mask(self, x_BTD, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + num_past
        cos_sin = self.rotary_emb(x_BTD, position_ids=position_ids)

        # 3. blocks
        for layer in self.layers:
            x_BTD = layer(
                x_BTD,
                attention_mask=mask,
                position_embeddings=cos_sin,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values
        )


class MiniLlama3ForCausalLM(MiniLlama3PreTrainedModel, GenerationMixin):
    """The language model: base model and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniLlama3Config) -> None:
        super().__init__(config)
        self.model = MiniLlama3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
    ) -> CausalLMOutputWithPast:
        """Return logits `(B, T, V)`, and a loss where there are labels.

        Args:
            input_ids: `(B, T)`; or give `inputs_embeds`, `(B, T, D)`.
            attention_mask: `(B, S)`, 0 for padding; or `(B, 1, T, S)`.
            position_ids: `(B, T)`. Without mask and cache, a restart begins a new document that
                sees nothing of the ones before.
            past_key_values: Cache of the tokens before these.
            inputs_embeds: Instead of `input_ids`.
            labels: `(B, T)`, equal to `input_ids` where there is a loss, else -100.
            use_cache: Return a cache.
            logits_to_keep: Compute the logits of the last n positions (0: all), or of those given.
            skip_logits: Compute the loss without storing logits: faster, less memory.
            **kwargs: `shift_labels` (`(B, T)`, each the token after), instead of `labels`;
                `num_items_in_batch`, the label count that the loss is a mean over;
                `cu_seq_lens_q` and others for attention kernels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        h_BTD = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits_BTV = None if skip_logits else self.lm_head(h_BTD)
        return CausalLMOutputWithPast(
            loss=causal_lm_loss(self, h_BTD, logits_BTV, labels=labels, **kwargs),
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniLlama3ForSequenceClassification(
    GenericForSequenceClassification, MiniLlama3PreTrainedModel
):
    """A label for each sequence, from its last token."""


class MiniLlama3ForTokenClassification(GenericForTokenClassification, MiniLlama3PreTrainedModel):
    """A label for each token."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "": {},  # the published shape: 100M at 32,004 tokens
    "small": {  # 12M at 8,196 tokens, 24M at 32,004
        "hidden_size": 384,
        "intermediate_size": 1_024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "tiny": {  # 4M at 6,144 tokens: the demo on two CPU cores
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1_024,
    },
    "nano": {  # 1.5M at 6,144 tokens: recipes compared on one CPU core
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}

AutoConfig.register("mini_llama3", MiniLlama3Config, exist_ok=True)
AutoModel.register(MiniLlama3Config, MiniLlama3Model, exist_ok=True)
AutoModelForCausalLM.register(MiniLlama3Config, MiniLlama3ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MiniLlama3Config, MiniLlama3ForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    MiniLlama3Config, MiniLlama3ForTokenClassification, exist_ok=True
)
