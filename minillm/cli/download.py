"""`minillm download`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.console import progress, say, show_table
from minillm.cli.options import configured
from minillm.files import human_bytes
from minillm.settings import DownloadConfig

Sets = Annotated[
    list[str],
    typer.Argument(help="Numbers or names, e.g. `9` or `deepctrl-bin`, or a model's hub id."),
]
Flag = Annotated[list[str], typer.Option("--set", help="The same as a flag: `--set 4,5`.")]
Source = Annotated[
    Path | None,
    typer.Option("--from", help="Take the files from this folder, checked as if downloaded."),
]


@configured(DownloadConfig)
def download(
    sets: Sets = [],  # noqa: B006
    chosen: Flag = [],  # noqa: B006
    source: Source = None,
    *,
    cfg: DownloadConfig,
) -> None:
    """Fetch published data sets, verified, resumable, from ModelScope or Hugging Face.

    Without a set: choose from the catalog on a terminal, else list it.
    """
    from minillm.cli.picker import choose
    from minillm.cli.sets_table import show_plans
    from minillm.cli.transfers import Transfers
    from minillm.data.download import download as run
    from minillm.data.download import plan

    cfg = replace(cfg, sets=(*cfg.sets, *chosen))
    if not cfg.sets:
        cfg = choose(cfg)
    if not cfg.sets:
        return
    if cfg.dry_run:
        show_plans(plan(cfg, progress()), cfg.out)
        return
    try:
        reports = run(cfg, Transfers())
    except KeyboardInterrupt:
        say("the same command continues where this one stopped")
        raise
    rows = [
        (r.name, r.num_files, human_bytes(r.total_bytes), human_bytes(r.fetched_bytes), r.folder)
        for r in reports
    ]
    show_table("Verified", ("set", "files", "size", "fetched now", "folder"), rows)
    say(f"OK {sum(r.num_files for r in reports):,} files, checksums verified")
    for report in reports:
        if report.next_step:
            say(f"next: {report.next_step}")
