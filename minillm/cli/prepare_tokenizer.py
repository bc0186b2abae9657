"""`minillm prepare-tokenizer`."""

from minillm.cli.console import progress, say, show_table
from minillm.cli.options import configured
from minillm.files import human_bytes
from minillm.settings import PrepareTokenizerConfig


@configured(PrepareTokenizerConfig)
def prepare_tokenizer(*, cfg: PrepareTokenizerConfig) -> None:
    """Sample documents for the tokenizer, in proportion to their sources."""
    from minillm.data.stratify import stratify

    report = stratify(cfg, progress())
    documents = sum(count.documents for count in report.sources.values())
    kept = sum(count.kept_documents for count in report.sources.values())
    rows = [
        [
            name,
            count.documents,
            f"{count.documents / documents:.1%}",
            human_bytes(count.text_bytes),
            count.kept_documents,
            f"{count.kept_documents / kept:.1%}",
            human_bytes(count.kept_bytes),
        ]
        for name, count in report.sources.items()
    ]
    columns = ["source", "documents", "share", "text", "kept", "share kept", "text kept"]
    show_table(f"sample in {report.folder}", columns, rows)
    say(f"next: minillm train-tokenizer --data {report.folder}")
