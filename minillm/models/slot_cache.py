"""A cache of many sequences that are at different lengths, each in a slot of its own.

What a layer remembers of all sequences is one tensor with a row for each slot. A model call works
on rows next to each other, as views: nothing is gathered, and a token is one small write. Two
kinds of calls: `begin_batch`, some tokens of each of the first B slots; `begin_chunk`, many tokens
of one slot. On a CPU the memory of a row is real only as far as it has been written.

B batch · T query positions · S key positions · G key/value heads · K head size · W convolution
"""

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from minillm.models.base import MiniPreTrainedModel


class Place:
    """Which rows and positions the next call is about; shared by all layers."""

    rows = slice(0, 0)
    start = 0
    """Tokens before, where all rows have as many."""
    length = 0
    """S: keys that a query may see."""
    at: tuple[Tensor, Tensor] | None = None
    """Rows `(B, 1)` and positions `(B, T)` of new tokens, if they do not all go to `start`."""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`; on a CPU a page becomes memory only when it is written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < mmap.PAGESIZE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(*shape)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one attention layer, `(slots, G, capacity, K)`."""

    is_sliding = False
    room: tuple[Tensor, Tensor]

    def __init__(
        self, place: Place, num_slots: int, capacity: int, dtype: torch.dtype | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.place, self.num_slots, self.capacity = place, num_slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for heads like these."""
        keys, values = (
            zeros(
                (self.num_slots, x.shape[1], self.capacity, x.shape[3]),
                self.dtype or x.dtype,
                x.device,
            )
            for x in (key_states, value_states)
        )
        self.room, self.is_initialized = (keys, values), True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `(B, G, T, K)` to their places; return all that the rows may see, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, (keys, values) = self.place, self.room
        if place.at is None:
            new = slice(place.start, place.start + key_states.shape[2])
            keys[place.rows, :, new] = key_states
            values[place.rows, :, new] = value_states
        else:
            rows_B1, positions_BT = place.at
            at = rows_B1, slice(None), positions_BT
            keys[at] = key_states.transpose(1, 2)
            values[at] = value_states.transpose(1, 2)
        seen = place.rows, slice(None), slice(place.length)
        return keys[seen].to(key_states.dtype), values[seen].to(value_states.dtype)

    def get_seq_length(self) -> int:
        """Tokens before, for the model to make its mask."""
        return self.place.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys."""
        return self.place.start + query_length, 0

    def get_max_length(self) -> int:
        """Return the longest a sequence can be."""
        return self.capacity

    @property
    def parts(self) -> list[tuple[Tensor, bool]]:
        """Tensors with a row for each slot, and whether dimension 2 is the position."""
        return [(x, True) for x in self.room] if self.is_initialized else []


class SlotStateLayer(LinearAttentionCacheLayerMixin):
    """Convolution input and memory of one Gated DeltaNet layer, a row for each slot."""

    conv_room: Tensor
    state_room: Tensor

    def __init__(self, place: Place, num_slots: int) -> None:
        super().__init__()
        self.place, self.num_slots = place, num_slots
        self.has_conv = self.has_memory = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: memory is taken when the sizes are known."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the last W inputs and the new ones `(B, channels, T)`; remember the last W."""
        width = conv_kernel_size or conv_states.shape[-1]
        if not self.has_conv:
            shape = self.num_slots, conv_states.shape[1], width
            self.conv_room = zeros(shape, conv_states.dtype, conv_states.device)
            self.has_conv = True
        rows = self.conv_room[self.place.rows]
        seen = torch.cat((rows, conv_states), dim=-1)
        rows.copy_(seen[..., -width:])
        return seen

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Remember `(B, H, K, V)`."""
        if not self.has_memory:
            shape = self.num_slots, *recurrent_states.shape[1:]
            self.state_room = zeros(shape, recurrent_states.dtype, recurrent_states.device)
            self.has_memory = True
        rows = self.state_room[self.place.rows]
        return rows.copy_(recurrent_states)

    @property
    def parts(self) -> list[tuple[Tensor, bool]]:
        """Tensors with a row for each slot, and whether dimension 2 is the position."""
        return [(self.conv_room, False), (self.state_room, False)] if self.has_memory else []


class SlotCache(Cache):
    """The cache of an engine."""

    def __init__(self, model: Any, num_slots: int, capacity: int, num_extra: int = 0) -> None:
        """Reserve nothing yet: each layer does at its first call.

        Args:
            model: A causal LM for which `supports` holds.
            num_slots: Sequences at a time.
            capacity: Longest sequence, in tokens.
            num_extra: Attention layers after those of the model itself.
        """
        self.place = Place()
        self.num_slots, self.capacity = num_slots, capacity
        linear = layer_kinds(model) or []
        layers: list[Any] = [
            SlotStateLayer(self.place, num_slots)
            if is_linear
            else SlotLayer(self.place, num_slots, capacity, getattr(model, "cache_dtype", None))
            for is_linear in linear + [False] * num_extra
        ]
        super().__init__(layers=layers)
        self.slot_layers: list[SlotLayer | SlotStateLayer] = layers

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the memory of the rows at work; None before the very first call."""
        layer = self.slot_layers[layer_idx]
        assert isinstance(layer, SlotStateLayer)
        return layer.state_room[self.place.rows] if layer.has_memory else None

    def begin_batch(self, lengths: Sequence[int], num_new: int) -> Any:
        """Say that the next call is about `num_new` tokens of each of the first slots.

        Args:
            lengths: Tokens that each has before.
            num_new: T.

        Returns:
            `position_ids` `(B, T)`, and the mask `(B, 1, T, S)`, true where a query sees a key; or
            None where a query sees all.
        """
        place, device = self.place, self.device
        place.rows, place.start = slice(0, len(lengths)), lengths[0]
        place.length = max(lengths) + num_new
        positions_B1 = torch.tensor(lengths, device=device).unsqueeze(1)
        positions_BT = positions_B1 + torch.arange(num_new, device=device)
        place.at = torch.arange(len(lengths), device=device).unsqueeze(1), positions_BT
        if min(lengths) == max(lengths):
            place.at = None  # one piece: written by slices
            if num_new == 1:
                return positions_BT, None
        keys_S = torch.arange(place.length, device=device)
        return positions_BT, (keys_S <= positions_BT.unsqueeze(-1)).unsqueeze(1)

    def begin_chunk(self, slot: int, start: int, num_new: int) -> Tensor:
        """Say that the next call is about `num_new` tokens of one slot after `start` others.

        Returns:
            `position_ids` `(1, T)`; the model makes its mask itself.
        """
        place = self.place
        place.rows, place.start, place.length = slice(slot, slot + 1), start, start + num_new
        place.at = None
        return torch.arange(start, start + num_new, device=self.device).unsqueeze(0)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next((part.device for part, _ in self.parts()), torch.device("cpu"))

    def parts(self) -> list[tuple[Tensor, bool]]:
        """Tensors with a row for each slot, and whether dimension 2 is the position."""
        return [part for layer in self.slot_layers for part in layer.parts]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens, and the state, of one slot over another's."""
        for part, is_long in self.parts():
            end = length if is_long else None
            part[target, :, :end] = part[source, :, :end]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` tokens, and the states, of two slots."""
        for part, is_long in self.parts():
            end = length if is_long else None
            kept = part[first, :, :end].clone()
            part[first, :, :end] = part[second, :, :end]
            part[second, :, :end] = kept

    def reset(self, slot: int | None = None) -> None:
        """Forget the state of a slot, or of all. Keys need not be forgotten: none is seen twice."""
        for part, is_long in self.parts():
            if not is_long:
                part[slice(None) if slot is None else slot].zero_()

    def read_tokens(self, slot: int, start: int, end: int) -> list[Tensor]:
        """Return copies of keys and values of some tokens."""
        return [part[slot, :, start:end].clone() for part, is_long in self.parts() if is_long]

    def write_tokens(self, slot: int, start: int, end: int, tokens: Sequence[Tensor]) -> None:
        """Put back what `read_tokens` gave."""
        long = (part for part, is_long in self.parts() if is_long)
        for part, x in zip(long, tokens, strict=True):
            part[slot, :, start:end] = x

    def read_state(self, slot: int) -> list[Tensor]:
        """Return a copy of the recurrent state."""
        return [part[slot].clone() for part, is_long in self.parts() if not is_long]

    def write_state(self, slot: int, state: Sequence[Tensor]) -> None:
        """Put back what `read_state` gave."""
        short = (part for part, is_long in self.parts() if not is_long)
        for part, x in zip(short, state, strict=True):
            part[slot] = x

    def size_of_token(self) -> int:
        """Return the bytes of one token in all layers."""
        return sum(x[0, :, 0].nbytes for x, is_long in self.parts() if is_long)

    def size_of_state(self) -> int:
        """Return the bytes of one sequence's recurrent state."""
        return sum(x[0].nbytes for x, is_long in self.parts() if not is_long)


def layer_kinds(model: Any) -> list[bool] | None:
    """Return for each layer whether it has a recurrent state; None if `SlotCache` cannot serve it.

    It serves plain attention of any model, and the Gated DeltaNet of ours.
    """
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    allowed: tuple[type, ...] = (DynamicLayer,)
    if isinstance(model, MiniPreTrainedModel):
        allowed = DynamicLayer, LinearAttentionLayer
    if not kinds or any(kind not in allowed for kind in kinds):
        return None
    return [kind is LinearAttentionLayer for kind in kinds]
