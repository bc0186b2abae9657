"""A key/value cache that writes in place instead of copying itself at every token.

transformers' `DynamicLayer` concatenates, so token n copies n keys and values; here the memory is
reserved once (and doubled if it ever runs out) and a token is one small write. Everything else
about it is a `DynamicLayer`: masks, cropping, beam search, resetting. The price is memory for
`capacity` tokens from the start, and that it is for inference only: no gradient passes through.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values of one attention layer, `(batch, heads, length, head size)`."""

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor]

    def __init__(self, capacity: int = 256, kept_as: torch.dtype | None = None, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept_as = kept_as
        self.capacity = max(1, capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve memory for a batch like this one."""
        key_states, value_states = self._round(key_states), self._round(value_states)
        super().lazy_initialization(key_states, value_states)
        self._room = self._allocate(key_states, value_states)
        self.keys, self.values = self._room[0][:, :, :0], self._room[1][:, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        dtype, start = key_states.dtype, self.get_seq_length()
        end = start + key_states.shape[-2]
        key_states, value_states = self._round(key_states), self._round(value_states)
        if not self._is_ours(key_states, start) or end > self._room[0].shape[2]:
            self._move(key_states, value_states, start, end)
        keys, values = self._room
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys.to(dtype), self.values.to(dtype)

    def extend(self, length: int) -> tuple[Tensor, Tensor]:
        """Make room for more tokens, and return all memory for the caller to write them to."""
        start = self.get_seq_length()
        end = start + length
        if not self._is_ours(self._room[0], start) or end > self._room[0].shape[2]:
            self._move(self._room[0], self._room[1], start, end)
        keys, values = self._room
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self._room

    def _round(self, x: Tensor) -> Tensor:
        return x if self.kept_as is None else x.to(self.kept_as)

    def _is_ours(self, key: Tensor, start: int) -> bool:
        """Tell whether the first `start` tokens lie in our memory, and `key` fits beside them.

        Beam search and the like replace `keys` by a tensor of their own.
        """
        room = self._room[0]
        fits = len(room) == len(key) and room.dtype == key.dtype
        return fits and (start == 0 or self.keys.data_ptr() == room.data_ptr())

    def _move(self, key: Tensor, value: Tensor, start: int, end: int) -> None:
        """Take new memory for `end` tokens and copy the first `start` into it."""
        while self.capacity < end:
            self.capacity *= 2
        self._room = self._allocate(key, value)
        if start:
            self._room[0][:, :, :start] = self.keys
            self._room[1][:, :, :start] = self.values

    def _allocate(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys = key.new_empty(*key.shape[:2], self.capacity, key.shape[-1])
        return keys, value.new_empty(*value.shape[:2], self.capacity, value.shape[-1])
