"""The gated delta rule (Yang et al. 2025, eq. 10), and the short convolution before it.

Each head keeps a matrix S that maps keys to values. A token first fades it, then corrects what S
has at the token's key towards the token's value, then reads at its query:

    S <- exp(g) S;   S <- S + k (beta (v - k^T S))^T;   out = q^T S / sqrt(K)

Decoding does just this. For many tokens at once the chunk form (Yang et al. 2024, section 3)
turns all corrections inside a chunk into one triangular matrix, inverted for all chunks at once;
then the chunks hand on S, with four matrix products each. All of it is fp32, as S forgets slowly
and sums of bf16 would not. `cpu_delta.py` does the same in C++, for training on a CPU.

Documents in one row: given segment ids, a token sees nothing of another segment, in the
convolution or in S. That is a mask on factors that are there anyway: shapes stay the same for
any documents.

B batch · T positions · G key heads · H = G * R value heads · K key size · V value size
N chunks · C positions of a chunk · D channels · W width of the convolution
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.models.cpu_delta import has_delta_kernel, train_delta_rule

CHUNK = {"cpu": 32}
"""Positions of a chunk, 64 elsewhere: fewer steps, but more work inside each."""
NOTHING = -40.0
"""Log decay that leaves nothing. Sums over a chunk stay small, and so do their rounding errors,
which else would blur the slow decay of the tokens that follow.
"""
RESET = -60.0
"""Log decay that forgets: exp(-60) is below the rounding of any sum."""


def short_conv(
    x_BTD: Tensor, weight_DW: Tensor, segment_BT: Tensor | None = None, num_past: int = 0
) -> Tensor:
    """Weigh each channel's last W values: `out[t] = sum over w of weight[W-1-w] x[t-w]`.

    A sum of shifted products: on a CPU several times faster than a depthwise `conv1d`, and a
    mask on each shift keeps documents apart.

    Args:
        x_BTD: Input; its first `num_past` positions are context and get no output.
        weight_DW: The last column weighs the token itself.
        segment_BT: Document of each position, or None for one; not together with a past.
        num_past: Positions before those asked for.
    """
    width = weight_DW.shape[1]
    length = x_BTD.shape[1] - num_past
    x_BTD = F.pad(x_BTD, (0, 0, width - 1 - num_past, 0))  # a negative number cuts
    if segment_BT is not None:
        before_BT = F.pad(segment_BT, (width - 1, 0), value=-1)
    out_BTD = x_BTD[:, width - 1 :] * weight_DW[:, width - 1]
    for shift in range(1, width):
        start = width - 1 - shift
        shifted_BTD = x_BTD[:, start : start + length]
        if segment_BT is not None:
            is_same_BT = before_BT[:, start : start + length] == segment_BT
            shifted_BTD = shifted_BTD * is_same_BT.unsqueeze(-1)
        out_BTD = torch.addcmul(out_BTD, shifted_BTD, weight_DW[:, start])
    return out_BTD


def gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    segment_BT: Tensor | None = None,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rule in the form that suits the number of tokens and the device.

    Args:
        q_BTGK: Queries, normalised here. Each serves the R value heads that follow each other.
        k_BTGK: Keys, normalised here.
        v_BTHV: Values.
        g_BTH: Log decay, at most 0.
        beta_BTH: Share of the correction, 0 to 1.
        segment_BT: Document of each token, or None for one; not together with a state.
        state_BHKV: S after the tokens before, or None.

    Returns:
        Output `(B, T, H, V)` in the dtype of `v`, and S after the last token, fp32.
    """
    with torch.autocast(v_BTHV.device.type, enabled=False):
        if v_BTHV.shape[1] == 1 and state_BHKV is not None:
            return recurrent_gated_delta_step(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV)
        kernel = _gpu_kernel() if _suits_gpu_kernel(v_BTHV) else None
        if kernel is not None:
            out_BTHV, state_BHKV = kernel(
                q_BTGK.to(v_BTHV.dtype),
                k_BTGK.to(v_BTHV.dtype),
                v_BTHV,
                g=forget_at_starts(g_BTH.float(), segment_BT),
                beta=beta_BTH.float(),
                initial_state=state_BHKV,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            return out_BTHV, state_BHKV
        if state_BHKV is None and has_delta_kernel(q_BTGK, k_BTGK, v_BTHV):
            return train_delta_rule(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, segment_BT)
        return chunk_gated_delta_rule(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            g_BTH,
            beta_BTH,
            segment_BT=segment_BT,
            state_BHKV=state_BHKV,
        )


def recurrent_gated_delta_step(
    q_B1GK: Tensor,
    k_B1GK: Tensor,
    v_B1HV: Tensor,
    g_B1H: Tensor,
    beta_B1H: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token, as in the equations at the top; arguments as `gated_delta_rule`."""
    ratio = v_B1HV.shape[2] // k_B1GK.shape[2]
    q_BHK = _unit(q_B1GK)[:, 0].repeat_interleave(ratio, dim=1) * q_B1GK.shape[-1] ** -0.5
    k_BHK = _unit(k_B1GK)[:, 0].repeat_interleave(ratio, dim=1)
    state_BHKV = state_BHKV.float() * g_B1H[:, 0].float().exp()[..., None, None]
    # what S has at the key and at the query, in one product
    read_BH2V = torch.stack((k_BHK, q_BHK), dim=2) @ state_BHKV
    found_BHV, read_BHV = read_BH2V.unbind(2)
    delta_BHV = (v_B1HV[:, 0].float() - found_BHV) * beta_B1H[:, 0].float().unsqueeze(-1)
    state_BHKV = state_BHKV + k_BHK.unsqueeze(-1) * delta_BHV.unsqueeze(-2)
    out_BHV = read_BHV + (q_BHK * k_BHK).sum(-1, keepdim=True) * delta_BHV
    return out_BHV.to(v_B1HV.dtype).unsqueeze(1), state_BHKV


def chunk_gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    segment_BT: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Any number of tokens; arguments as `gated_delta_rule`.

    Dimensions inside are (N, B, G, R, C, ...): what value heads share has R = 1. M = B * G * R.
    """
    length, ratio = v_BTHV.shape[1], v_BTHV.shape[2] // k_BTGK.shape[2]
    chunk = min(chunk or CHUNK.get(v_BTHV.device.type, 64), length)

    # 1. cut into chunks; padding has beta 0 and writes nothing
    q = _cut(_unit(q_BTGK) * q_BTGK.shape[-1] ** -0.5, 1, chunk)
    k = _cut(_unit(k_BTGK), 1, chunk)
    v = _cut(v_BTHV.float(), ratio, chunk)
    beta = _cut(beta_BTH.float().unsqueeze(-1), ratio, chunk)
    g = _cut(g_BTH.float().unsqueeze(-1), ratio, chunk).clamp(min=NOTHING)
    fade = g.cumsum(-2)  # since the chunk's start

    # 2. how much of token j is left at i, of the state at i, of j and of the state at the end
    sees, reads, writes, keeps = _who_sees_whom(segment_BT, chunk, fade)
    left_ij = (fade - fade.mT).masked_fill(~sees, -torch.inf).exp()
    left_read = fade.exp() * reads
    left_write = (fade[..., -1:, :] - fade).exp() * writes
    left_end = fade[..., -1:, :].exp() * keeps

    # 3. corrections of a chunk are `solved` times what its values lack
    qk, kk = (torch.cat((q, k), dim=-2) @ k.mT).split(chunk, dim=-2)
    solved = _Inverse.apply(kk * (left_ij * beta)) * beta.mT  # type: ignore[no-untyped-call]

    # 4. chunk by chunk: correct, then S <- end S + (k left)^T corrections
    if state_BHKV is None:
        state_MKV = v.new_zeros(v[0, ..., 0, 0].numel(), k.shape[-1], v.shape[-1])
    else:
        state_MKV = state_BHKV.float().flatten(0, 1)
    parts = v, k * left_read, solved, (k * left_write).mT, left_end
    states, corrections = [], []
    for v_MCV, read_MCK, solved_MCC, write_MKC, end_M11 in zip(
        *(part.flatten(1, 3).unbind() for part in parts), strict=True
    ):
        states.append(state_MKV)
        lack_MCV = torch.baddbmm(v_MCV, read_MCK, state_MKV, alpha=-1)
        corrections.append(solved_MCC @ lack_MCV)
        state_MKV = torch.baddbmm(state_MKV * end_M11, write_MKC, corrections[-1])

    # 5. read from the tokens of the chunk, and from S
    out = (qk * left_ij).flatten(0, 3) @ torch.cat(corrections)
    out = torch.baddbmm(out, (q * left_read).flatten(0, 3), torch.cat(states))
    out_BNCHV = out.view_as(v).permute(1, 0, 4, 2, 3, 5).flatten(3, 4)
    out_BTHV = out_BNCHV.flatten(1, 2)[:, :length]
    return out_BTHV.to(v_BTHV.dtype), state_MKV.unflatten(0, (len(v_BTHV), -1))


class _Inverse(torch.autograd.Function):
    """`(1 + a)^-1` for the part of `a` below the diagonal; d a = -x^T (d x) x^T there.

    A matrix is inverted once and then multiplied by, forward and backward: one triangular system
    with few columns costs more than a product with many.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Invert `(..., C, C)`."""
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        x: Tensor = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Return the gradient of `a`."""
        (x,) = ctx.saved_tensors
        d_a: Tensor = -(x.mT @ (g @ x.mT)).tril(-1)
        return d_a


def forget_at_starts(g_BTH: Tensor, segment_BT: Tensor | None) -> Tensor:
    """Let S fade to nothing before the first token of every document but the first.

    For kernels that know nothing of segments.
    """
    if segment_BT is None:
        return g_BTH
    is_start_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0))
    return g_BTH + RESET * is_start_BT.unsqueeze(-1)


def _unit(x: Tensor) -> Tensor:
    """Scale to length 1, in fp32."""
    x = x.float()
    unit: Tensor = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return unit


def _cut(x_BTHX: Tensor, ratio: int, chunk: int) -> Tensor:
    """`(B, T, G * R, X)` to `(N, B, G, R, C, X)`, zeros at the end."""
    x_BTHX = F.pad(x_BTHX, (0, 0, 0, 0, 0, -x_BTHX.shape[1] % chunk))
    x_BNCGRX: Tensor = x_BTHX.unflatten(2, (-1, ratio)).unflatten(1, (-1, chunk))
    return x_BNCGRX.permute(1, 0, 3, 4, 2, 5).contiguous()


def _who_sees_whom(
    segment_BT: Tensor | None, chunk: int, like: Tensor
) -> tuple[Tensor, Tensor | int, Tensor | int, Tensor | int]:
    """Return what segments allow, each to broadcast to `(N, B, G, R, C, C or 1)`.

    Token i sees token j of its chunk; i reads the state before the chunk; j writes to the state
    after it; the state before lives on after it.
    """
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=like.device).tril()
    if segment_BT is None:
        return lower, 1, 1, 1
    segment_BT = F.pad(segment_BT, (0, -segment_BT.shape[1] % chunk), value=-1)
    # the padding belongs to the last document, so that its state lives on to the end
    segment_BT = segment_BT.cummax(1).values
    segment = segment_BT.unflatten(1, (-1, chunk)).transpose(0, 1)[:, :, None, None, :, None]
    last = segment[..., -1:, :]
    before = torch.cat((torch.full_like(last[:1], -1), last[:-1]))
    return lower & (segment == segment.mT), segment == before, segment == last, last == before


def _suits_gpu_kernel(x: Tensor) -> bool:
    """Tell whether flash-linear-attention can take `x`; on a CPU it cannot even be asked."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and is_half and not torch.compiler.is_compiling()


@functools.cache
def _gpu_kernel() -> Callable[..., Any] | None:
    """Return the kernel of flash-linear-attention if that is installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    kernel: Callable[..., Any] = importlib.import_module(
        "fla.ops.gated_delta_rule"
    ).chunk_gated_delta_rule
    return kernel
