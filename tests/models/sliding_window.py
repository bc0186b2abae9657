"""A fourth architecture as one file: Llama whose layers mostly look at near tokens only.

Three of four layers see the last `sliding_window` tokens, every fourth sees all (as Ministral and
Gemma do), so that a long text costs little and distant words still meet. Equal to transformers'
`MinistralForCausalLM` weight by weight. What is not new comes from `mini_llama3`.

B batch · T query positions · D model
"""

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
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from minillm.models.mini_llama3 import (
    MiniLlama3Attention,
    MiniLlama3Config,
    MiniLlama3DecoderLayer,
    MiniLlama3ForCausalLM,
    MiniLlama3Model,
    MiniLlama3PreTrainedModel,
)

FULL_EVERY = 4


@strict
class SlidingConfig(MiniLlama3Config):
    """The fields of `MinistralConfig`."""

    model_type = "mini_sliding"
    sliding_window: int = 512
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Choose the layers that see everything."""
        if self.layer_types is None:
            self.layer_types = [
                "sliding_attention" if (index + 1) % FULL_EVERY else "full_attention"
                for index in range(self.num_hidden_layers)
            ]
        super().__post_init__(**kwargs)


class SlidingAttention(MiniLlama3Attention):
    """Llama's attention; kernels that need no mask are told the window."""

    def __init__(self, config: SlidingConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_type = (config.layer_types or [])[layer_idx]
        is_sliding = self.layer_type == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Llama's."""
        return super().forward(*args, sliding_window=self.sliding_window, **kwargs)


class SlidingDecoderLayer(MiniLlama3DecoderLayer):
    """Llama's block with that attention."""

    def __init__(self, config: SlidingConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SlidingAttention(config, layer_idx)


class SlidingPreTrainedModel(MiniLlama3PreTrainedModel):
    """What differs from Llama in what is declared to transformers."""

    config: SlidingConfig
    official_type = "ministral"
    _no_split_modules = ["SlidingDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlidingDecoderLayer,
        "attentions": SlidingAttention,
    }


class SlidingModel(SlidingPreTrainedModel, MiniLlama3Model):
    """Embedding, blocks, last norm."""

    def __init__(self, config: SlidingConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            SlidingDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
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
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # the one thing that is new: two masks, one for each kind of layer
        masks = attention_mask
        if not isinstance(masks, dict):
            given = {
                "config": self.config,
                "inputs_embeds": x_BTD,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {"full_attention": create_causal_mask(**given)}
            if "sliding_attention" in self.config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**given)
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + num_past
        cos_sin = self.rotary_emb(x_BTD, position_ids=position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x_BTD = layer(
                x_BTD,
                attention_mask=masks[kind],
                position_embeddings=cos_sin,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values
        )


class SlidingForCausalLM(SlidingPreTrainedModel, MiniLlama3ForCausalLM):
    """The language model: base model and head."""

    def __init__(self, config: SlidingConfig) -> None:
        super().__init__(config)
        self.model = SlidingModel(config)
        self.post_init()


class SlidingForSequenceClassification(GenericForSequenceClassification, SlidingPreTrainedModel):
    """A label for each sequence, from its last token."""


class SlidingForTokenClassification(GenericForTokenClassification, SlidingPreTrainedModel):
    """A label for each token."""


AutoConfig.register("mini_sliding", SlidingConfig, exist_ok=True)
AutoModel.register(SlidingConfig, SlidingModel, exist_ok=True)
AutoModelForCausalLM.register(SlidingConfig, SlidingForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    SlidingConfig, SlidingForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    SlidingConfig, SlidingForTokenClassification, exist_ok=True
)
