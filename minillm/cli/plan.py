"""`minillm plan`."""

from minillm.cli.console import progress, say, show_facts
from minillm.cli.options import configured
from minillm.settings import PlanConfig


@configured(PlanConfig)
def plan(cfg: PlanConfig) -> None:
    """Say what a run would take: memory, FLOPs, speed here, time and cost."""
    from minillm.train.plan import plan as work_out

    found = work_out(cfg, progress())
    show_facts(cfg.model, found.facts())
    if found.probe is None:
        say("hint: without `--no-probe` speed and time are measured on this machine")
    else:
        data = f" --data {cfg.data}" if cfg.data else ""
        rows = found.probe.micro_rows
        say(f"next: minillm pretrain --model {cfg.model}{data} --micro-batch {rows}")
