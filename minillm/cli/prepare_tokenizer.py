"""`minillm prepare-tokenizer`."""

from minillm.cli.console import progress, say, show_table
from minillm.cli.options import configured
from minillm.settings import PrepareTokenizerConfig

MAX_ROWS = 30


@configured(PrepareTokenizerConfig)
def prepare_tokenizer(*, cfg: PrepareTokenizerConfig) -> None:
    """Sample documents for the tokenizer, in proportion to their sources."""
    from minillm.data.sample_report import COLUMNS, TEXT
    from minillm.data.stratify import stratify

    report = stratify(cfg, progress())
    rows = report.rows()
    show_table(f"sample in {report.folder}", COLUMNS, rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        say(f"{len(rows) - MAX_ROWS:,} smaller sources are in {report.folder / TEXT}")
    if report.num_without_source:
        say(
            f"{report.num_without_source:,} of {report.num_inputs:,} files have no column "
            f"`{cfg.source_column}`: their documents count as source (none)"
        )
    say(f"table and chart: {report.folder / TEXT}")
    say(f"next: minillm train-tokenizer --data {report.folder}")
