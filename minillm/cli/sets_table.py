"""Tables about published sets: the catalog with what is here, and what a download would do."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minillm.cli.console import out, say, show_table
from minillm.data.catalog import CATALOG, LICENCE_NOTE
from minillm.data.download import SPARE
from minillm.data.set_plan import SetPlan, look_at
from minillm.files import free_bytes, human_bytes, human_time

MAX_ROWS = 12
EXAMPLE_RATE = 10_000_000  # bytes/s: no rate is known before the first byte


def show_plans(plans: list[SetPlan], folder: Path) -> None:
    """Print what a download would fetch, and whether the disk has room for it."""
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
    show_table("To fetch", ("set", "file", "size", "have", "will fetch"), rows)
    fetch_bytes = sum(item.fetch_bytes for item in plans)
    need_bytes, free = round(SPARE * sum(item.disk_bytes for item in plans)), free_bytes(folder)
    say(
        f"to fetch: {human_bytes(fetch_bytes)}, {human_time(fetch_bytes / EXAMPLE_RATE)} at "
        f"{human_bytes(EXAMPLE_RATE)}/s; on the disk: {human_bytes(need_bytes)} needed, "
        f"{human_bytes(free)} free" + (": too little" if free < need_bytes else "")
    )


def show_catalog(folder: Path) -> None:
    """Print the sets, and how much of each is below `folder`."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("name", no_wrap=True)
    table.add_column("about", justify="right", no_wrap=True)
    table.add_column("here", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("licence", overflow="fold")
    for item in CATALOG:
        state = look_at(item, folder)
        share = state.have_bytes / state.total_bytes if state.total_bytes else 0.0
        here = "all" if state.is_complete else f"{share:.0%}" if state.have_bytes else "-"
        size = human_bytes(item.size_bytes)
        table.add_row(str(item.number), item.name, size, here, item.what, item.licence)
    out.print(table)
    say(f"* {LICENCE_NOTE}")
