"""`minillm import`."""

from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.console import say, show_facts

Source = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER_OR_HUB_ID",
        help="Folder or hub id of a Llama, DeepSeek-V3, Qwen3-Next or published Mini-LLM model; "
        "or a `.gguf` file of the Llama architecture.",
    ),
]
Out = Annotated[Path, typer.Option(help="New folder for the model.")]


def import_(source: Source, out: Out = Path("imported")) -> None:
    """Make a model of another tool one of minillm's, to chat with, serve and fine-tune."""
    from minillm.models.interop.official import import_official

    model = import_official(source, out)
    facts = {"folder": out, "model": model.config.model_type, "parameters": model.num_parameters()}
    show_facts("imported", facts)
    say(f"next: minillm chat --model {out}")
