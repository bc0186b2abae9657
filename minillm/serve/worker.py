"""One generation at a time: a thread that owns the generator, and a bounded queue before it.

The event loop only passes messages, so `/health` answers while the model computes. The price:
requests wait for each other; there is no batching.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch

from minillm.serve.backend import Run, Stats, TokenSource
from minillm.serve.outbox import Outbox
from minillm.serve.problems import overloaded, unavailable
from minillm.serve.texts import TextSide

logger = logging.getLogger("minillm")


class WorkerJob(Outbox):
    """A request in the queue or in work; iterate it in the event loop it was submitted from."""

    def __init__(self, worker: "Worker", runs: Sequence[Run]) -> None:
        """Take the runs of one request."""
        super().__init__()
        self.runs = runs
        self.cancelled = threading.Event()
        self._worker = worker

    def abort(self) -> None:
        """Give up: out of the queue at once, or out of the generator at its next token."""
        if not self.cancelled.is_set():
            self.cancelled.set()
            self._worker.forget(self)
            self.put(None)


class Worker(TextSide):
    """The `Backend` with one generator in one thread."""

    def __init__(self, generator: TokenSource, *, max_waiting: int = 64) -> None:
        """Start the thread.

        Args:
            generator: What makes the tokens; only the thread streams from it.
            max_waiting: Requests that may wait while one is in work; one more is refused.
        """
        super().__init__(generator)
        self._max_waiting = max_waiting
        self._waiting: deque[WorkerJob] = deque()
        self._current: WorkerJob | None = None
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="minillm-generate", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is there to do jobs."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_open(self) -> int:
        """Requests in work or waiting."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def stats(self) -> Stats:
        """Return what is being done now."""
        with self._changed:
            return Stats(num_running=int(self._current is not None), num_waiting=len(self._waiting))

    def submit(self, runs: Sequence[Run]) -> WorkerJob:
        """Admit a request.

        Raises:
            ApiError: The queue is full (429), or the thread has ended (503).
        """
        with self._changed:
            if not self.is_alive:
                raise unavailable("this server cannot generate any more; restart it")
            if len(self._waiting) >= self._max_waiting:
                raise overloaded(len(self._waiting))
            job = WorkerJob(self, runs)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def forget(self, job: WorkerJob) -> None:
        """Take an aborted job out of the queue."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def abort_all(self) -> None:
        """Give up all jobs and take no more; does not wait."""
        with self._changed:
            self._is_closing = True
            jobs = [*self._waiting, *([self._current] if self._current else [])]
            self._changed.notify()
        for job in jobs:
            job.abort()

    def close(self, timeout_s: float = 5.0) -> None:
        """Abort everything and wait for the thread, at most `timeout_s`."""
        self.abort_all()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._do(job)
        except BaseException:
            logger.exception("the generating thread has failed; restart the server")
        finally:
            with self._changed:
                self._is_closing = True
                jobs = [*self._waiting, *([self._current] if self._current else [])]
                self._waiting.clear()
            for job in jobs:
                job.put(unavailable("the server stopped generating"))

    def _next(self) -> WorkerJob | None:
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if self._is_closing:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _do(self, job: WorkerJob) -> None:
        """Run one request; its failure is its own, unless the device is lost."""
        try:
            for index, run in enumerate(job.runs):
                stream = self._generator.stream(run.prompt_ids, run.params, cancel=job.cancelled)
                for delta in stream:
                    job.put((index, delta))
                if job.cancelled.is_set():
                    break
            job.put(None)
        except torch.AcceleratorError:
            raise  # every later call would fail too
        except Exception as error:
            logger.debug("a generation failed", exc_info=True)
            job.put(error)
