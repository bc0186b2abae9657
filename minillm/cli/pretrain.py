"""`minillm pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.options import configured
from minillm.settings import PretrainConfig

Out = Annotated[Path | None, typer.Option(help="Run folder; default: a new one below runs/.")]


@configured(PretrainConfig)
def pretrain(out: Out = None, *, cfg: PretrainConfig) -> None:
    """Train a model from scratch on tokenized .bin data."""
    typer.echo(cfg)
