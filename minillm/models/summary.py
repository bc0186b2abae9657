"""What a model is made of, in numbers: sizes, work and memory for a token, and the layer table.

Everything is read off the model itself on the meta device, where tensors have shapes and no
memory, so that no architecture needs a formula of its own and a large one is as quick as a small.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from minillm.errors import ConfigError
from minillm.models import registry
from minillm.models.base import ParamCount

CACHE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """Numbers of one model."""

    name: str
    params: ParamCount
    flops: float
    """FLOPs of a token in training, forward and backward."""
    cache_bytes: int
    """What a token adds to the cache of a sequence, in bf16."""
    state_bytes: int
    """What a sequence takes whatever its length: convolution and recurrent states."""


@dataclass(frozen=True, slots=True)
class Row:
    """Modules of one kind: the same name in `count` layers."""

    module: str
    shape: tuple[int, ...]
    params: int
    """Of one of them."""


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that are built alike, or (`layers` empty) what lies outside of layers."""

    layers: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """E.g. `layers 0-2, 4-6`."""
        return f"layers {_ranges(self.layers)}" if self.layers else ""


def load_config(source: str) -> PreTrainedConfig:
    """Return the config of a model by name, or of a folder with a `config.json`.

    Raises:
        ConfigError: There is no such model.
    """
    if (Path(source) / "config.json").is_file():
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, local_files_only=True)
        return config
    return registry.build_config(source)


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        return registry.build_model(config)


def summarize(name: str, seq_len: int) -> ModelSummary:
    """Return the numbers of the model called `name`.

    Args:
        name: As for `load_config`.
        seq_len: Context at which attention is counted.

    Raises:
        ConfigError: There is no such model, or `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ConfigError(
            f"`--seq-len` must be positive, got {seq_len}", hint="try `--seq-len 1024`"
        )
    config = load_config(name)
    config.dtype = CACHE_DTYPE
    with init.no_init_weights():
        model: Any = build_on_meta(config)
    model.tie_weights()  # which goes with the initial values that are left out
    return ModelSummary(
        name, model.param_count(), model.flops_per_token(seq_len), *model.cache_bytes()
    )


def layer_table(model: PreTrainedModel) -> list[Block]:
    """Return every parameter once, layers that are alike together, in the order of the model."""
    outside: list[Row] = []
    layers: dict[str, list[Row]] = {}
    order: list[str | None] = []  # where layers stand among the rest
    for name, parameter in model.named_parameters():
        shape, size = tuple(parameter.shape), parameter.numel()
        found = re.match(r"((?:.*\.)?layers\.\d+)\.(.*)", name)
        if found is None:
            order.append(None)
            outside.append(Row(name, shape, size))
        else:
            prefix, rest = found.groups()
            if prefix not in layers:
                order.append(prefix)
            layers.setdefault(prefix, []).append(Row(rest, shape, size))
    return _arrange(order, outside, layers)


def _arrange(
    order: list[str | None], outside: list[Row], layers: dict[str, list[Row]]
) -> list[Block]:
    """Put single rows and layers in order; alike layers stand where the first of them does."""
    alike: dict[tuple[Row, ...], list[int]] = {}
    for prefix, rows in layers.items():
        alike.setdefault(tuple(rows), []).append(int(prefix.rsplit(".", 1)[1]))
    blocks: list[Block] = []
    rest = iter(outside)
    for place in order:
        if place is None:
            blocks.append(Block((), (next(rest),)))
            continue
        like = tuple(layers[place])
        if like in alike:
            blocks.append(Block(tuple(alike.pop(like)), like))
    return blocks


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write ascending numbers as ranges.

    >>> _ranges((0, 1, 2, 4, 6, 7))
    '0-2, 4, 6-7'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
