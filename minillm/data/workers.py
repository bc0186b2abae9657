"""The processes that `tokenize` gives its shards to.

They import neither transformers nor pyarrow: a worker is small and starts at once.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from minillm.data.binfile import BinWriter
from minillm.data.encoder import Encoder, EncoderPlan
from minillm.data.manifest import TokenizerFacts
from minillm.errors import RunError

_WORKER_BYTES = 4_000_000  # a worker takes a second to start: not for less input than this

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
        yield from _pool_of(workers, place)


def _pool_of(workers: int, plan: Path) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and their locks
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(plan,)
    )
    # all workers start with the first task. One that starts later may not be watched, or be left
    # behind when the pool breaks, and then the pool waits for it for ever
    pool._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]
    try:
        yield pool
    finally:
        if getattr(pool, "_broken", False) and sys.version_info < (3, 11, 5):
            # there the pool of a dead worker waits for ever for a thread that is writing to a full
            # pipe which nobody reads any more (CPython issue 94777)
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(plan: Path) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(EncoderPlan(**json.loads(plan.read_bytes())))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def count_workers(size_bytes: int) -> int:
    """Return one per core, fewer for little input."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, math.ceil(size_bytes / _WORKER_BYTES)))


def worker_died() -> RunError:
    """Return the error for a pool that broke."""
    return RunError(
        "a worker process died; the system may have killed it for lack of memory",
        hint="run the same command again with `--workers 1`: what is finished is kept",
    )
