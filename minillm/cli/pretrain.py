"""`minillm pretrain`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.console import progress, show_run
from minillm.cli.options import configured
from minillm.settings import PretrainConfig

Out = Annotated[Path | None, typer.Option(help="Run folder; default: a new one below runs/.")]


@configured(PretrainConfig, stage="pretrain")
def pretrain(out: Out = None, *, resume: Path | None, cfg: PretrainConfig) -> None:
    """Train a model from scratch on tokenized .bin data."""
    if cfg.several.nproc > 1 and "WORLD_SIZE" not in os.environ:  # not yet under torchrun
        from minillm.train.launch import launch

        raise typer.Exit(launch(cfg.several.nproc, sys.argv[1:]))
    from minillm.train.pretrain import pretrain as run_pretrain

    run, outcome = run_pretrain(cfg, progress(), out=resume or out, resume=resume is not None)
    if outcome.is_main:
        show_run(run, outcome, "minillm prepare-sft && minillm sft", "pretrain")
    raise typer.Exit(outcome.exit_code)
