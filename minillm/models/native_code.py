"""Compile a C++ file of this package at first use, once for each machine, and load it.

A library is linked without OpenMP and finds PyTorch's, which is loaded already: threads of two
pools would spin against each other.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger("minillm")

COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17", "-Wno-psabi")


def load_library(
    source: Path, *, purpose: str, options: tuple[str, ...] = ()
) -> ctypes.CDLL | None:
    """Return the compiled library; None, with a line in the log, where it cannot be compiled.

    Args:
        source: The C++ file.
        purpose: What is slower without it, for the log.
        options: For the compiler, after `COMPILE`.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler (g++): %s is slower without it", purpose)
        return None
    try:
        return ctypes.CDLL(str(_compile(compiler, source, (*COMPILE, *options))))
    except (OSError, subprocess.SubprocessError) as err:
        reason = str(getattr(err, "stderr", "") or err).strip().splitlines()[:1]
        logger.warning("%s is slower: no kernels: %s", purpose, *reason or ["unknown"])
        return None


def _compile(compiler: str, source: Path, options: tuple[str, ...]) -> Path:
    """Compile into the user's cache unless that has been done for this source and processor."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith("flags")][:1] or lines[:1]
    version = _run(compiler, "--version")
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = repr((texts, options, version, flags, platform.machine()))
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(root) / "minillm" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled, library = Path(folder) / "code.o", Path(folder) / name
            _run(compiler, *options, "-c", "-o", str(compiled), str(source))
            _run(compiler, "-shared", "-o", str(library), str(compiled))
            library.replace(target)
    return target


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout
