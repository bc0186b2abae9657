"""What every model of this package offers beyond transformers' own contract.

A model file subclasses `MiniPreTrainedModel`, names the official architecture that it equals, and
gets: parameter and FLOP counts, a cache to decode with, metrics of the last forward pass, and the
way to the official class and back.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from minillm.models.cache import ReservedLayer
from minillm.models.moe import Experts
from minillm.models.peft import register_lora_targets


@dataclass(frozen=True, slots=True)
class ParamCount:
    """Numbers of parameters; a tied matrix counts once."""

    total: int
    active: int
    """Those that one token passes through: all of a dense model, the chosen experts of a MoE."""
    embedding: int
    """The input table, which is looked up and not multiplied."""


def param_count(model: PreTrainedModel) -> ParamCount:
    """Count the parameters of any causal LM."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = _table(model).numel()
    return ParamCount(total, total - getattr(model, "num_idle_params", 0), embedding)


def flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Return the FLOPs of one token in training, forward and backward, of any causal LM."""
    return sum(flop_parts(model, seq_len).values())


def flop_parts(model: PreTrainedModel, seq_len: int) -> dict[str, float]:
    """Return the FLOPs of one token in training by what they are spent on.

    `matrices`: 6 for each parameter that is multiplied (Kaplan et al. 2020), the head included.
    `attention`: 12 * layers * heads * head size * seq_len (PaLM, appendix B); by that convention
    the masked half of causal attention counts, although good kernels skip it. Further parts come
    from modules that have an `extra_flops(seq_len)`.
    """
    count, config = param_count(model), model.config
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is _table(model)
    multiplied = count.active - (0 if is_tied else count.embedding)
    width: int | None = getattr(model, "attention_width", None)
    if width is None:
        heads: int = config.num_attention_heads
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = config.num_hidden_layers * heads * head_dim
    parts = {"matrices": 6.0 * multiplied, "attention": 12.0 * width * seq_len}
    for module in model.modules():
        extra: Any = getattr(module, "extra_flops", None)
        if extra is not None:
            for name, number in extra(seq_len).items():
                parts[name] = parts.get(name, 0.0) + number
    return parts


def _table(model: PreTrainedModel) -> nn.Parameter:
    weight: nn.Parameter = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


class MiniPreTrainedModel(PreTrainedModel):
    """Flags that hold for every architecture here, and the extras."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    official_type = ""
    """`model_type` of the architecture in transformers that this one equals."""

    lora_targets: Sequence[str] = ("q_proj", "v_proj")
    """Modules that LoRA adapts when the user names none."""

    cache_dtype: torch.dtype | None = None
    """What caches keep keys and values as; None: as the model computes them."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        register_lora_targets(config.model_type, self.lora_targets)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Yes: attention follows the config. transformers looks for that in one file's source."""
        return True

    official_fields: dict[str, Any] = {}
    """Config fields that both directions of conversion set, e.g. no layers that only ours has."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)

    @property
    def num_idle_params(self) -> int:
        """Parameters that one token does not pass through: the experts not chosen."""
        return 0

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the last training step measured, for a loop to log; here nothing.

        Named scalars, and vectors such as `expert_load/layer_3`: the load of each expert of a
        layer in multiples of the even one.
        """
        return {}

    @property
    def attention_width(self) -> int | None:
        """Heads * head size, summed over the layers whose cost grows with the sequence.

        None: every layer, with `config.head_dim`. Sizes of keys and values may differ: their mean.
        """
        return None

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads, key size and value size of what a layer remembers of a token."""
        config = self.config
        return config.num_key_value_heads, config.head_dim, config.head_dim

    def cache_bytes(self) -> tuple[int, int]:
        """Return the bytes that a token adds to the cache, and those of a sequence of any length.

        The latter belong to modules that have `state_bytes`.
        """
        heads, *sizes = self.cache_shape
        kinds = getattr(self.config, "layer_types", None)
        num_layers = kinds.count("full_attention") if kinds else self.config.num_hidden_layers
        states = sum(getattr(module, "state_bytes", 0) for module in self.modules())
        return num_layers * heads * sum(sizes) * self.dtype.itemsize, states

    def update_router_bias(self) -> None:
        """Balance the experts; called once for each optimizer step, just before the optimizers.

        Here there are none.
        """

    def official_state(self) -> dict[str, Tensor]:
        """Return the weights that the official class has too, by name."""
        state: dict[str, Tensor] = self.state_dict()
        return state

    def param_count(self) -> ParamCount:
        """Count parameters."""
        return param_count(self)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of one token in training, forward and backward."""
        return flops_per_token(self, seq_len)

    def make_cache(self, num_slots: int, max_len: int) -> Cache:
        """Return an empty cache for `num_slots` sequences that advance together.

        Memory for `max_len` tokens is reserved now; it grows if that is not enough.
        """
        heads, *sizes = self.cache_shape
        dtype = self.cache_dtype
        layers: list[Any] = [
            ReservedLayer(max_len, dtype) for _ in range(self.config.num_hidden_layers)
        ]
        for layer in layers:
            layer.lazy_initialization(
                *(
                    torch.empty(num_slots, heads, 0, size, dtype=self.dtype, device=self.device)
                    for size in sizes
                )
            )
        return Cache(layers=layers)

    def export_official(self) -> PreTrainedModel:
        """Return the official class with this model's weights (copied).

        `model.export_official().save_pretrained(folder)` makes a folder for any tool that knows
        the official architecture.
        """
        config = official_config(self.config, self.official_type, **self.official_fields)
        model: PreTrainedModel = _convert(self, self.official_state(), config)
        return model

    @classmethod
    def from_official(cls, official: PreTrainedModel) -> Self:
        """Return a model of this class with the weights of an official one (copied).

        Raises:
            ValueError: `official` is of another architecture.
        """
        if official.config.model_type != cls.official_type:
            raise ValueError(
                f"{cls.__name__} takes a `{cls.official_type}` model, "
                f"not `{official.config.model_type}`"
            )
        config_class: Any = cls.config_class
        fields = official.config.to_dict() | {"model_type": config_class.model_type}
        fields.pop("architectures", None)
        config = config_class.from_dict(fields | cls.official_fields)
        model: Self = _convert(official, official.state_dict(), config)
        return model


def official_config(
    config: PreTrainedConfig, official_type: str, **overrides: Any
) -> PreTrainedConfig:
    """Return the official config with the same fields, but for `overrides`."""
    fields = config.to_dict() | overrides
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    made: PreTrainedConfig = AutoConfig.for_model(official_type, **fields)
    return made


def _convert(source: PreTrainedModel, state: dict[str, Tensor], config: PreTrainedConfig) -> Any:
    config._attn_implementation = source.config._attn_implementation
    with init.no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device).train(source.training)
