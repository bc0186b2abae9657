"""Workers: results in the order of the jobs, few under way, a death that is noticed."""

import math
import os
from collections.abc import Iterator

import pytest

from minillm.data.worker_pool import count_workers, start_workers
from minillm.errors import RunError


def test_results_come_in_order_and_jobs_are_taken_as_needed() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    with start_workers(2) as workers:
        results = workers.map(math.sqrt, jobs())
        first = [next(results) for _ in range(3)]
        assert len(taken) < 20
        assert first + list(results) == [math.sqrt(number) for number in range(200)]
        with pytest.raises(RunError, match="a worker process died"):
            list(workers.map(os._exit, [1]))


def test_one_worker_is_this_process() -> None:
    with start_workers(1) as workers:
        assert list(workers.map(lambda _: os.getpid(), [0])) == [os.getpid()]


@pytest.mark.parametrize(
    ("asked", "size", "wanted"), [(3, 1, 3), (0, 1, 1), (0, 0, 1), (0, 10**12, os.cpu_count())]
)
def test_little_input_gets_few_workers(asked: int, size: int, wanted: int) -> None:
    assert count_workers(asked, size, 1_000_000) <= wanted
