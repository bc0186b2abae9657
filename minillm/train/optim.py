"""Parameter groups and optimizers, and their state as named tensors.

Muon (`minillm.train.muon`) updates the weight matrices inside the blocks and the stacks of
matrices of experts, AdamW the embeddings, the head, vectors and whatever else is not a matrix.
Weight decay applies to the matrices only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minillm.device import has_bf16
from minillm.models.moe import Experts
from minillm.settings import OptimConfig
from minillm.train.distributed import like, whole
from minillm.train.lora import is_adapter
from minillm.train.muon import Muon

_MUON_LR, _ADAMW_LR = 3.0, 0.75
"""Rate times width, where the matrices are Muon's and where they are AdamW's."""


def build_optimizers(
    model: nn.Module,
    cfg: OptimConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Optimizer]:
    """Return the optimizers of a run in `dtype`; each group keeps its peak rate as `peak_lr`."""
    matrices, others = split_parameters(model)
    fused = device.type in ("cuda", "cpu")
    groups = [{"params": others, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = []
    if cfg.optimizer == "muon" and matrices:
        own = dtype if has_bf16(device) else torch.float32
        decay = cfg.weight_decay
        optimizers.append(Muon(matrices, lr=cfg.muon_lr, weight_decay=decay, dtype=own))
    else:
        groups.append({"params": matrices, "weight_decay": cfg.weight_decay})
    optimizers.append(AdamW(groups, lr=pick_lr(model, cfg), betas=cfg.betas, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def pick_lr(model: nn.Module, cfg: OptimConfig) -> float:
    """Return AdamW's peak rate: the one asked for, or one that falls with the model's width.

    What matters is the table that is embedding and head at once: the wider it is, the further
    equal steps of its entries move a logit. Measured at a width of 128 only (docs/log.md).
    """
    if cfg.lr:
        return cfg.lr
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    width = next(tables).embedding_dim
    return (_MUON_LR if cfg.optimizer == "muon" else _ADAMW_LR) / width


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices inside blocks, everything else), each trained parameter once."""
    outer = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear):
        outer |= {id(parameter) for parameter in head.parameters()}
    stacks = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_adapter(name):  # products of two: what Muon evens out is not theirs to lose
            others.append(parameter)
            continue
        is_matrix = id(parameter) in stacks or (parameter.ndim == 2 and id(parameter) not in outer)
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def set_lr(optimizers: Sequence[Optimizer], share: float) -> None:
    """Set each group's rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return every state tensor in one piece, named `<optimizer>.<parameter>.<key>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{index}.{names[id(parameter)]}.{key}": whole(value)
        for index, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        index, rest = full_name.split(".", 1)
        name, key = rest.rsplit(".", 1)
        parameter = parameters[name]
        # AdamW counts steps in a CPU tensor unless fused on CUDA; moments live beside the weight
        target = like(value.to(parameter.device), parameter) if value.ndim else value
        optimizers[int(index)].state[parameter][key] = target
