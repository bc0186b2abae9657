"""Linear layers with packed weights, for decoding on a CPU: fp32, fp16, int8 or int4.

Decoding reads every weight once for each token, so bytes are time. int8 and int4 round groups of
32 weights of a row to 255 or 16 even steps (as GGUF's q8_0 and q4_1 do, 8.5 and 5 bits a weight),
and 32 numbers of what goes in to 16 bits, for products of whole numbers; sums are fp32. Embeddings,
norms, routers and experts stay as they are. Beside fewer bits the caches of a Llama keep keys and
values as fp16.

N rows · K columns · P panels of 16 rows · G groups of 32 columns
"""

import contextlib
import ctypes
import mmap
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import ConfigError
from minillm.models.cpu_kernels import Matrix, load_kernels

Kind = Literal["none", "fp16", "int8", "int4"]
KINDS = {"none": 0, "fp16": 1, "int8": 2, "int4": 3}
ROWS, GROUP = 16, 32
CHUNK = 64 << 20
"""Bytes taken from the system at a time."""
KEPT = ("kv_b_proj", "shared_expert_gate")
"""Layers whose weight the model reads itself, or that are too small to matter."""


class Arena:
    """Memory for packed weights, in pages of 2 MiB where the system has them.

    Reading it once for each token is what decoding on a CPU waits for; small pages cost up to a
    fifth of the bandwidth (docs/log.md).
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, packed: Tensor) -> Tensor:
        """Return a copy of some bytes in this memory; the bytes themselves if there is none."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
            return packed
        size = packed.nbytes
        if size > len(self._free):
            room = mmap.mmap(-1, max(size, CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without them: small pages
                room.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(room, dtype=torch.uint8)
        kept, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return kept.copy_(packed.flatten()).view_as(packed)


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, with the layout of `cpu_linear.h`."""

    packed: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind, arena: Arena | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.kind = (*linear.weight.shape, kind)
        packed = pack(linear.weight.detach().float(), kind)
        self.register_buffer("packed", arena.keep(packed) if arena else packed, persistent=False)
        self.bias = linear.bias
        self.matrix = Matrix(self.packed.data_ptr(), *linear.weight.shape, KINDS[kind])

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., K)` to `(..., N)`."""
        rows = x.reshape(-1, self.in_features).float().contiguous()
        y = rows.new_empty(len(rows), self.out_features)
        load_kernels().minillm_linear(
            ctypes.byref(self.matrix), rows.data_ptr(), y.data_ptr(), len(rows),
            torch.get_num_threads(),
        )  # fmt: skip
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Show sizes and kind when printed."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def pack(weight_NK: Tensor, kind: Kind) -> Tensor:
    """Return the bytes of a matrix, `(P, bytes of a panel)`; `cpu_linear.h` says in which order."""
    codes, *heads = _round(weight_NK, kind)
    if kind in ("none", "fp16"):
        return codes.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(1)
    pairs = codes.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4).contiguous()  # (P, G, 16, 16, 2)
    if kind == "int4":
        pairs = pairs[:, :, :8] | pairs[:, :, 8:] << 4
    head_PB = torch.stack(heads).permute(1, 3, 0, 2).contiguous().view(torch.uint8).flatten(1)
    head_PB = F.pad(head_PB, (0, -head_PB.shape[1] % 64))
    return torch.cat((head_PB, pairs.view(torch.uint8).flatten(1)), dim=1)


def rounded(weight_NK: Tensor, kind: Kind) -> Tensor:
    """Return the weights that a packed matrix stands for, fp32."""
    codes, *heads = (part.float() for part in _round(weight_NK.float(), kind))
    for number, head in enumerate(heads):
        codes = codes * head.unsqueeze(-1) if number == 0 else codes + head.unsqueeze(-1)
    rows, columns = weight_NK.shape
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def rounded_input(x: Tensor, kind: Kind) -> Tensor:
    """Return what the products of codes see of an input `(..., K)`: groups of 32 in 16 bits."""
    if kind in ("none", "fp16"):
        return x
    x_G = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    reach = x_G.abs().amax(-1, keepdim=True)
    codes = (x_G * (reach.new_tensor(32767.0) / reach.clamp(min=1e-30))).round()
    seen: Tensor = (codes * (reach / 32767)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return seen


def _round(weight_NK: Tensor, kind: Kind) -> list[Tensor]:
    """Return codes `(P, 16, G, 32)`, and scales and minima `(P, 16, G)` where there are any."""
    rows, columns = weight_NK.shape
    w = F.pad(weight_NK, (0, -columns % GROUP, 0, -rows % ROWS))
    w = w.unflatten(1, (-1, GROUP)).unflatten(0, (-1, ROWS))
    if kind in ("none", "fp16"):
        return [w if kind == "none" else w.half()]
    low = w.amin(-1).half() if kind == "int4" else torch.zeros_like(w[..., 0]).half()
    steps = 15 if kind == "int4" else 127
    reach = w.amax(-1) - low.float() if kind == "int4" else w.abs().amax(-1)
    scale = (reach / steps).half()
    codes = (w - low.float().unsqueeze(-1)) / scale.float().clamp(min=1e-8).unsqueeze(-1)
    codes = codes.round().clamp(0 if kind == "int4" else -127, steps)
    if kind == "int8":
        return [codes.to(torch.int8), scale]
    return [codes.to(torch.uint8), scale, low]


def quantize_model(model: Any, kind: Kind) -> Any:
    """Pack the linear layers of a model on a CPU, in place, and return it.

    `none` packs fp32 as it is, for speed. Without a compiler the weights are rounded alike and
    stay in fp32: the same answers, without the gain.

    Raises:
        ConfigError: The model is not on a CPU.
    """
    if model.device.type != "cpu":
        if kind == "none":
            return model
        raise ConfigError(
            f"`--quantize {kind}` is for CPUs, the model is on `{model.device.type}`",
            hint="try `--device cpu`, or leave `--quantize` out",
        )
    if kind == "none" and model.dtype != torch.float32:
        return model
    model = model.float()  # what stays: embeddings, norms
    arena = Arena()
    has_kernels = load_kernels() is not None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name in KEPT:
                continue
            if has_kernels:
                setattr(parent, name, PackedLinear(child, kind, arena))
            elif kind != "none":  # a new parameter: a tied head must not change the embedding
                made = rounded(child.weight.detach(), kind).to(child.weight.dtype)
                child.weight = nn.Parameter(made, requires_grad=False)
                child.register_forward_pre_hook(lambda _, args: rounded_input(args[0], kind))
    return model
