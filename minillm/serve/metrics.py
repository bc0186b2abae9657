"""What Prometheus reads: counts, gauges and how long answers take. Own registry, no globals."""

import time
from collections.abc import AsyncIterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minillm.models.generator import Delta
from minillm.serve.backend import Job, Run, Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "minillm_requests", "Requests by outcome.", ["outcome"], registry=own
        )
        self.by_key = Counter("minillm_key_uses", "Requests by key.", ["key"], registry=own)
        self.prompt_tokens = Counter("minillm_prompt_tokens", "Tokens read.", registry=own)
        self.answer_tokens = Counter("minillm_generation_tokens", "Tokens made.", registry=own)
        self.running = Gauge("minillm_requests_running", "Answers in work.", registry=own)
        self.waiting = Gauge("minillm_requests_waiting", "Requests waiting.", registry=own)
        self.cache = Gauge("minillm_cache_usage_ratio", "Share of the cache in use.", registry=own)
        self.first = Histogram(
            "minillm_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=own,
        )
        self.whole = Histogram(
            "minillm_request_seconds",
            "From the request to its last token.",
            buckets=SECONDS,
            registry=own,
        )
        self._totals: dict[str, Gauge] = {}

    def render(self, stats: Stats) -> bytes:
        """Return everything as Prometheus text."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.cache.set(stats.cache_usage)
        for name, value in stats.counters.items():
            if name not in self._totals:
                title = name.replace("_", " ") + " since the start"
                self._totals[name] = Gauge(f"minillm_{name}", title, registry=self.registry)
            self._totals[name].set(value)
        return generate_latest(self.registry)

    def watch(self, job: Job, runs: Sequence[Run]) -> "WatchedJob":
        """Return `job`, counted while it is read."""
        return WatchedJob(job, self, sum(len(run.prompt_ids) for run in runs))


class WatchedJob:
    """A job whose deltas are counted as they pass."""

    def __init__(self, job: Job, metrics: Metrics, prompt_tokens: int) -> None:
        self._job, self._metrics = job, metrics
        self._start = time.perf_counter()
        metrics.prompt_tokens.inc(prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index of the run, delta)."""
        metrics, outcome, is_first = self._metrics, "aborted", True
        try:
            async for index, delta in self._job:
                if is_first:
                    metrics.first.observe(time.perf_counter() - self._start)
                    is_first = False
                metrics.answer_tokens.inc(len(delta.token_ids))
                if delta.finish_reason not in (None, "cancelled"):
                    outcome = "finished"
                yield index, delta
        except Exception:
            outcome = "failed"
            raise
        finally:
            metrics.requests.labels(outcome).inc()
            metrics.whole.observe(time.perf_counter() - self._start)

    def abort(self) -> None:
        """Give up what is not done."""
        self._job.abort()
