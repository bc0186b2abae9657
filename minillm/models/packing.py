"""Which document of a packed row each token belongs to.

B batch · T positions
"""

import torch
from torch import Tensor


def document_positions(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    """Return `(B, T)` positions that restart at each of the cumulative lengths `[0, n1, ...]`.

    They count over all tokens, row by row.
    """
    place_N = torch.arange(batch * length, device=cu_seq_lens.device)
    document_N = torch.searchsorted(cu_seq_lens, place_N.to(cu_seq_lens.dtype), right=True) - 1
    return (place_N - cu_seq_lens[document_N]).view(batch, length)


def documents(position_ids: Tensor) -> Tensor:
    """Return a number for each token's document: positions that do not go on start a new one."""
    is_start = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return is_start.cumsum(-1)


def segments_if_packed(position_ids_BT: Tensor) -> Tensor | None:
    """Return segment ids, or None where it costs nothing to see that there is one document."""
    segment_BT = documents(position_ids_BT)
    can_look = not torch.compiler.is_compiling() and segment_BT.device.type == "cpu"
    return None if can_look and not segment_BT.any() else segment_BT
