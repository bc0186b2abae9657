"""Run one function over many jobs on all cores, results in order, memory bounded."""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from minillm.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

_QUEUE_PER_WORKER = 2


def count_workers(asked: int, size_bytes: int, bytes_per_worker: int) -> int:
    """Return how many processes suit an amount of work; `asked` if it is not 0.

    Args:
        asked: What the user set; 0 is one per core.
        size_bytes: Input in all.
        bytes_per_worker: A process takes seconds to start: not for less input than this.
    """
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, math.ceil(size_bytes / bytes_per_worker)))


class Workers:
    """Processes that stay warm over several rounds of jobs; with one, work is done right here.

    Args:
        count: Processes.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, count: int) -> None:
        self._pool, self._count = pool, count

    def map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the results in the order of the jobs, with only a few jobs under way at a time.

        Raises:
            RunError: A worker died.
        """
        if self._pool is None:
            yield from map(work, jobs)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(work, job))
                if len(waiting) > self._count * _QUEUE_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (BrokenProcessPool, BrokenPipeError) as err:
            raise worker_died() from err


@contextmanager
def start_workers(count: int) -> Iterator[Workers]:
    """Start processes for the block; they end with it, and with this process however it ends."""
    if count == 1:
        yield Workers(None, 1)
        return
    with start_pool(count) as pool:
        yield Workers(pool, count)


@contextmanager
def start_pool(count: int, *begin: Any) -> Iterator[ProcessPoolExecutor]:
    """Start a bare pool whose processes first call `begin[0](*begin[1:])`, if given."""
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and their locks
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=begin)
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


def worker_died() -> RunError:
    """Return the error for a pool that broke."""
    return RunError(
        "a worker process died; the system may have killed it for lack of memory",
        hint="run the same command again with `--workers 1`: what is finished is kept",
    )


def _begin(*begin: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin:
        begin[0](*begin[1:])


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
