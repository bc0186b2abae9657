"""`minillm report RUN …`."""

from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.options import configured
from minillm.settings import ReportCompareConfig

Runs = Annotated[list[Path] | None, typer.Argument(help="Run folders; default: the newest run.")]


@configured(ReportCompareConfig)
def report(runs: Runs = None, *, cfg: ReportCompareConfig) -> None:
    """Write a run's curves and numbers, or those of several runs side by side."""
    from minillm.train.report import report as write

    typer.echo(write(cfg))
