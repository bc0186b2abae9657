"""`minillm inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from minillm import paths
from minillm.cli.console import progress, say
from minillm.cli.options import configured
from minillm.settings import InspectConfig

PathArgument = Annotated[Path, typer.Argument(help="File or folder to look at.")]


@configured(InspectConfig)
def inspect(path: PathArgument = paths.DATA, *, cfg: InspectConfig) -> None:
    """Say what a file or folder is, and what is wrong with it (exit code 3)."""
    from minillm.data.inspect_show import show
    from minillm.train.inspect import inspect as look

    report = look(cfg, progress())
    if cfg.json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, indent=2, default=str))
    else:
        typer.echo("\n".join(show(report)))
    if report.num_problems:
        say(f"{report.num_problems} problem{'s' * (report.num_problems > 1)} in {cfg.path}")
        raise typer.Exit(3)
