"""Mixture of experts and Gated DeltaNet, forward and backward, against three ways to write them.

Ours, a loop (over experts; over the rows of a chunk, for the triangular system), and transformers'
own block with the same weights, in turns; the best of the turns counts. CPU, fp32 and bf16.

    python benchmarks/blocks.py [--turns 5] [--rows 4] [--length 512]
"""

import argparse
import datetime
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn

from minillm.device import describe
from minillm.models import gated_delta, registry

Step = Callable[[], None]


def loop_over_experts(x_BTD: Tensor, block: nn.Module) -> Tensor:
    """Multiply each expert's tokens on their own, and add the results up."""
    x_ND = x_BTD.flatten(0, 1)
    _, weight_NK, index_NK = block.gate(x_ND)
    out_ND = block.shared_expert_gate(x_ND).sigmoid() * block.shared_expert(x_ND)
    for e in range(block.experts.num_experts):
        token, slot = torch.where(index_NK == e)
        gate, up = F.linear(x_ND[token], block.experts.gate_up_proj[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, block.experts.down_proj[e])
        out_ND = out_ND.index_add(0, token, (y * weight_NK[token, slot, None]).to(y.dtype))
    return out_ND.view_as(x_BTD)


def solve_by_rows(a: Tensor, b: Tensor, **_: object) -> Tensor:
    """Invert a unit lower triangular matrix row by row, then multiply."""
    inverse = -a.tril(-1)
    for i in range(1, a.shape[-1]):
        row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return (inverse + torch.eye(a.shape[-1])) @ b


def step_of(block: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Step:
    """Return a function that does one forward and backward pass."""

    def step() -> None:
        block.zero_grad()
        forward(x).float().square().mean().backward()

    return step


def best_of_turns(steps: dict[str, Step], turns: int) -> dict[str, float]:
    """Return the shortest time of each in ms."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(turns + 1):  # the first is warm-up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - started) * 1e3)
    return best


def main() -> None:
    """Measure in turns and print Markdown rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    config = registry.build_config("mini_qwen3_next", vocab_size=64, num_hidden_layers=4)
    torch.manual_seed(0)
    print(
        "| block, forward + backward | ours ms | loop ms | transformers ms | loop / ours ", end=""
    )
    print("| transformers / ours | hardware | versions | date |\n|" + 9 * "---|")
    for dtype in (torch.float32, torch.bfloat16):
        ours = registry.build_model(config).to(dtype)
        official = ours.export_official()
        x = torch.randn(args.rows, args.length, config.hidden_size, dtype=dtype)
        moe, theirs = ours.model.layers[0].mlp, official.model.layers[0].mlp
        gdn, their_gdn = ours.model.layers[0].linear_attn, official.model.layers[0].linear_attn
        solve = torch.linalg.solve_triangular

        def by_rows(x: Tensor, gdn: nn.Module = gdn, solve: object = solve) -> Tensor:
            torch.linalg.solve_triangular = solve_by_rows
            try:
                return gdn(x)
            finally:
                torch.linalg.solve_triangular = solve

        blocks = {
            f"mixture, {config.num_experts} experts": {
                "ours": step_of(moe, x, moe),
                "loop": step_of(moe, x, lambda x, moe=moe: loop_over_experts(x, moe)),
                "transformers": step_of(theirs, x, theirs),
            },
            f"Gated DeltaNet, chunk {gated_delta.CHUNK}": {
                "ours": step_of(gdn, x, gdn),
                "loop": step_of(gdn, x, by_rows),
                "transformers": step_of(their_gdn, x, their_gdn),
            },
        }
        for name, steps in blocks.items():
            ms = best_of_turns(steps, args.turns)
            print(
                f"| {name}, {str(dtype)[6:]}, {args.rows} x {args.length} x {config.hidden_size} "
                f"| {ms['ours']:.0f} | {ms['loop']:.0f} | {ms['transformers']:.0f} "
                f"| {ms['loop'] / ms['ours']:.2f} | {ms['transformers'] / ms['ours']:.2f} "
                f"| {describe(torch.device('cpu'))} | torch {torch.__version__}, transformers "
                f"{transformers.__version__} | {datetime.date.today()} |"
            )


if __name__ == "__main__":
    main()
