"""`minillm models`, `minillm models show NAME`."""

from typing import Annotated

import typer

from minillm.cli.console import out, result_table, say
from minillm.files import human_bytes, human_count

models = typer.Typer(rich_markup_mode="rich")

SeqLen = Annotated[int, typer.Option(help="Context at which attention is counted.")]
Name = Annotated[str, typer.Argument(help="Model name, or a folder with a `config.json`.")]


@models.callback(invoke_without_command=True)
def list_models(ctx: typer.Context, seq_len: SeqLen = 1_024) -> None:
    """List the models that minillm can build, with their sizes."""
    if ctx.invoked_subcommand is not None:
        return
    from minillm.models import registry
    from minillm.models.summary import summarize

    table = result_table("model", "parameters", "active", "embedding", "FLOPs", "cache", "state")
    for name in registry.names():
        made = summarize(name, seq_len)
        count = made.params
        table.add_row(
            name,
            *(human_count(n) for n in (count.total, count.active, count.embedding, made.flops)),
            human_bytes(made.cache_bytes),
            human_bytes(made.state_bytes) if made.state_bytes else "-",
        )
    out.print(table)
    say(f"FLOPs: of a token in training, forward and backward, at {seq_len:,} tokens")
    say("cache: what a token adds to it, in bf16; state: of a sequence, whatever its length")
    say("next: minillm models show NAME, minillm pretrain --model NAME")


@models.command()
def show(name: Name) -> None:
    """Show the layers of a model: module, shape, parameters."""
    from minillm.models.summary import build_on_meta, layer_table, load_config

    model = build_on_meta(load_config(name))
    table = result_table("module", "shape", "parameters", left=("shape",))
    total = 0
    for block in layer_table(model):
        count = max(1, len(block.layers))
        if block.layers:
            size = count * sum(row.params for row in block.rows)
            table.add_row(block.title, "", f"{size:,}", style="bold")
        for row in block.rows:
            times = f"{count} x " if block.layers else ""
            indent = "  " if block.layers else ""
            shape = " x ".join(f"{n:,}" for n in row.shape)
            table.add_row(indent + row.module, shape, f"{times}{row.params:,}")
            total += count * row.params
    if model.config.tie_word_embeddings:
        table.add_row("lm_head.weight", "is the embedding's", "0")
    table.add_row("total", "", f"{total:,}", style="bold")
    out.print(table)
