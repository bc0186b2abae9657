"""Run a function in several processes that can reach each other: what distributed tests need.

The names are those that transformers' tests import. Everything is on the CPU, with gloo.
"""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = [
    "_get_distributed_backend",
    "_get_distributed_device_type",
    "_get_rank_device",
    "_set_rank_device",
    "_start_rank_processes",
    "run_distributed",
]

TIMEOUT = datetime.timedelta(seconds=120)


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> None:
    """Call `function(rank, *args)` in every process; a failure in one ends all."""
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="spawn")


def run_distributed(world_size: int) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Return what turns `function(rank, *args)` into a call of it by `world_size` processes."""

    def wrap(function: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                meeting = (Path(folder) / "meeting").as_uri()
                _start_rank_processes(_join, (world_size, meeting, function, args), world_size)

        return call

    return wrap


def _join(
    rank: int, world_size: int, meeting: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _set_rank_device(rank)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
