"""Each rule as a C function that Numba compiles: ``void(row, first element, number of elements, coefficients)``.

row holds the addresses of p, g and the states as int64; the coefficients are float64 and are rounded once, on entry.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from fused_adam._codegen import Rule, numba_source
from fused_adam._storage import Format
from fused_adam.backends import HELD_AT_FORK, module

CHUNK = 2**16  # elements a thread takes at a time

# IEEE division vectorises; fastmath stays off: it changes bits.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "cache": True}


def cached(compile_with: Callable[..., Any]) -> Any:
    """compile_with(**options), without the disk cache where none is to be had: a rule typed in, a read-only system."""
    try:
        return compile_with(**OPTIONS)
    except (RuntimeError, ImportError) as error:
        if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
            raise
        return compile_with(**{**OPTIONS, "cache": False})


@intrinsic
def view_of(typingctx: Any, address: Any, lo: Any, n: Any, dtype: Any) -> Any:
    """The n elements of `dtype` from element `lo` behind an address, as an array."""
    element = dtype.dtype if isinstance(dtype, types.NumberClass) else dtype
    array = types.Array(element, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, lo, n, _ = args
        size = ir.Constant(ir.IntType(64), element.bitwidth // 8)
        result = context.make_array(array)(context, builder)
        start = builder.add(base, builder.mul(lo, size))
        data = builder.inttoptr(start, context.get_data_type(element).as_pointer())
        context.populate_array(result, data=data, shape=[n], strides=[size], itemsize=size, meminfo=None, parent=None)
        return result._getvalue()

    return array(address, lo, n, dtype), codegen


@numba.njit(inline="always")
def _maximum(a: Any, b: Any) -> Any:
    return a if a > b or a != a else b


@numba.njit(inline="always")
def _minimum(a: Any, b: Any) -> Any:
    return a if a < b or a != a else b


@numba.njit(inline="always")
def _sign(x: Any) -> Any:
    return type(x)(x > 0) - type(x)(x < 0)


_SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64, types.CPointer(types.float64))
_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
_NAMES: dict[str, Any] = {
    "_view": view_of,
    "_I64": types.int64,
    "_CHUNK": CHUNK,
    "sqrt": math.sqrt,
    "absolute": abs,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
}

_kernels: dict[tuple[Rule, np.dtype[Any] | Format], Any] = {}
_compiling = threading.Lock()


def kernel(rule: Rule, kept: np.dtype[Any] | Format) -> int:
    """The address of the rule's loop over numbers of one dtype, or kept in a format.

    Compiled on first use, then found in Numba's disk cache.
    """
    with _compiling:
        if (rule, kept) not in _kernels:
            if isinstance(kept, Format):
                stored = module("_numba_stored")
                _kernels[rule, kept] = compiled(rule, *stored.loop(rule, kept))
            else:
                _kernels[rule, kept] = compiled(rule, numba_source(rule), {"_T": numba.from_dtype(kept)}, str(kept))
        return int(_kernels[rule, kept].address)


def compiled(rule: Rule, source: str, names: dict[str, Any], tag: str) -> Any:
    """A loop from its source and the names in it. tag: what else it depends on."""
    scope = {"__name__": __name__, **_NAMES, **names}  # Numba imports a cached function's module
    # Compiled under the rules file's name, or Numba would find no place for its disk cache; the hash in the function's
    # name keeps a changed rule, shell or dtype from finding an old entry.
    exec(compile(source, rule.file, "exec"), scope)
    function = scope["kernel"]
    digest = hashlib.sha256(f"{source}{tag}{_HASH}".encode()).hexdigest()[:12]
    function.__name__ = function.__qualname__ = f"{rule.name}_{digest}"
    return cached(lambda **options: numba.cfunc(_SIGNATURE, **options)(function))


HELD_AT_FORK.append(global_compiler_lock)


def _after_fork() -> None:
    global _compiling
    _compiling = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
