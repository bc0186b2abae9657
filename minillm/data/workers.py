"""The processes that `tokenize` gives its shards to.

They import neither transformers nor pyarrow: a worker is small and starts at once.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from minillm.data.binfile import BinWriter
from minillm.data.encoder import Encoder, EncoderPlan
from minillm.data.manifest import TokenizerFacts
from minillm.data.worker_pool import start_pool

WORKER_BYTES = 4_000_000
"""A worker takes a second to start: not for less input than this."""

_encoder: Encoder | None = None  # of this worker


def encode_shard(encoder: Encoder, facts: TokenizerFacts, texts: list[str], out: Path) -> None:
    """Encode texts to a token file.

    Args:
        encoder: Of the tokenizer with these `facts`.
        facts: What the token file has to know.
        texts: Documents.
        out: The shard.

    Raises:
        Mismatch: gigatoken differs from tokenizers in one of the texts.
    """
    ids, lengths = encoder.encode(texts)
    with BinWriter(out, facts, is_durable=False) as writer:
        writer.extend(ids, lengths, len("".join(texts).encode()))


def encode_shard_in_worker(facts: TokenizerFacts, texts: list[str], out: Path) -> None:
    """Do `encode_shard` with the encoder that the worker began with."""
    assert _encoder is not None
    encode_shard(_encoder, facts, texts, out)


@contextlib.contextmanager
def worker_pool(workers: int, plan: EncoderPlan) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes; none for one worker, whose work is done in this process."""
    if workers == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="minillm-") as scratch:
        # in a file: a parent that hands megabytes to a child which was just killed waits for ever
        place = Path(scratch) / "encoder.json"
        place.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        with start_pool(workers, _load_encoder, place) as pool:
            yield pool


def _load_encoder(plan: Path) -> None:
    global _encoder
    _encoder = Encoder(EncoderPlan(**json.loads(plan.read_bytes())))
