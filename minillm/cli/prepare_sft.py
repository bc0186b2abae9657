"""`minillm prepare-sft`."""

from typing import TYPE_CHECKING

from minillm.cli.console import progress, say, show_facts, show_table
from minillm.cli.options import configured
from minillm.files import human_bytes, human_time
from minillm.settings import PrepareSftConfig

if TYPE_CHECKING:
    from minillm.data.sft_report import SftReport


@configured(PrepareSftConfig)
def prepare_sft(*, cfg: PrepareSftConfig) -> None:
    """Turn dialogues into token rows for `minillm sft`."""
    from minillm.data import sft, sft_mask, sft_report

    if cfg.show_mask is not None:
        picture = sft_mask.draw_mask(sft_mask.find_rows(cfg.data, cfg.out), cfg.show_mask)
        show_facts(f"row {cfg.show_mask}", picture.facts())
        return
    report = sft.prepare_sft(cfg, progress())
    types = [
        [number, name, count, f"{count / report.num_dialogues:.1%}"]
        for number, (name, count) in enumerate(report.by_type.items(), 1)
    ]
    shown = sft_report.MAX_TYPES
    more = f", the first {shown} of {len(types)}" if len(types) > shown else ""
    show_table(f"Dialogues by type{more}", ("", "type", "dialogues", "share"), types[:shown])
    show_facts("SFT data", _facts(report))
    for reason, lines in report.rejected.examples.items():
        say(f"left out, {reason}: {', '.join(lines)}")
    if report.num_sampled_out:
        say("hint: `--max-dialogues 0` takes all dialogues")
    if report.num_too_long:
        say(f"hint: `--sequence-length {report.longest}` keeps every dialogue that was encoded")
    say(f"next: minillm sft --data {report.path}")


def _facts(report: "SftReport") -> dict[str, object]:
    sampled = f"{report.num_sampled_out:,}"
    if report.num_never_encoded:
        sampled += f" ({report.num_never_encoded:,} of them never encoded)"
    return {
        "file": f"{report.path} ({human_bytes(report.path.stat().st_size)})",
        "lines read": report.num_read,
        **{f"left out, {why}": n for why, n in report.rejected.counts.most_common()},
        "identity dialogues": report.num_identity,
        "left out by --max-dialogues": sampled,
        "dropped, too long": report.num_too_long,
        "dropped, too short": report.num_too_short,
        "dialogues written": report.num_dialogues,
        "with several turns": f"{report.num_multi_turn / report.num_dialogues:.1%}",
        "rows": report.num_rows,
        "row length": report.sequence_length,
        "fill": f"{report.fill:.2%}",
        "tokens": report.num_tokens,
        "tokens learned": report.num_label_tokens,
        "pictures": ", ".join(path.as_posix() for path in report.charts) or "none",
        "time": human_time(report.seconds),
    }
