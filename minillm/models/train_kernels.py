"""Compile and load `train_kernels.cpp` and others of its kind, once for each machine and dtype.

Why C++: between two matrix products PyTorch walks through memory once for every operation, and
its exponential takes three times as long as the memory does. Without a compiler everything works,
slower, by the operations that these replace.
"""

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minillm.models.native_code import load_library

NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16"}

Kernel = Callable[..., None]


class Kernels:
    """The functions of a library for tensors of one dtype, e.g. `kernels.swiglu(gate, …)`.

    They take pointers and sizes as they stand in the C++ files; None is a null pointer.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Kernel:
        function = getattr(self._library, f"minillm_{name}")
        function.restype = None

        def call(*args: Tensor | float | None) -> None:
            function(*(_passed(arg) for arg in args))

        self.__dict__[name] = call
        return call


def kernels_for(*tensors: Tensor, dtype: torch.dtype | None = None) -> Kernels | None:
    """Return the functions that can take these tensors, all of one dtype on a CPU, else None."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return None  # `torch.func` has its own rules of differentiation
    dtype = dtype or tensors[0].dtype
    if any(t.dtype != dtype or t.device.type != "cpu" for t in tensors):
        return None
    if compute_dtype(tensors[0]) not in NUMBERS:  # autocast to fp16
        return None
    return load_kernels(dtype)


def kernels_of(x: Tensor) -> Kernels:
    """Return the functions for `x` where `kernels_for` has found them."""
    kernels = load_kernels(x.dtype)
    assert kernels is not None
    return kernels


def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the row passes for tensors of `dtype`, or None where there are none."""
    return load_source("train_kernels.cpp", dtype)


@functools.cache
def load_source(name: str, dtype: torch.dtype) -> Kernels | None:
    """Return the compiled functions of a C++ file beside this one, or None."""
    source = Path(__file__).with_name(name)
    if platform.system() != "Linux" or not source.exists():  # copied code comes without it
        return None
    if dtype not in NUMBERS:
        return None
    options = ("-fno-math-errno", "-fno-trapping-math", f"-DNUMBER={NUMBERS[dtype]}")
    library = load_library(source, purpose="training on the CPU", options=options)
    return None if library is None else Kernels(library)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of `x` are computed here."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _passed(arg: Tensor | float | None) -> object:
    """Return an argument as C++ takes it."""
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if arg is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(arg) if isinstance(arg, int) else ctypes.c_float(arg)
