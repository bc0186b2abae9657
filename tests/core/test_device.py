"""The memory that a process keeps, counted by the system's own page faults; the peak of MFU."""

import platform
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from minillm import device

COUNT = """
import resource, torch
from minillm.device import keep_freed_memory
if {keeps}:
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):  # the first ones make the holes that the others fit into
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(*, keeps: bool) -> int:
    script = COUNT.format(keeps=keeps)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    pages = 60 * 40_000_000 // 4096
    assert count_faults(keeps=False) > pages * 0.9
    assert count_faults(keeps=True) < pages * 0.4


def test_a_busy_moment_does_not_lower_the_peak_for_the_rest_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, mm = torch.device("cpu"), torch.mm
    monkeypatch.setattr(device, "_best_matmul", {})

    def slow(*args: Any, **options: Any) -> None:
        time.sleep(0.5)
        mm(*args, **options)

    monkeypatch.setattr(torch, "mm", slow)
    busy = device.peak_flops(cpu, torch.float32)
    assert 0 < busy < 2 * 1024**3 / 0.5
    monkeypatch.setattr(torch, "mm", mm)
    alone = device.peak_flops(cpu, torch.float32)
    assert alone > busy
    monkeypatch.setattr(torch, "mm", slow)
    assert device.peak_flops(cpu, torch.float32) == alone
