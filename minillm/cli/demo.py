"""`minillm demo`."""

import typer

from minillm.cli.console import out, progress, say, show_facts
from minillm.cli.options import configured
from minillm.files import human_count, human_time
from minillm.settings import DemoConfig


@configured(DemoConfig)
def demo(*, cfg: DemoConfig) -> None:
    """Run the whole pipeline on the bundled text: from nothing to a chat, without a network."""
    from minillm.train.demo import run_demo

    result = run_demo(cfg, progress())
    if isinstance(result, int):
        say("stopped and saved")
        say(f"hint: `minillm demo --preset {cfg.preset} --out {cfg.out}` continues it")
        raise typer.Exit(result)
    for question, text in result.answers:
        out.print(f"[bold]>>> {question}[/bold]")
        out.print(text, markup=False)
        out.print()
    state = result.pretrain.state
    first, last = state.first_eval["bpb"], state.last_eval["bpb"]
    speed = state.tokens / max(state.train_seconds, 1e-9)
    show_facts(
        "What was made",
        {
            "model": result.model,
            "report": result.model.parent / "report.md",
            "bits per byte": f"{first:.3f} → {last:.3f} after pretraining ({1 - last / first:.0%})",
            "speed": f"{human_count(speed)} tokens/s, {human_time(result.seconds)} in all",
            "next": f"minillm chat --model {result.model}",
            "or": f"minillm serve --model {result.model}",
        },
    )
