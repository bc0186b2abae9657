"""Several processes as one run: who is who, what they exchange, and how a model is spread.

The processes are started by `torchrun`, or by `minillm pretrain --nproc N`, which runs it. Every
process computes its own rows of a step; the sums that leave this module are the same on all.
"""

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from minillm.device import pick_device
from minillm.errors import MinillmError, RunError

_SYNC_BUFFERS = next(  # torch 2.13 has renamed it
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
JOIN_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for those on other machines to start."""
_LOST_WAIT_S = 10
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "rendezvous")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """The process that reports and writes files."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(total)
        return [float(value) for value in total]

    def share(self, value: Any) -> Any:
        """Return what the main process gave."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=_collective_device())
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def _collective_device() -> torch.device:
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


@contextmanager
def join_world(device_name: str) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that `torchrun` started; alone without it.

    Args:
        device_name: As for `pick_device`; on CUDA each process of a machine takes its own GPU.

    Raises:
        ConfigError: `device_name` is not a device.
        RunError: Another process of the run has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(device_name)
    if size == 1:
        yield World(), device
        return
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(device)
    try:
        _join("nccl" if device.type == "cuda" else "gloo", size)
        yield World(dist.get_rank(), size), device
    except MinillmError:
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in _LOST):
            raise
        # the first one to fail decides the exit code of the run, which is not this one
        time.sleep(_LOST_WAIT_S)
        raise RunError(
            "another process of this run has ended", hint="its own message is above"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(backend: str, size: int) -> None:
    """Meet the other processes.

    Raises:
        RunError: Not all have come in time.
    """
    try:
        store, rank, _ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    except RuntimeError as error:  # the store's error says how many have come
        if "joined" not in str(error) and "imed out" not in str(error):
            raise
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunError(
            f"the {size} processes of this run have not all come to {address} within "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s",
            hint="start the same command on every machine; each must reach that address",
        ) from error
    store.set_timeout(dist.default_pg_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


class Parallel:
    """A model spread over the processes: `ddp` copies it to each, `fsdp` gives each a part.

    Args:
        model: The model, on its device, equal on all processes.
        world: The processes.
        kind: `ddp` or `fsdp`.
        is_compiled: Compile the forward pass.
    """

    def __init__(self, model: nn.Module, world: World, kind: str, *, is_compiled: bool) -> None:
        self.world = world
        self.is_sharded = world.size > 1 and kind == "fsdp"
        self._ddp: DistributedDataParallel | None = None
        self._root: Any = model
        if self.is_sharded:
            device_type = next(model.parameters()).device.type
            mesh = init_device_mesh(device_type, (world.size,))
            for layer in model.get_submodule("model.layers").children():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model, FSDPModule)
        self.forward: Any = model
        if is_compiled:
            self.forward = torch.compile(model, fullgraph=not self.is_sharded, dynamic=False)
        if world.size > 1 and not self.is_sharded:
            # buffers count what each process saw: they are summed once a step, not overwritten
            options: dict[str, Any] = {_SYNC_BUFFERS: False}
            self._ddp = DistributedDataParallel(self.forward, **options)
            self.forward = self._ddp

    @contextmanager
    def synced(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients at the end of the block only if it is the last of a step."""
        if self._ddp is not None and not is_last:
            with self._ddp.no_sync():
                yield
            return
        if self.is_sharded:
            self._root.set_requires_gradient_sync(is_last)
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in one piece (all processes must ask), another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that is here, another as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model_tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process keeps of `model_tensor`: the way back."""
    if not isinstance(model_tensor, DTensor):
        return tensor
    mesh = model_tensor.device_mesh
    spread = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=model_tensor.placements)
