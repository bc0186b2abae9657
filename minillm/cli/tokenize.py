"""`minillm tokenize`."""

from minillm.cli.console import progress, say, show_table
from minillm.cli.options import configured
from minillm.files import human_bytes
from minillm.settings import TokenizeConfig


@configured(TokenizeConfig)
def tokenize(*, cfg: TokenizeConfig) -> None:
    """Turn documents into token files."""
    from minillm.data import tokenize as command

    rows = []
    for report in command.tokenize(cfg, progress()):
        found = report.manifest
        rows.append(
            [
                report.path.name,
                "written" if report.is_new else "up to date",
                found.num_documents,
                found.num_tokens,
                human_bytes(found.text_bytes),
                found.text_bytes / (found.num_tokens - found.num_documents),
            ]
        )
    columns = ["file", "state", "documents", "tokens", "text", "bytes/token"]
    show_table(f"token files in {cfg.out}", columns, rows)
    say(f"next: minillm merge-bin --data {cfg.out}")
