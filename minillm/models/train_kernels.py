"""Compile and load `train_kernels.cpp`, once for each machine.

Why C++: between two matrix products PyTorch walks through memory once for every operation, and
its exponential takes three times as long as the memory does. Without a compiler everything works,
slower, by the operations that these replace.
"""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.models.native_code import load_library

SOURCE = Path(__file__).with_name("train_kernels.cpp")


def kernels_for(*tensors: Tensor) -> Any:
    """Return the library if it can take these tensors, else None."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return None  # `torch.func` has its own rules of differentiation
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    return load_kernels()


@functools.cache
def load_kernels() -> Any:
    """Return the compiled library, or None where it cannot be compiled."""
    if platform.system() != "Linux" or not SOURCE.exists():  # copied code comes without it
        return None
    options = ("-fno-math-errno", "-fno-trapping-math")
    return load_library(SOURCE, purpose="training on the CPU", options=options)


def call(function: Any, *args: Tensor | int) -> None:
    """Call a function of the library with tensors and sizes."""
    function(
        *(
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg)
            for arg in args
        )
    )
