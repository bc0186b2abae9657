"""Run jobs in a few threads, and leave at once when one fails or the user presses Ctrl-C."""

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

LEAVE_S = 3.0  # how long a thread may take to notice that it shall stop


def run_all(jobs: Sequence[Callable[[], None]], workers: int, halt: Callable[[], None]) -> None:
    """Run every job, `workers` at a time.

    The threads are daemons: one that hangs in a connection does not keep the program alive, as
    those of `ThreadPoolExecutor` would.

    Args:
        jobs: What to run.
        workers: Threads.
        halt: Tells running jobs to end; called at the first error and on Ctrl-C.

    Raises:
        BaseException: The first error of a job; jobs not begun by then never run.
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    is_over = threading.Event()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        with suppress(queue.Empty):
            while not is_over.is_set():
                job = waiting.get_nowait()
                try:
                    job()
                except BaseException as err:  # handed to the thread that waits for it
                    ended.put(err)
                    return
                ended.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            error = ended.get()
            if error is not None:
                raise error
    except BaseException:
        is_over.set()
        halt()
        for thread in threads:
            thread.join(LEAVE_S)
        raise
