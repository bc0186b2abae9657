"""`minillm train-tokenizer`."""

from minillm.cli.console import progress, say, show_facts, show_table
from minillm.cli.options import configured
from minillm.files import human_bytes, human_time
from minillm.settings import TrainTokenizerConfig


@configured(TrainTokenizerConfig)
def train_tokenizer(*, cfg: TrainTokenizerConfig) -> None:
    """Train a byte-level BPE tokenizer, and report how well it fits."""
    from minillm.data import train_tokenizer as command
    from minillm.data.tokenizer_report import TEXT

    report = command.train_tokenizer(cfg, progress())
    corpus, text = human_bytes(report.corpus_bytes), human_bytes(report.text_bytes)
    show_facts(
        "tokenizer",
        {
            "folder": report.folder,
            "tokens": report.num_tokens,
            "documents": report.num_documents,
            "text": corpus if corpus == text else f"{text}, at random from {corpus}",
            "unused tokens": report.num_unused,
            "fingerprint": report.fingerprint[:12],
            "time": human_time(report.seconds),
        },
    )
    languages = list(report.fits[0].by_language)
    rows = [
        [fit.name, fit.vocab_size, f"{fit.total.bytes_per_token:.3f}"]
        + [f"{fit.by_language[name].bytes_per_token:.3f}" for name in languages]
        for fit in report.fits
    ]
    held_out = "held-out text" if report.is_held_out else "the text it was trained on"
    columns = ["tokenizer", "vocabulary", "all", *languages]
    show_table(f"bytes per token, on {held_out}", columns, rows)
    say(f"table and chart: {report.folder / TEXT}")
