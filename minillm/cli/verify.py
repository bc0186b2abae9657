"""`minillm verify`."""

from typing import Annotated

import typer

from minillm.cli.console import out, result_table, say
from minillm.errors import RunError

Source = Annotated[
    str,
    typer.Argument(
        metavar="[RUN_OR_MODEL]",
        help="Run folder, model folder, hub id, or a name such as `mini_llama3:tiny`, which "
        "means random weights; `auto` is the newest run.",
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")]
Tokens = Annotated[int, typer.Option(help="Length of the sequences.", min=16)]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Check `torch.compile` too.")]


def verify(
    source: Source = "auto", device: Device = "cpu", tokens: Tokens = 48, compile: Compile = True
) -> None:
    """Check that a model gives the same logits in every way of running it."""
    from minillm.models.verify import load
    from minillm.models.verify import verify as run_checks
    from minillm.serve.source import find_source

    found = find_source(source)
    model, tokenizer = load(found, device)
    say(f"checking {found}: {type(model).__name__}, fp32, {model.device}")
    table = result_table("check", "largest error", "allowed", "result")
    missed = []
    checks = run_checks(model, tokenizer, num_tokens=tokens, with_compile=compile)
    for check in checks:
        say(f"{check.name}: {'ok' if check.is_ok else 'MISSED'}")
        verdict = "[green]ok[/green]" if check.is_ok else "[red]MISSED[/red]"
        table.add_row(check.name, f"{check.error:.1e}", f"{check.tolerance:.1e}", verdict)
        missed += [check.name] * (not check.is_ok)
    out.print(table)
    if missed:
        raise RunError(
            f"`{found}`: {len(missed)} of {table.row_count} checks missed: {', '.join(missed)}",
            hint=f"`minillm verify {found} --device cpu --no-compile` leaves out GPU and compiler",
        )
