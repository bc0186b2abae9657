"""`minillm download`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.cli.console import progress, say, show_table
from minillm.cli.options import configured
from minillm.files import free_bytes, human_bytes
from minillm.settings import DownloadConfig

if TYPE_CHECKING:
    from minillm.data.download import SetPlan

Sets = Annotated[
    list[str], typer.Argument(help="Numbers or names, e.g. `9` or `deepctrl-bin`; none: list them.")
]
Flag = Annotated[list[str], typer.Option("--set", help="The same as a flag: `--set 4,5`.")]
MAX_ROWS = 12


@configured(DownloadConfig)
def download(sets: Sets = [], chosen: Flag = [], *, cfg: DownloadConfig) -> None:  # noqa: B006
    """Fetch published data sets, verified, resumable, from ModelScope or Hugging Face."""
    from minillm.data.download import download as run
    from minillm.data.download import plan

    cfg = replace(cfg, sets=(*cfg.sets, *chosen))
    if not cfg.sets:
        _show_catalog()
        return
    if cfg.dry_run:
        _show_plans(plan(cfg, progress()), cfg.out)
        return
    try:
        reports = run(cfg, progress())
    except KeyboardInterrupt:
        say("the same command continues where this one stopped")
        raise
    rows = [
        (r.name, r.num_files, human_bytes(r.total_bytes), human_bytes(r.fetched_bytes), r.folder)
        for r in reports
    ]
    show_table("Verified", ("set", "files", "size", "fetched now", "folder"), rows)
    for report in reports:
        if report.next_step:
            say(f"next: {report.next_step}")


def _show_catalog() -> None:
    from minillm.data.catalog import CATALOG

    rows = []
    for item in CATALOG:
        hub = item.places[0].hub if len(item.places) == 1 else "both"
        rows.append((item.number, item.name, human_bytes(item.size_bytes), item.what, hub))
    show_table("Published sets", ("#", "name", "about", "what", "hub"), rows)
    say("hint: `minillm download 9` fetches set 9, with `--dry-run` it only looks")


def _show_plans(plans: "list[SetPlan]", out: Path) -> None:
    rows = []
    for item in plans:
        groups = [(file.remote.path, [file]) for file in item.files[:MAX_ROWS]]
        if hidden := item.files[MAX_ROWS:]:
            groups.append((f"… {len(hidden):,} more", hidden))
        for title, files in groups:
            size = sum(file.remote.size_bytes for file in files)
            rest = sum(file.fetch_bytes for file in files)
            sizes = map(human_bytes, (size, size - rest, rest))
            rows.append((item.published.name, title, *sizes))
    show_table("Dry run", ("set", "file", "size", "have", "will fetch"), rows)
    fetch = human_bytes(sum(item.fetch_bytes for item in plans))
    need = human_bytes(sum(item.disk_bytes for item in plans))
    say(f"to fetch: {fetch}; on the disk: {need} needed, {human_bytes(free_bytes(out))} free")
