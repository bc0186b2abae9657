"""The experts of a mixture (Shazeer et al. 2017): many small SwiGLU layers, a few for each token.

Rows are sorted by expert, so that each expert multiplies one contiguous block; `grouped_mm` does
all blocks in one call, and sums over a token's experts run in a fixed order. No loop over experts
and no device-to-host copy: shapes depend on the number of tokens only, so that
`torch.compile(fullgraph=True)` takes it. The price is a copy of every row for each of its experts.

N tokens · K experts of a token · M = N * K rows · E experts · D model · F feed-forward
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.device import has_bf16
from minillm.models.gates import packed_swiglu
from minillm.models.train_kernels import compute_dtype, kernels_for, kernels_of

GATHER_ROWS = 32
"""Up to this many rows the GPU multiplies each by its own copy of the weights: decoding."""

TILE_ROWS = 64
"""What the rows of an expert are filled up to in bf16 on a CPU."""


class Experts(nn.Module):
    """`sum over k of weight[n, k] * expert[index[n, k]](x[n])`, with packed weights."""

    def __init__(self, num_experts: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))

    def forward(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Map `(N, D)` to `(N, D)`."""
        num_per_token = index_NK.shape[1]
        expert_M = index_NK.flatten()
        if x_ND.is_cuda and len(expert_M) <= GATHER_ROWS and not torch.is_grad_enabled():
            x_MD = x_ND.repeat_interleave(num_per_token, dim=0)
            h_MF = packed_swiglu(_row_mm(x_MD, self.gate_up_proj, expert_M))
            y_NKD = _row_mm(h_MF, self.down_proj, expert_M).unflatten(0, (-1, num_per_token))
            return self._mix(y_NKD, weight_NK, x_ND)

        # 1. rows in the order of their experts; `place` is where each row went
        sorted_M, order_M = expert_M.sort(stable=True)
        rows_M = torch.arange(len(order_M), device=order_M.device)
        place_M = torch.empty_like(order_M).scatter(0, order_M, rows_M)
        experts_E = torch.arange(self.num_experts, device=order_M.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)

        kernels = kernels_for(x_ND) if torch.is_grad_enabled() else None
        is_mixed = kernels is not None and weight_NK.dtype == torch.float32
        if is_mixed and compute_dtype(x_ND) == torch.bfloat16:
            place_M, order_M, ends_E = _pad_blocks(place_M, expert_M, ends_E)

        # 2. every expert on its block
        x_MD = _TakeRows.apply(x_ND, order_M // num_per_token, place_M, num_per_token)  # type: ignore[no-untyped-call]
        h_MF = packed_swiglu(grouped_mm(x_MD, self.gate_up_proj, ends_E))
        y_MD = grouped_mm(h_MF, self.down_proj, ends_E)

        # 3. back in the order of the tokens
        if is_mixed:
            out_ND: Tensor = _Mix.apply(y_MD, place_M, weight_NK)  # type: ignore[no-untyped-call]
            return out_ND.to(x_ND.dtype)
        y_MD = _TakeRows.apply(y_MD, place_M, order_M, 1)  # type: ignore[no-untyped-call]
        return self._mix(y_MD.unflatten(0, (-1, num_per_token)), weight_NK, x_ND)

    def _mix(self, y_NKD: Tensor, weight_NK: Tensor, x_ND: Tensor) -> Tensor:
        # router weights are fp32, and so is the sum
        return (y_NKD * weight_NK.unsqueeze(-1)).sum(1).to(x_ND.dtype)

    def extra_repr(self) -> str:
        """Show the shape when printed."""
        size, inner = self.down_proj.shape[1:]
        return f"{self.num_experts} x ({size} -> {inner} -> {size})"


def grouped_mm(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows `ends[e - 1]` to `ends[e]` of `x` by `weight[e].T`, for every expert e.

    PyTorch's own operation needs rows of whole 16 bytes, its compiler knows it in bf16 only, and a
    CPU that has no bf16 takes a hundred times longer in it than in fp32; there a custom operation
    does the same.
    """
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):  # which does not know grouped_mm either
        dtype = torch.get_autocast_dtype(device)
        x_MD, weight_EFD = x_MD.to(dtype), weight_EFD.to(dtype)
    x_MD = x_MD.to(weight_EFD.dtype)
    is_half = x_MD.dtype == torch.bfloat16
    is_known = _is_fast_in_bf16(device) if is_half else not torch.compiler.is_compiling()
    if is_known and all(n * x_MD.element_size() % 16 == 0 for n in weight_EFD.shape[1:]):
        return F.grouped_mm(x_MD, weight_EFD.mT, offs=ends_E)
    y_MF: Tensor = _grouped_mm(x_MD, weight_EFD, ends_E)
    return y_MF


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_fast_in_bf16(device: str) -> bool:
    return device != "cpu" or has_bf16(torch.device(device))


def _pad_blocks(place_M: Tensor, expert_M: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengthen each expert's block to a multiple of `TILE_ROWS`, for bf16 on a CPU.

    oneDNN makes code for every size that it sees, at half a millisecond and half a megabyte each,
    and an expert's rows are others at every step.

    Returns:
        The new `place` and `ends`, and between them the row that lies at each place; where there
        is none, the first, of which nothing comes.
    """
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    room_E = (sizes_E + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    new_ends_E = room_E.cumsum(0, dtype=torch.int32)
    place_M = place_M + (new_ends_E - room_E - ends_E + sizes_E)[expert_M]
    order_P = place_M.new_zeros(int(new_ends_E[-1]))
    order_P[place_M] = torch.arange(len(place_M))
    return place_M, order_P, new_ends_E


class _Mix(torch.autograd.Function):
    """Weighted sum over a token's experts, from where their rows are: for training on a CPU."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, place_M: Tensor, weight_NK: Tensor) -> Tensor:
        """Return `(N, D)`."""
        y_MD, weight_NK = y_MD.contiguous(), weight_NK.contiguous()
        ctx.save_for_backward(y_MD, place_M, weight_NK)
        out_ND = y_MD.new_empty(len(weight_NK), y_MD.shape[1])
        kernels_of(y_MD).mix(y_MD, place_M, weight_NK, out_ND, *weight_NK.shape, y_MD.shape[1])
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, None, Tensor]:
        """Return the gradients of the rows and the weights."""
        y_MD, place_M, weight_NK = ctx.saved_tensors
        is_padded = len(y_MD) > len(place_M)  # rows without a place have a gradient of 0
        dy_MD = (torch.zeros_like if is_padded else torch.empty_like)(y_MD)
        dw_NK = torch.empty_like(weight_NK)
        given = y_MD, place_M, weight_NK, g_ND.contiguous(), dy_MD, dw_NK
        kernels_of(y_MD).mix_backward(*given, *weight_NK.shape, y_MD.shape[1])
        return dy_MD, None, dw_NK


def _row_mm(x_MD: Tensor, weight_EFD: Tensor, expert_M: Tensor) -> Tensor:
    """Multiply each row by the weights of its expert."""
    return torch.bmm(weight_EFD[expert_M], x_MD.unsqueeze(-1).to(weight_EFD.dtype)).squeeze(-1)


class _TakeRows(torch.autograd.Function):
    """`x[index]`, where every row is taken `times` times; the gradient is a gather and a sum.

    Indexing's own gradient adds rows in no fixed order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_M: Tensor, place_M: Tensor, times: int) -> Tensor:
        """Return row `index[m]` as row m; `place` says where the copies of each row went."""
        ctx.save_for_backward(place_M)
        ctx.times = times
        return x_ND.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, g_MD: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the sum of the gradients of each row's copies."""
        (place_M,) = ctx.saved_tensors
        g_MD = g_MD.index_select(0, place_M)
        return g_MD.unflatten(0, (-1, ctx.times)).sum(1), None, None, None


def _blocks(x: Tensor, weight: Tensor, ends: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield each expert that has rows, where they are, they and its weights; bf16 as fp32."""
    for e, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        if start < end:
            x_MD, weight_FD = x[start:end], weight[e]
            if x.dtype == torch.bfloat16 and not _is_fast_in_bf16(x.device.type):
                x_MD, weight_FD = x_MD.float(), weight_FD.float()
            yield e, slice(start, end), x_MD, weight_FD


@torch.library.custom_op("minillm::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y_MF = x.new_empty(x.shape[0], weight.shape[1])
    for _, rows, x_MD, weight_FD in _blocks(x, weight, ends):
        y_MF[rows] = x_MD @ weight_FD.T
    return y_MF


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("minillm::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(
    g: Tensor, x: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    dx_MD, dw_EFD = torch.empty_like(x), torch.zeros_like(weight)
    for e, rows, x_MD, weight_FD in _blocks(x, weight, ends):
        g_MF = g[rows].to(x_MD.dtype)
        dx_MD[rows] = g_MF @ weight_FD
        dw_EFD[e] = g_MF.T @ x_MD
    return dx_MD, dw_EFD


@_grouped_mm_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    dx_MD, dw_EFD = _grouped_mm_backward(g.contiguous(), *ctx.saved_tensors)
    return dx_MD, dw_EFD, None


_grouped_mm.register_autograd(_differentiate, setup_context=_keep)
