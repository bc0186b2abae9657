"""`minillm merge-bin`."""

from minillm.cli.console import progress, say, show_facts
from minillm.cli.options import configured
from minillm.files import human_bytes
from minillm.settings import MergeBinConfig


@configured(MergeBinConfig)
def merge_bin(*, cfg: MergeBinConfig) -> None:
    """Merge token files into one."""
    from minillm.data import merge as command

    merged = command.merge_bin(cfg, progress())
    show_facts(
        "merged",
        {
            "file": cfg.out,
            "tokens": merged.num_tokens,
            "documents": merged.num_documents,
            "size": human_bytes(merged.size_bytes),
            "tokenizer": merged.tokenizer_sha256[:12],
            "sources": ", ".join(merged.sources),
        },
    )
    say(f"next: minillm pretrain --data {cfg.out}")
