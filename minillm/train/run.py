"""What pretraining and fine-tuning have in common: build a job, train it, report it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minillm.device import keep_freed_memory
from minillm.errors import SetupError
from minillm.log import Progress, Silent
from minillm.train.distributed import World, join_world
from minillm.train.job import Job, main_first
from minillm.train.loop import Outcome, train
from minillm.train.plan import summary_lines
from minillm.train.report import write_report
from minillm.train.run_folder import check_alike


def run_job(
    cfg: Any,
    progress: Progress,
    out: Path | None,
    resume: bool,
    build: Callable[[World, torch.device, Path | None], Job],
) -> tuple[Path, Outcome]:
    """Join the processes of the run, train, and write the report; return run folder and outcome."""
    with join_world(cfg.batch.device) as (world, device):
        if not world.is_main:
            progress = Silent()
        if device.type == "cpu":
            keep_freed_memory()
        job = main_first(world, out, lambda run: build(world, device, run))
        check_alike(cfg, job.facts, world)
        if not resume:
            for line in summary_lines(job):
                progress.line(line)
        try:
            outcome = train(job, progress, resume=resume)
            if world.is_main:
                write_report(job)
            world.share(None)  # torchrun ends the others as soon as one has ended
        except SetupError as error:  # a full disk, as a rule
            again = f"`minillm {job.stage} --resume {job.run}` continues the run"
            hint = (error.hint or again).replace(
                " and run the same command again", f"; then {again}"
            )
            raise SetupError(str(error), hint=hint) from error
    return job.run, outcome
