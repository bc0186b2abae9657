"""How large an engine's cache is, and the parts of an engine that fit a model."""

from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from transformers import PreTrainedModel

from minillm.errors import ConfigError
from minillm.models.slot_cache import layer_kinds
from minillm.serve.blocks import BlockPool
from minillm.serve.runner import Runner
from minillm.serve.scheduler import Scheduler

FREE_SHARE = 0.25
"""Of the free memory, for a cache whose size nobody has given."""

Speculate = Literal["off", "ngram", "mtp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes of an engine. 0 means: find a good one."""

    max_running: int = 16
    """Answers at a time."""
    cache_tokens: int = 0
    """Tokens that fit into the cache; 0: `max_running` times half the context, but at most a
    quarter of the memory that is free."""
    prefill_chunk: int = 256
    """Prompt tokens computed in one step, beside one token of each running answer."""
    block_size: int = 32
    """Tokens of a block of the cache: the unit of memory and of reuse."""
    keeps_prefixes: bool = True
    """Reuse what was computed for a prompt that begins alike."""
    speculate: Speculate = "off"
    """How to guess tokens ahead."""
    speculate_up_to: int = 2
    """Guess only while at most so many answers run: with more, guesses cost what they save."""


@dataclass(slots=True)
class EngineStats:
    """Gauges and counters of an engine, e.g. for `/metrics`."""

    running: int = 0
    """Answers in work."""
    waiting: int = 0
    """Answers in the queue."""
    cache_tokens: int = 0
    """Size of the cache."""
    cache_tokens_running: int = 0
    """Of these, held by answers in work."""
    cache_tokens_kept: int = 0
    """Of these, kept for prompts that begin alike."""
    prefix_hits: int = 0
    """Answers that found a part of their prompt computed."""
    prefix_tokens: int = 0
    """Prompt tokens that were found computed."""
    preemptions: int = 0
    """Times that an answer lost its place because the cache was full."""
    tokens_in: int = 0
    """Prompt tokens of all requests."""
    tokens_out: int = 0
    """Answer tokens."""
    drafts_proposed: int = 0
    """Tokens guessed ahead."""
    drafts_accepted: int = 0
    """Of these, right."""
    steps: int = 0
    """Steps of the engine."""


def supports_engine(model: PreTrainedModel) -> bool:
    """Tell whether an engine can run a model; else there is the `Generator`."""
    return layer_kinds(model) is not None


def has_mtp(model: PreTrainedModel) -> bool:
    """Tell whether a model has a block that predicts the token after the next."""
    config: Any = model.config
    return hasattr(type(model.base_model), "place") and getattr(config, "num_mtp_layers", 0) > 0


def fit(model: PreTrainedModel, settings: EngineSettings) -> tuple[Runner, Scheduler]:
    """Return a runner and a scheduler for a model.

    Raises:
        ConfigError: The model has no block to guess with, or a size is not possible.
    """
    if settings.speculate == "mtp" and not has_mtp(model):
        raise ConfigError(
            "`--speculate mtp` needs a model with multi-token prediction",
            hint="mini_deepseekv3 has it; for any other model: `--speculate ngram`",
        )
    if min(settings.max_running, settings.prefill_chunk, settings.block_size) < 1:
        raise ConfigError("`max_running`, `prefill_chunk` and `block_size` must be at least 1")
    context, size = int(model.config.max_position_embeddings), settings.block_size
    given = max(1, settings.cache_tokens // size)
    runner = Runner(
        model,
        num_slots=settings.max_running,
        max_tokens=min(context, given * size) if settings.cache_tokens else context,
        uses_mtp=settings.speculate == "mtp",
        block_size=size,
    )
    block_bytes = runner.cache.size_of_token() * size
    wanted = max(context, settings.max_running * context // 2) // size
    has_room = int(FREE_SHARE * free_memory(model.device)) // block_bytes
    num_blocks = given if settings.cache_tokens else max(1, min(wanted, has_room))
    scheduler = Scheduler(
        BlockPool(num_blocks, size, -(-runner.cache.size_of_state() // block_bytes)),
        max_running=settings.max_running,
        prefill_chunk=settings.prefill_chunk,
        has_state=runner.has_state,
        keeps_prefixes=settings.keeps_prefixes,
    )
    return runner, scheduler


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
