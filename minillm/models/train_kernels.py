"""Compile and load `train_kernels.cpp`, once for each machine.

Why C++: between two matrix products PyTorch walks through memory once for every operation, and
its exponential takes three times as long as the memory does. Without a compiler everything works,
slower, by the operations that these replace.

The library has no OpenMP of its own but finds PyTorch's, which is loaded already: threads of two
pools would spin against each other.
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

import torch
from torch import Tensor

logger = logging.getLogger("minillm")

SOURCE = Path(__file__).with_name("train_kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


def kernels_for(*tensors: Tensor) -> Any:
    """Return the library if it can take these tensors, else None."""
    if torch.compiler.is_compiling():
        return None
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    return load_kernels()


@functools.cache
def load_kernels() -> Any:
    """Return the compiled library, or None where it cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or platform.system() != "Linux" or not SOURCE.exists():
        return None
    try:
        return ctypes.CDLL(str(_compile(compiler)))
    except (OSError, subprocess.SubprocessError) as err:
        reason = str(getattr(err, "stderr", "") or err).strip().splitlines()[:1]
        logger.warning("training on the CPU is slower: no kernels: %s", *reason or ["unknown"])
        return None


def call(function: Any, *args: Tensor | int) -> None:
    """Call a function of the library with tensors and sizes."""
    function(
        *(
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg)
            for arg in args
        )
    )


def _compile(compiler: str) -> Path:
    """Compile into the user's cache unless that has been done for this source and processor."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith("flags")][:1] or lines[:1]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    key = repr((SOURCE.read_bytes(), FLAGS, version, flags, platform.machine()))
    name = f"train-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(root) / "minillm" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            object_file, library = Path(folder) / "train.o", Path(folder) / name
            for words in (
                [*FLAGS, "-std=c++17", "-c", "-o", str(object_file), str(SOURCE)],
                ["-shared", "-o", str(library), str(object_file)],  # no `-fopenmp`: see above
            ):
                subprocess.run(
                    [compiler, *words], capture_output=True, text=True, check=True, timeout=300
                )
            library.replace(target)
    return target
