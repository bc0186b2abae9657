"""Compile and load `cpu_kernels.cpp`, once for each machine.

Why C++: on AVX2, torch's packed int8 and int4 products and inductor's loops over int8 stay below
1 GB/s for one vector, and fp32 products of 16 vectors at a quarter of the processor's peak
(docs/log.md has the numbers). Without a compiler everything works, slower: one log line says so.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

from minillm.models.native_code import load_library

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_Pointer: Any = ctypes.c_void_p
_Int: Any = ctypes.c_int64


class Matrix(ctypes.Structure):
    """`Matrix` of the C++ file."""

    _fields_ = [("data", _Pointer), ("rows", _Int), ("columns", _Int), ("kind", _Int)]


@functools.cache
def load_kernels() -> Any:
    """Return the compiled library, or None where it cannot be compiled."""
    library: Any = load_library(SOURCE, purpose="decoding on the CPU")
    if library is None:
        return None
    library.minillm_linear.argtypes = [_Pointer] * 3 + [_Int, ctypes.c_int]
    library.minillm_llama.argtypes = (
        [_Pointer, _Int, _Int] + [_Pointer] * 6 + [_Int] * 2 + [_Pointer] * 2 + [ctypes.c_int]
    )
    return library
