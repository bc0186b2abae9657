"""Experts and the gated delta rule, forward and backward, against loops and transformers' blocks.

Each row compares, in turns and with the same weights and inputs, four ways to compute the same:

ours          eager, and compiled (`torch.compile(fullgraph=True)`)
loop          for experts one over the experts; for the delta rule transformers' chunk form with
              the triangular system solved row by row, as it was before `solve_triangular`
transformers  its own block or function, eager, and compiled

"kernel" rows are the experts or the delta rule alone, "block" rows have the projections, the
router, the shared expert, the convolution and the norm around them. The floor is the time of the
matrix products alone at the speed of one large one. Times are the best of the turns.

    python benchmarks/blocks.py [--turns 5] [--dtypes float32 bfloat16] [--no-compile] [--only NAME]

`--cpu-time` counts the CPU time of one thread, for a machine that has other work to do as well.
"""

import argparse
import datetime
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from minillm.device import describe, has_bf16
from minillm.models import registry
from minillm.models.gated_delta import gated_delta_rule
from minillm.models.mini_qwen3_next_config import MiniQwen3NextConfig

Clock = Callable[[], float]
Ways = dict[str, Callable[[], Tensor]]
NAMES = ("ours", "ours compiled", "loop", "transformers", "transformers compiled")
SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    "published": (4, 512, {}),
    "many small experts": (
        2,
        256,
        {
            "hidden_size": 256,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
}
"""Rows, tokens of a row, and what differs from mini_qwen3_next."""


def loop_over_experts(experts: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply each expert's tokens on their own, and add the results up.

    Weights are taken apart once, as if each expert were a module of its own: indexing the packed
    tensor in the loop would fill its whole gradient once for every expert.
    """
    out_ND = torch.zeros_like(x_ND)
    weights = zip(experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    for e, (gate_up, down) in enumerate(weights):
        token, slot = torch.where(index_NK == e)
        if len(token):
            gate, up = F.linear(x_ND[token], gate_up).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down) * weight_NK[token, slot, None]
            out_ND.index_add_(0, token, y.to(x_ND.dtype))
    return out_ND


def loop_block(block: Any, x_BTD: Tensor) -> Tensor:
    """Our mixture with the loop in the place of its experts."""
    x_ND = x_BTD.flatten(0, 1)
    _, weight_NK, index_NK = block.gate(x_ND)
    shared_ND = block.shared_expert_gate(x_ND).sigmoid() * block.shared_expert(x_ND)
    out_ND = loop_over_experts(block.experts, x_ND, index_NK, weight_NK) + shared_ND
    y_BTD: Tensor = out_ND.view_as(x_BTD)
    return y_BTD


def solve_by_rows(a: Tensor, b: Tensor, **_: object) -> Tensor:
    """Invert a unit lower triangular matrix row by row, then multiply."""
    inverse = -a.tril(-1)
    for i in range(1, a.shape[-1]):
        row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return (inverse + torch.eye(a.shape[-1])) @ b


@contextmanager
def solving_by_rows() -> Any:
    """Let everything inside solve triangular systems row by row."""
    solve = torch.linalg.solve_triangular
    torch.linalg.solve_triangular = solve_by_rows
    try:
        yield
    finally:
        torch.linalg.solve_triangular = solve


def their_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Call the function of transformers as its block does."""
    out: Tensor = torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
    return out


def by_rows(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call a function that solves a triangular system, and solve it row by row."""
    with solving_by_rows():
        return function(*args)


def problems(ours: Any, theirs: Any, x: Tensor, is_published: bool) -> dict[str, dict[str, Any]]:
    """Return functions and their arguments for each row."""
    with torch.no_grad():
        _, weight, index = ours.mlp.gate(x.flatten(0, 1))
    x_ND = x.detach().flatten(0, 1).requires_grad_()
    found: dict[str, dict[str, Any]] = {
        "experts, kernel": {
            "ours": ours.mlp.experts,
            "loop": lambda *a: loop_over_experts(ours.mlp.experts, *a),
            "transformers": theirs.mlp.experts,
            "given": (x_ND, index, weight.requires_grad_()),
            "floor": "loop",
        },
        "mixture, block": {
            "ours": ours.mlp,
            "loop": lambda x: loop_block(ours.mlp, x),
            "transformers": theirs.mlp,
            "given": (x,),
            "floor": "loop",
        },
    }
    if not is_published:
        return found
    net = ours.linear_attn
    heads = (net.num_k_heads, net.head_k_dim), (net.num_v_heads, net.head_v_dim)
    q, k, v = (torch.randn(*x.shape[:2], *heads[i], dtype=x.dtype) for i in (0, 0, 1))
    g = -torch.rand(*x.shape[:2], net.num_v_heads)
    beta = torch.rand(*x.shape[:2], net.num_v_heads, dtype=x.dtype)
    return found | {
        "gated delta rule, kernel": {
            "ours": lambda *a: gated_delta_rule(*a)[0],
            "loop": lambda *a: by_rows(their_rule, *a),
            "transformers": their_rule,
            "given": tuple(part.requires_grad_() for part in (q, k, v, g, beta)),
        },
        "Gated DeltaNet, block": {
            "ours": net,
            "loop": lambda x: by_rows(theirs.linear_attn, x),
            "transformers": theirs.linear_attn,
            "given": (x,),
        },
    }


def step_of(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Return a function that does one forward and backward pass."""

    def step() -> Tensor:
        for part in given:
            part.grad = None
        y = function(*given)
        y.float().square().mean().backward()
        return y.detach()

    return step


def best_of_turns(steps: Ways, turns: int, clock: Clock) -> dict[str, float]:
    """Return the shortest time of each in ms; what takes seconds has one turn after its first."""
    best: dict[str, float] = {}
    for turn in range(turns + 1):  # the first is warm-up
        for name, step in steps.items():
            if turn > 1 and best[name] > 2e3:
                continue
            started = clock()
            step()
            if turn:
                ms = (clock() - started) * 1e3
                best[name] = min(best.get(name, ms), ms)
    return best


def matmul_speed(dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of one large matrix product."""
    a, b = torch.randn(2048, 768, dtype=dtype), torch.randn(768, 1024, dtype=dtype)
    ms = best_of_turns({"mm": lambda: a @ b}, 10, clock)["mm"]
    return 2 * 2048 * 768 * 1024 / ms * 1e3


def measure(
    problem: dict[str, Any], turns: int, is_compiled: bool, speed: float, clock: Clock
) -> list[str]:
    """Return the cells of a row: times, floor, ratios."""
    given = problem["given"]
    ways = {name: problem[name] for name in ("ours", "loop", "transformers")}
    if is_compiled:
        ways["ours compiled"] = torch.compile(problem["ours"], fullgraph=True, dynamic=False)
        ways["transformers compiled"] = torch.compile(problem["transformers"], dynamic=False)
    steps = {name: step_of(ways[name], given) for name in NAMES if name in ways}
    with FlopCounterMode(display=False) as counter:
        expected = steps[problem.get("floor", "ours")]()  # grouped_mm is not counted
    for step in steps.values():  # all do the same
        error = (step().float() - expected.float()).norm() / expected.float().norm()
        assert error < (1e-4 if expected.dtype == torch.float32 else 0.03), error
    ms = best_of_turns(steps, turns, clock)
    times = [f"{ms[name]:.1f}" if name in ms else "-" for name in NAMES]
    floor = f"{counter.get_total_flops() / speed * 1e3:.1f}" if speed else "-"
    pairs = [("loop", "ours"), ("loop", "ours compiled"), ("transformers", "ours")]
    pairs.append(("transformers compiled", "ours compiled"))
    ratios = [f"{ms[a] / ms[b]:.2f}" if a in ms and b in ms else "-" for a, b in pairs]
    return [*times, floor, *ratios]


def main() -> None:
    """Measure and print Markdown rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    heads = [f"{name} ms" for name in (*NAMES, "floor")]
    heads += ["loop / ours", "loop / ours compiled", "transformers / ours", "both compiled"]
    print(f"| forward + backward | {' | '.join(heads)} | hardware | versions | date |")
    print("|" + (len(heads) + 4) * "---|")
    where = describe(torch.device("cpu")) + ", CPU time" * args.cpu_time
    where += f" | torch {torch.__version__}, transformers {transformers.__version__}"
    where += f" | {datetime.date.today()}"
    for dtype in (getattr(torch, name) for name in args.dtypes):
        is_emulated = dtype == torch.bfloat16 and not has_bf16(torch.device("cpu"))
        speed = 0.0 if is_emulated else matmul_speed(dtype, clock)
        for shape, (rows, length, fields) in SHAPES.items():
            config: MiniQwen3NextConfig = registry.build_config(  # type: ignore[assignment]
                "mini_qwen3_next", vocab_size=64, num_hidden_layers=4, **fields
            )
            model: Any = registry.build_model(config)
            official = model.to(dtype).export_official().model.layers[0]
            x = torch.randn(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
            layer = model.model.layers[0]
            for module in (*layer.modules(), *official.modules()):
                module._forward_hooks.clear()  # they serve `output_router_logits` of the model
            for name, problem in problems(layer, official, x, shape == "published").items():
                if args.only not in f"{name}, {shape}":
                    continue
                torch._dynamo.reset()
                cells = measure(problem, args.turns, not args.no_compile, speed, clock)
                is_moe = "floor" in problem
                experts = f", {num_experts(config)}" if is_moe else ""
                label = f"{name}, {str(dtype)[6:]}, {rows} x {length} x {config.hidden_size}"
                label += experts
                print(f"| {label} | {' | '.join(cells)} | {where} |", flush=True)


def num_experts(config: MiniQwen3NextConfig) -> str:
    """Describe the mixture."""
    num, chosen = config.num_experts, config.num_experts_per_tok
    return f"{num} experts of {config.moe_intermediate_size}, top {chosen}"


if __name__ == "__main__":
    main()
