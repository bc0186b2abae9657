"""Muon, batched: momentum whose matrices are made orthogonal before each update.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). `torch.optim.Muon` does the same one matrix
at a time and always in bf16, which a CPU without bf16 arithmetic emulates: there it is 30 times
slower than the forward and backward pass of a small model. Here matrices of one shape go through
one batched product, in the dtype of the run: a run in fp32 is fp32 here too. The price is one copy
of the momentum while a shape is worked on.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from minillm.train.distributed import like, local

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(Optimizer):
    """Muon for matrices and stacks of them, such as experts.

    Args:
        params: Matrices (out, in), or stacks (N, out, in).
        lr: Learning rate; each update has spectral norm about `lr * sqrt(max(1, out / in))`.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum.
        dtype: Of the products that make matrices orthogonal.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for same in by_shape.values():
                self._update(same, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of one shape together."""
        momentum, lr = group["momentum"], group["lr"]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(local(state["momentum_buffer"]))
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        pieces = zip(nesterov, parameters, strict=True)
        whole = torch.stack([_whole(piece, p) for piece, p in pieces])
        updates = orthogonalize(whole.to(self.dtype)).to(whole.dtype)
        own = [local(like(u, p)) for u, p in zip(updates.unbind(), parameters, strict=True)]
        rows, columns = parameters[0].shape[-2:]
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, own, alpha=-lr * math.sqrt(max(1, rows / columns)))


def _whole(piece: Tensor, parameter: Tensor) -> Tensor:
    """Return the matrix of which `piece` is the part here: a single one's norm needs all of it."""
    if not isinstance(parameter, DTensor):
        return piece
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix towards 1 by five quintic Newton-Schulz steps.

    Args:
        matrices: (..., rows, columns).

    Returns:
        The same shape and dtype; singular values lie roughly within 0.7 and 1.2.
    """
    x = matrices.flatten(0, -3)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
