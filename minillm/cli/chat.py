"""`minillm chat`."""

from typing import Annotated

import typer

from minillm.cli.console import err
from minillm.cli.options import configured
from minillm.settings import ChatConfig

Prompt = Annotated[str, typer.Option(help="Answer this once and leave; so does a piped message.")]


@configured(ChatConfig)
def chat(prompt: Prompt = "", *, cfg: ChatConfig) -> None:
    """Talk to a model in the terminal."""
    from minillm.serve.terminal import run_chat

    run_chat(cfg, prompt, announce=lambda line: err.print(line, markup=False, soft_wrap=True))
