"""`minillm sft`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.console import progress, show_run
from minillm.cli.options import configured
from minillm.settings import SftConfig

Out = Annotated[Path | None, typer.Option(help="Run folder; default: a new one below runs/.")]


@configured(SftConfig, stage="sft")
def sft(out: Out = None, *, resume: Path | None, cfg: SftConfig) -> None:
    """Fine-tune a pretrained model on dialogues."""
    if cfg.several.nproc > 1 and "WORLD_SIZE" not in os.environ:  # not yet under torchrun
        from minillm.train.launch import launch

        raise typer.Exit(launch(cfg.several.nproc, sys.argv[1:]))
    from minillm.train.sft import sft as run_sft

    run, outcome = run_sft(cfg, progress(), out=resume or out, resume=resume is not None)
    if outcome.is_main:
        show_run(run, outcome, "minillm chat", "sft")
    raise typer.Exit(outcome.exit_code)
