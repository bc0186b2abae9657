"""The next tokens of a Llama in one call of `cpu_kernels.cpp`, for packed models on a CPU.

A token of a small model is some hundred operations of a few microseconds: in Python the way to
them costs as much as they do. Other models, and calls that the kernel does not know, take the
model's own forward pass; its linear layers are packed all the same.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.models.cache import ReservedLayer
from minillm.models.cpu_kernels import Matrix, load_kernels
from minillm.models.quantize import GROUP, PackedLinear
from minillm.models.slot_cache import SlotCache

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Pointer: Any = ctypes.c_void_p
_Int: Any = ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [*((name, Matrix) for name in NAMES), ("norm_in", _Pointer), ("norm_post", _Pointer)]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)), ("norm", _Pointer), ("head", Matrix),
        *((name, _Int) for name in ("layers_", "size", "inner", "heads", "kv_heads", "head_size")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    ]  # fmt: skip


def make_decode_step(model: Any) -> Callable[..., Tensor]:
    """Return what maps a model's arguments to its logits `(B, kept, V)`, as fast as is known."""
    forward: Callable[..., Tensor] = lambda **kwargs: _logits(model, kwargs)  # noqa: E731
    if getattr(model.config, "model_type", "") != "mini_llama3" or model.dtype != torch.float32:
        return forward
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    has_bias = any(m.bias is not None for m in packed)
    is_odd = model.config.head_dim % 8 or model.config.intermediate_size % 8
    if has_bias or is_odd or len(packed) != 7 * model.config.num_hidden_layers + 1:
        return forward
    return LlamaStep(model)


class LlamaStep:
    """A packed Llama; holds pointers into it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config, base = model.config, model.model
        self._layers = (_Layer * len(base.layers))()
        for made, layer in zip(self._layers, base.layers, strict=True):
            for name in NAMES:
                owner = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
                setattr(made, name, getattr(owner, name).matrix)
            made.norm_in = layer.input_layernorm.weight.data_ptr()
            made.norm_post = layer.post_attention_layernorm.weight.data_ptr()
        sizes = (
            len(base.layers), config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self._model = _Model(
            self._layers, base.norm.weight.data_ptr(), model.lm_head.matrix, *sizes,
            config.rms_norm_eps, config.head_dim**-0.5,
        )  # fmt: skip
        heads, inner = config.num_attention_heads + config.num_key_value_heads, sizes[2]
        if model.lm_head.kind != "none":
            model.cache_dtype = torch.float16
        widest = max(config.hidden_size, inner, config.num_attention_heads * config.head_dim)
        widest += -widest % GROUP
        self._room_size = widest + 2 * heads * config.head_dim + 2 * inner

    @torch.inference_mode()
    def __call__(self, **kwargs: Any) -> Tensor:
        """Return logits `(B, kept, V)`; the arguments are those of the model."""
        ids_BT = kwargs["input_ids"]
        kept = kwargs.get("logits_to_keep", 0) or ids_BT.shape[1]
        is_whole = len(ids_BT) == 1 or kept == ids_BT.shape[1]
        found = self._places(kwargs, *ids_BT.shape) if is_whole else None
        if found is None:
            return _logits(self.model, kwargs)
        row_M, at_M, caches = found
        x_MD = self.model.model.embed_tokens(ids_BT.flatten())
        rotary = self.model.model.rotary_emb(x_MD, position_ids=at_M[None])
        cos, sin = (table.contiguous() for table in rotary)
        num_kept = len(ids_BT) * kept
        logits_MV = x_MD.new_empty(num_kept, self.model.lm_head.out_features)
        room = x_MD.new_empty(len(x_MD) * self._room_size)
        pointers = (_Pointer * len(caches))(*(part.data_ptr() for part in caches))
        load_kernels().minillm_llama(
            ctypes.byref(self._model), len(x_MD), num_kept, row_M.data_ptr(), at_M.data_ptr(),
            x_MD.data_ptr(), cos.data_ptr(), sin.data_ptr(), pointers,
            caches[0].shape[2], caches[0].dtype == torch.float16, room.data_ptr(),
            logits_MV.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        logits_BTV: Tensor = logits_MV.view(len(ids_BT), kept, -1)
        return logits_BTV

    def _places(
        self, kwargs: dict[str, Any], batch: int, length: int
    ) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """Return cache row and position of each token, and the caches; None: not for the kernel."""
        cache: Any = kwargs.get("past_key_values")
        layers: list[Any] = getattr(cache, "layers", [])[: len(self._layers)]
        if not layers:
            return None
        if isinstance(cache, SlotCache):
            if not all(layer.is_initialized for layer in layers):
                return None
            place = cache.place
            row_M = torch.arange(place.rows.start, place.rows.start + batch)
            row_M = row_M.repeat_interleave(length)
            at_M = torch.arange(place.start, place.start + length).repeat(batch)
            if place.at is not None:
                at_M = place.at[1].flatten()
            parts = [part for layer in layers for part in layer.room]
        else:
            is_known = all(type(layer) is ReservedLayer for layer in layers)
            if batch > 1 or not is_known or kwargs.get("attention_mask") is not None:
                return None
            start = layers[0].get_seq_length()
            row_M, at_M = torch.zeros(length, dtype=torch.long), start + torch.arange(length)
            parts = [part for layer in layers for part in layer.extend(length)]
        if int(at_M.max()) >= parts[0].shape[2]:
            return None  # the model says what is wrong
        return row_M, at_M.contiguous(), parts


def _logits(model: Any, kwargs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**kwargs).logits
    return logits
