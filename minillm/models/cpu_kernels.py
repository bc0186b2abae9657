"""Compile and load `cpu_kernels.cpp`, once for each machine.

Why C++: on AVX2, torch's packed int8 and int4 products and inductor's loops over int8 stay below
1 GB/s for one vector, and fp32 products of 16 vectors at a quarter of the processor's peak
(docs/log.md has the numbers). Without a compiler everything works, slower: one log line says so.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger("minillm")

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-Wno-psabi")
_Pointer: Any = ctypes.c_void_p
_Int: Any = ctypes.c_int64


class Matrix(ctypes.Structure):
    """`Matrix` of the C++ file."""

    _fields_ = [("data", _Pointer), ("rows", _Int), ("columns", _Int), ("kind", _Int)]


@functools.cache
def load_kernels() -> Any:
    """Return the compiled library, or None where it cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler (g++): decoding on the CPU is slower without it")
        return None
    try:
        library = ctypes.CDLL(str(_compile(compiler)))
    except (OSError, subprocess.SubprocessError) as err:
        reason = str(getattr(err, "stderr", "") or err).strip().splitlines()[:1]
        logger.warning("decoding on the CPU is slower: no kernels: %s", *reason or ["unknown"])
        return None
    library.minillm_linear.argtypes = [_Pointer] * 3 + [_Int, ctypes.c_int]
    library.minillm_llama.argtypes = (
        [_Pointer, _Int, _Int] + [_Pointer] * 6 + [_Int, _Pointer, _Pointer, ctypes.c_int]
    )
    return library


def _compile(compiler: str) -> Path:
    """Compile into the user's cache unless that has been done for this source and processor."""
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line[:5] == "flags"][:1] if (
        cpu.exists()
    ) else [platform.processor()]  # fmt: skip
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    key = repr((SOURCE.read_bytes(), FLAGS, version, flags, platform.machine()))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(root) / "minillm" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            made.replace(target)
    return target
