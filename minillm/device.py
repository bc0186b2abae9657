"""Which device and dtype to compute with, how fast it can be, and how much memory is used."""

import ctypes
import gc
import os
import platform
import time

import torch

from minillm.errors import ConfigError, SetupError

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets; first match wins.
_PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A6000", 155e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 5090", 210e12),
    ("RTX 4090", 165e12),
    ("RTX 4080", 97e12),
    ("RTX 3090", 71e12),
    ("RTX 3080", 60e12),
    ("T4", 65e12),
    ("V100", 125e12),
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Let a CPU reuse the memory of one step in the next, instead of giving it back in between.

    The C library hands large blocks back to the system when they are freed, and the next step
    faults every page of them in again, some 5 % of its time. Only glibc can be told (`mallopt(3)`).
    The price: the process stays as large as its largest step.

    Returns:
        Whether it could be told.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def release_freed_memory() -> None:
    """Give what is free back to the system now, in spite of `keep_freed_memory`."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first of CUDA, MPS, CPU that is there.

    Raises:
        ConfigError: `name` is not a device.
        SetupError: That device is not in this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"`--device {name}` is not a device", hint="try `--device auto`"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"`--device {name}`: this machine has {torch.cuda.device_count()} CUDA devices",
            hint="try `--device auto`",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SetupError(f"`--device {name}`: no MPS here", hint="try `--device auto`")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"`--device {name}` is not supported", hint="try `--device auto`")
    return device


def has_bf16(device: torch.device) -> bool:
    """Tell whether `device` multiplies bf16 in hardware (emulation is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(probe())
    return False


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for `auto`, `fp32` or `bf16`."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


_best_matmul: dict[torch.dtype, float] = {}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that MFU is a share of; 0 when unknown.

    CUDA: the data sheet's dense bf16 figure, whatever the dtype. CPU: the best of several
    1024-cubed matmuls in `dtype` and of those at earlier calls (each some 0.1 s), so that an MFU
    of 1 means "as fast as this machine's own matmul". A run asks again at its evaluations: where
    other programs share the processor, one moment says little.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in _PEAK_FLOPS if key in name), 0.0)
    if device.type != "cpu":
        return 0.0
    a, b, out = (torch.ones(1024, 1024, dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b, out=out)  # new memory at every turn would be timed
        best = min(best, time.perf_counter() - start)
    _best_matmul[dtype] = max(_best_matmul.get(dtype, 0.0), 2 * 1024**3 / best)
    return _best_matmul[dtype]


def describe(device: torch.device) -> str:
    """Return the hardware in words, e.g. `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} (MPS)"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name"]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
