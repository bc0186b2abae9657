"""Muon against torch's own, and against the singular values it promises."""

import pytest
import torch

from minillm.train.muon import Muon, orthogonalize

SHAPES = ((24, 24), (24, 64), (64, 24), (24, 64))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_keeps_the_directions_and_levels_the_singular_values(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix[None])[0]
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ vh.T  # diagonal if the singular vectors are kept
    diagonal = inner.diagonal()
    assert (inner - diagonal.diag()).abs().max() < 0.02
    # the bounds hold for singular values that are not tiny to begin with
    kept = torch.linalg.svdvals(matrix) > 0.1 * torch.linalg.svdvals(matrix).max()
    assert diagonal[kept].min() > 0.6
    assert diagonal.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_equal_torch_muon_up_to_its_bf16(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    start = [parameter.detach().clone() for parameter in ours]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1, dtype=dtype)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        # bf16 keeps 8 bits, 0.4 %; five Newton-Schulz steps add up to about 1 %
        assert (mine - other).norm() / (other - before).norm() < 0.02
