"""The kernel of kernels/rows.cu in Numba CUDA, as `_numba_cuda_kernels` has that of step.cu."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fused_adam._codegen import Rule
from fused_adam.backends._cuda_source import THREADS, coefficients_of, rows_source
from fused_adam.backends._numba_cuda_kernels import asm, define, fields, on_device, printed
from fused_adam.backends._numba_kernels import cached

# Of two numbers below 2**32: Numba's own // would be of 64 bits, which takes four times as long.
_QUOTIENT = "{ .reg .u32 x, y; cvt.u32.u64 x, $1; cvt.u32.u64 y, $2; div.u32 x, x, y; cvt.u64.u32 $0, x; }"


def source(rule: Rule, dtype: np.dtype[Any]) -> str:
    """kernel(_a) for the address of the arguments of `_cuda_source.rows_source`; all integers have 64 bits."""
    assert not (rule.zeroes or rule.counts), "as in rows.cu"
    size = dtype.itemsize
    made = rows_source(rule, dtype)
    a = {name: f"_int64({at})" for name, at in fields(made.arguments, "_a").items()}
    where = fields(made.gathered, "_s")
    s = {name: f"_int64({at})" for name, at in where.items()}
    states = [(name, f"_int64({where['states']} + {8 * k})") for k, name in enumerate(rule.states)]
    coefficients = [f"{name}, = _load1(_c + {k * size})" for k, name in enumerate(rule.coefficients)]

    def gradient(indent: str) -> list[str]:
        """Row number _j of those given."""
        lines = ["_n = _j", f"if {s['order']} != 0:", f"    _n = _int64({s['order']} + 8 * _j)"]
        lines.append(f"_x, = _load1_once({s['values']} + {size} * (_n * _width + _column))")
        return [indent + line for line in lines]

    # What the table holds is read where it is needed, as in rows.cu: held through the loop, it would spill.
    lines = [
        "def kernel(_a):",
        f"    _s = {a['table']} + {made.gathered.itemsize} * _int32({a['of_block']} + 4 * _cuda.blockIdx.x)",
        f"    _block, _width = _cuda.blockIdx.x - {s['first']}, {s['width']}",
        f"    _group = _quotient(_block, {s['pieces']})",
        f"    _first = _group * {s['each']}",
        f"    _left = (_block - _group * {s['pieces']}) * {a['chunk']}",
        f"    _columns = _min(_width - _left, {a['chunk']})",
        f"    _end = _columns * _min({s['count']} - _first, {s['each']})",
        f"    _c = {s['coefficients']}",
        *(f"    {line}" for line in coefficients),
        "    _i = 0 * _end + _cuda.threadIdx.x",
        "    while _i < _end:",
        "        _k = _quotient(_i, _columns)",
        "        _column = _left + _i - _k * _columns",
        "        _k += _first",
        "        _row, _at, _given = _k, _k, True",
        f"        if {s['met']} != 0:",
        f"            _at = _int64({s['met']} + 8 * _group)",
        f"            _end_of_rows = _past = _int64({s['met']} + 8 * _group + 8)",
        "            while _at < _past:",
        "                _middle = (_at + _past) >> 1",
        f"                if _int64({s['rows']} + 8 * _middle) < _row:",
        "                    _at = _middle + 1",
        "                else:",
        "                    _past = _middle",
        "            _given = False",
        "            if _at < _end_of_rows:",
        f"                _given = _int64({s['rows']} + 8 * _at) == _row",
        f"        elif {s['rows']} != 0:",
        f"            _row = _int64({s['rows']} + 8 * _k)",
        "        g = _number(0)",
        "        if _given:",
        "            _j, _last = _at, _at + 1",
        f"            if {s['starts']} != 0:",
        f"                _j, _last = _int64({s['starts']} + 8 * _at), _int64({s['starts']} + 8 * _at + 8)",
        *gradient("            "),
        "            g = _x",
        "            _j += 1",
        "            while _j < _last:",
        *gradient("                "),
        "                g = add(g, _x)",
        "                _j += 1",
        f"        if {s['variant']} != 0:",
        f"            _c = {s['coefficients']} + {coefficients_of(rule) * size} * _int64({s['variant']} + 8 * _k)",
        *(f"            {line}" for line in coefficients),
        f"        _e = {size} * (_row * _width + _column)",
        f"        p, = _load1({s['p']} + _e)",
        *(f"        {name}, = _load1_once({a} + _e)" for name, a in states),
        *(f"        {line.target} = {printed(line.value)}" for line in rule.assignments),
        f"        _store1({s['p']} + _e, (p,))",
        *(f"        _store1_once({a} + _e, ({name},))" for name, a in states),
        "        _i += _cuda.blockDim.x",
    ]
    return "\n".join(lines) + "\n"


def options(dtype: np.dtype[Any]) -> dict[str, Any]:
    """Blocks that a multiprocessor is to hold: with 4, the largest rules would spill in float64."""
    return {"launch_bounds": (THREADS, 4 if dtype == np.float32 else 3)}


@cache
def rows_kernel(rule: Rule, dtype: np.dtype[Any]) -> Any:
    """Launched as `_numba_cuda_kernels.kernel`, with the arguments of `_cuda_source.rows_source`."""
    quotient = asm(_QUOTIENT, types.int64, types.int64, types.int64)
    names = {**on_device(dtype), "_quotient": quotient, "_min": min}
    function = define(source(rule, dtype), rule.file, f"{rule.name}_{dtype}", names)
    return cached(lambda cache, **_: cuda.jit(cache=cache, **options(dtype))(function))
