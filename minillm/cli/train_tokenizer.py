"""`minillm train-tokenizer`."""

from minillm.cli.console import progress, show_facts
from minillm.cli.options import configured
from minillm.files import human_bytes, human_time
from minillm.settings import TrainTokenizerConfig


@configured(TrainTokenizerConfig)
def train_tokenizer(*, cfg: TrainTokenizerConfig) -> None:
    """Train a byte-level BPE tokenizer."""
    from minillm.data import train_tokenizer as command

    report = command.train_tokenizer(cfg, progress())
    show_facts(
        "tokenizer",
        {
            "folder": report.folder,
            "tokens": report.num_tokens,
            "documents": report.num_documents,
            "text": human_bytes(report.text_bytes),
            "fingerprint": report.fingerprint[:12],
            "time": human_time(report.seconds),
        },
    )
