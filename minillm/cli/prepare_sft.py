"""`minillm prepare-sft`."""

from minillm.cli.console import progress, say, show_facts
from minillm.cli.options import configured
from minillm.files import human_bytes, human_time
from minillm.settings import PrepareSftConfig


@configured(PrepareSftConfig)
def prepare_sft(*, cfg: PrepareSftConfig) -> None:
    """Turn dialogues into token rows for `minillm sft`."""
    from minillm.data import sft as command

    report = command.prepare_sft(cfg, progress())
    sources = ", ".join(f"{name} {count:,}" for name, count in report.by_source.items())
    show_facts(
        "SFT data",
        {
            "file": f"{report.path} ({human_bytes(report.path.stat().st_size)})",
            "dialogues read": report.num_read,
            "identity dialogues": report.num_identity,
            "left out by --max-dialogues": report.num_sampled_out,
            "dropped, too long": report.num_too_long,
            "dialogues written": report.num_dialogues,
            "by source": sources,
            "rows": report.num_rows,
            "row length": report.sequence_length,
            "fill": f"{report.fill:.1%}",
            "tokens": report.num_tokens,
            "tokens learned": report.num_label_tokens,
            "time": human_time(report.seconds),
        },
    )
    if report.num_too_long:
        say(f"hint: `--sequence-length {report.longest}` keeps every dialogue")
