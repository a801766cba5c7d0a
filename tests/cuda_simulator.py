"""Runs the Numba CUDA kernels of one dtype in Numba's simulator, which NUMBA_ENABLE_CUDASIM=1 chooses at its import.

    cuda_simulator.py float32          those of all rules
    cuda_simulator.py float32 rows     those over rows, of some
    cuda_simulator.py float32 norm     that of the norm

What a device does in one PTX instruction is here NumPy's operation on two scalars, and its memory is the host's.
Prints each rule, or case, that gave NumPy's bits, and raises at the first that did not.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import norm_cases
import numpy as np
import rows_cases
from host_kernel import HostKernel
from numba import config, cuda
from numba_cuda_cases import GUARDED, RULES, check

from fused_adam._codegen import Rule
from fused_adam.backends import _numba_cuda_kernels, _numba_cuda_norm, _numba_cuda_rows
from fused_adam.backends._cuda_source import RowsSource, source
from fused_adam.backends._numba_cuda_kernels import define

THREADS = 4  # of a block; each is a thread of Python's
SIZES = (0, 1, 3, 4, 127, 128, 129, 1000)


def stand_ins(dtype: np.dtype[Any]) -> dict[str, Any]:
    """What `on_device` is on a device."""
    number = dtype.type
    stored = {4: ctypes.c_float, 8: ctypes.c_double}[dtype.itemsize]

    def load(n: int) -> Callable[[int], Any]:
        def loaded(address: int) -> Any:
            assert address % (n * dtype.itemsize) == 0, "misaligned"
            return tuple(number(x) for x in (stored * n).from_address(address))

        return loaded

    def store(n: int) -> Callable[[int, Any], None]:
        def to(address: int, values: Any) -> None:
            assert address % (n * dtype.itemsize) == 0, "misaligned"
            assert len(values) == n and {type(x) for x in values} == {number}
            (stored * n).from_address(address)[:] = values

        return to

    names: dict[str, Any] = {
        "add": operator.add,
        "subtract": operator.sub,
        "multiply": operator.mul,
        "divide": operator.truediv,
        "sqrt": np.sqrt,
        "absolute": abs,
        "maximum": lambda a, b: a if a > b or a != a else b,
        "minimum": lambda a, b: a if b > a or a != a else b,
        "sign": lambda a: number(a > 0) - number(a < 0),
        "_number": number,
        "_min": min,
        "_quotient": operator.floordiv,
        "_int32": lambda address: ctypes.c_int32.from_address(address).value,
        "_int64": lambda address: ctypes.c_int64.from_address(address).value,
    }
    for n, suffix in itertools.product((1, 16 // dtype.itemsize), ("", "_once")):
        names |= {f"_load{n}{suffix}": load(n), f"_store{n}{suffix}": store(n)}
    return names


def stand_ins_of_norm(dtype: np.dtype[Any]) -> dict[str, Any]:
    """What `_numba_cuda_norm.names` is on a device."""
    number, names = dtype.type, stand_ins(dtype)
    lock = threading.Lock()

    def load_four(address: int) -> Any:
        each = 16 // dtype.itemsize
        return tuple(x for k in range(0, 4, each) for x in names[f"_load{each}"](address + k * dtype.itemsize))

    def converted(to: Any, of: Any) -> Callable[[Any], Any]:
        def convert(x: Any) -> Any:
            assert type(x) is of
            return to(x)

        return convert

    def update(operation: Callable[[int, int], int]) -> Callable[[int, Any], None]:
        def updated(address: int, x: Any) -> None:
            with lock:
                there = ctypes.c_uint64.from_address(address)
                there.value = operation(there.value, int(x))

        return updated

    return names | {
        "_f64": np.float64,
        "_i64": np.int64,
        "_nan": number(np.nan),
        "_add": operator.add,
        "_multiply": operator.mul,
        "_divide": np.divide,
        "_bits": lambda x: int(np.float64(x).view(np.int64)),
        "_widen": converted(np.float64, number),
        "_narrow": converted(number, np.float64),
        "_load_four": load_four,
        "_read_f32": lambda address: np.float64(ctypes.c_float.from_address(address).value),
        "_read_f64": lambda address: np.float64(ctypes.c_double.from_address(address).value),
        "_read_u8": lambda address: ctypes.c_uint8.from_address(address).value,
        "_add_to": update(operator.add),
        "_or_to": update(operator.or_),
    }


class Simulated(HostKernel):
    def __init__(self, rule: Rule, dtype: np.dtype[Any]) -> None:
        self.source = source(rule, dtype)
        kernel = cuda.jit(define(_numba_cuda_kernels.source(rule, dtype), rule.file, rule.name, stand_ins(dtype)))
        self.launch = lambda blocks, arguments: kernel[blocks, THREADS](arguments.ctypes.data)


def over_rows(made: RowsSource, rule: Rule, dtype: np.dtype[Any]) -> Callable[[int, Any], None]:
    kernel = cuda.jit(define(_numba_cuda_rows.source(rule, dtype), rule.file, rule.name, stand_ins(dtype)))
    return lambda blocks, arguments: kernel[blocks, THREADS](arguments.ctypes.data)


if __name__ == "__main__":
    assert config.ENABLE_CUDASIM
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of overflow and NaN
    dtype = np.dtype(sys.argv[1])
    if sys.argv[2:] == ["rows"]:
        for rule in rows_cases.RULES:
            rows_cases.check_few(rows_cases.Host(over_rows), rule, dtype)
            print(rule.name)
    if sys.argv[2:] == ["norm"]:
        names = stand_ins_of_norm(dtype)
        kernel = cuda.jit(define(_numba_cuda_norm.source(dtype), _numba_cuda_norm.__file__, "norm", names))
        for case in norm_cases.cases(dtype):
            norm_cases.check(lambda blocks, a: kernel[len(blocks), THREADS](a.ctypes.data), dtype, case)
            print(case)
    for rule in (*RULES, *GUARDED) if not sys.argv[2:] else ():
        kernel = Simulated(rule, dtype)
        for chunk, off in itertools.product((128, 256), (False, True)):
            check(kernel, rule, dtype, chunk, SIZES, off)
            check(kernel, rule, dtype, chunk, [300], off)
        print(rule.name)
