"""The engine behind the HTTP interface: jobs of one or more answers, and a bounded queue."""

import threading
from collections.abc import Sequence

from minillm.models.generator import Delta
from minillm.serve.backend import Run, Stats
from minillm.serve.engine import Engine
from minillm.serve.outbox import Outbox
from minillm.serve.problems import overloaded, unavailable
from minillm.serve.request import Request
from minillm.serve.texts import TextSide


class EngineJob(Outbox):
    """A request of one or more answers; iterate it in the event loop it was submitted from."""

    def __init__(self, backend: "EngineBackend", num_runs: int) -> None:
        """Wait for the deltas of so many answers."""
        super().__init__()
        self.requests: list[Request] = []
        self._backend, self._num_left = backend, num_runs
        self._is_over = False

    @property
    def has_begun(self) -> bool:
        """Whether one of its answers has left the queue."""
        return any(request.has_begun for request in self.requests)

    def post(self, index: int, item: Delta | BaseException) -> None:
        """Hand what an answer has given to the event loop; called by the text thread."""
        if isinstance(item, BaseException):
            self._num_left = 0
        elif item.finish_reason is not None:
            self._num_left -= 1
        is_last = self._num_left <= 0
        if is_last:
            self._backend.forget(self)
        self.put((index, item) if isinstance(item, Delta) else item)
        if is_last and isinstance(item, Delta):
            self.put(None)

    def abort(self) -> None:
        """Give up; memory is free within a step."""
        if not self._is_over:
            self._is_over = True
            self._backend.forget(self)
            self.put(None)


class EngineBackend(TextSide):
    """The `Backend` with an `Engine`."""

    def __init__(self, engine: Engine, *, max_waiting: int = 64) -> None:
        """Serve with `engine`; it is this object's from now on.

        Args:
            engine: With its threads running.
            max_waiting: Requests that may wait for a place; one more is refused.
        """
        super().__init__(engine)
        self.engine, self._max_waiting = engine, max_waiting
        self._jobs: set[EngineJob] = set()
        self._lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_alive

    @property
    def num_open(self) -> int:
        """Requests in work or waiting."""
        return len(self._jobs)

    def stats(self) -> Stats:
        """Return what is being done now, and the engine's counters."""
        now = self.engine.stats()
        used = now.cache_tokens_running + now.cache_tokens_kept
        return Stats(
            num_running=now.running,
            num_waiting=self._num_waiting(),
            cache_usage=used / now.cache_tokens,
            counters={
                "prefix_hits": now.prefix_hits,
                "prefix_hit_tokens": now.prefix_tokens,
                "preemptions": now.preemptions,
                "draft_tokens": now.drafts_proposed,
                "draft_tokens_accepted": now.drafts_accepted,
                "engine_steps": now.steps,
            },
        )

    def submit(self, runs: Sequence[Run]) -> EngineJob:
        """Admit a request.

        Raises:
            ApiError: The queue is full (429), or the engine has ended (503).
            InputError: A prompt does not fit.
        """
        if not self.is_alive:
            raise unavailable("this server cannot generate any more; restart it")
        now = self.engine.stats()
        num_places = max(0, self.engine.settings.max_running - now.running)
        num_waiting = self._num_waiting()
        if num_waiting >= self._max_waiting + num_places:
            raise overloaded(num_waiting)
        job = EngineJob(self, len(runs))
        with self._lock:
            self._jobs.add(job)
        try:
            for index, run in enumerate(runs):
                job.requests.append(self.engine.add(run.prompt_ids, run.params, _To(job, index)))
        except BaseException:
            job.abort()
            raise
        return job

    def forget(self, job: EngineJob) -> None:
        """Let go of a job; what is left of it is given up."""
        with self._lock:
            self._jobs.discard(job)
        for request in job.requests:
            if not request.is_done:
                self.engine.abort(request)

    def abort_all(self) -> None:
        """Give up all jobs and take no more; does not wait."""
        self.engine.stop()

    def close(self, timeout_s: float = 5.0) -> None:
        """Give up everything and wait for the threads, at most `timeout_s`."""
        self.engine.close(timeout_s)

    def _num_waiting(self) -> int:
        with self._lock:
            return sum(not job.has_begun for job in self._jobs)


class _To:
    """Posts to one index of a job."""

    def __init__(self, job: EngineJob, index: int) -> None:
        self._job, self._index = job, index

    def __call__(self, item: Delta | BaseException) -> None:
        self._job.post(self._index, item)
