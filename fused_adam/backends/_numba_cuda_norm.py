"""The kernel of kernels/norm.cu in Numba CUDA: the same blocks, the same order of additions, the same digits.

It knows no warps. What threads have for each other goes through shared memory, so that any number of them will do, as
in Numba's simulator.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fused_adam._arrays import BLOCK
from fused_adam._norm import LANES, LIMBS
from fused_adam.backends._cuda_source import KINDS, SCALAR, SUMS, norm_source
from fused_adam.backends._numba_cuda_kernels import OPTIONS, asm, define, fields, find, on_device
from fused_adam.backends._numba_kernels import cached

SET = 72  # int64 of a sum: digits, and the flags behind them
COPIES = SUMS // SET
INFINITE, NOT_A_NUMBER, NOT_FINITE = 1, 2, 4  # flags: sums that are, and elements that are not
TILE = 32  # blocks of 128 elements that threads have in shared memory at once
# Numbers between a block's first lane and the next one's there: one more than a block has, so that threads that read of
# a block each read from different banks.
ROW = LANES + 1
_FRACTION, _SPECIAL, _DIGIT = (1 << 52) - 1, 0x7FF << 52, (1 << 32) - 1  # bits of a float64
_NARROW, _WIDE, _BYTE = (KINDS[np.dtype(t)] for t in (np.float32, np.float64, np.uint8))


def _is_special(x: str) -> str:
    """Inf or NaN; of a float64."""
    return f"_bits({x}) & {_SPECIAL} == {_SPECIAL}"


def source(dtype: np.dtype[Any]) -> str:
    """kernel(_a) for the address of the arguments of `_cuda_source.norm_source`; all integers have 64 bits."""
    size = dtype.itemsize
    made = norm_source(dtype)
    a, s = fields(made.arguments, "_a"), fields(made.segment, "_segment")
    scale = fields(SCALAR, a["scale"])
    squares = [f"_multiply(_y{k}, _y{k})" for k in range(4)]
    at = [f"_lanes[_at + {k}]" for k in range(LANES)]
    lines = [
        "def kernel(_a):",
        f"    _lanes = _cuda.shared.array({TILE * ROW}, _f64)",
        f"    _first = _cuda.shared.array({TILE}, _i64)  # of the three digits that a block's sum is cut into",
        f"    _low = _cuda.shared.array({TILE}, _i64)",
        f"    _middle = _cuda.shared.array({TILE}, _i64)",
        f"    _high = _cuda.shared.array({TILE}, _i64)",
        *find(made),
        f"    _g, _chunk = _int64(_gradient), _int64({a['chunk']})",
        f"    _sums = _int64({a['sums']}) + {8 * SET} * (_cuda.blockIdx.x & {COPIES - 1})",
        f"    _start = (_cuda.blockIdx.x - _int64({s['first']})) * _chunk",
        f"    _hi = _min(_start + _chunk, _int64({s['n']}))",
        "    _aligned = _g & 15 == 0",
        "    _thread, _flags = 0 * _hi + _cuda.threadIdx.x, 0 * _hi",
        "",
        f"    _kind, _x = _int64({scale['kind']}), _read_f64({scale['value']})",
        f"    if _kind == {_NARROW}:",
        f"        _x = _read_f32(_int64({scale['at']}))",
        f"    elif _kind == {_WIDE}:",
        f"        _x = _read_f64(_int64({scale['at']}))",
        f"    elif _kind == {_BYTE}:",
        f"        _x = 1.0 if _read_u8(_int64({scale['at']})) else 0.0",
        "    _unscaling = _narrow(_divide(1.0, _x))",
        f"    if not 0 < _bits(_widen(_unscaling)) < {_SPECIAL}:  # nor is the scale finite and positive",
        "        _unscaling = _nan",
        "",
        "    while _start < _hi:",
        f"        _blocks = _min((_hi - _start + {BLOCK - 1}) >> 7, {TILE})",
        "",
        "        # A lane of a block: four elements, 0 where there are none.",
        "        _i = _thread",
        f"        while _i < {LANES} * _blocks:",
        "            _e = _start + 4 * _i",
        f"            _at = _g + {size} * _e",
        "            _x0 = _x1 = _x2 = _x3 = _number(0)",
        "            if _aligned and _e + 4 <= _hi:",
        "                _x0, _x1, _x2, _x3 = _load_four(_at)",
        "            else:",
    ]
    for k in range(4):
        lines += [
            f"                if _e + {k} < _hi:",
            f"                    _x{k}, = _load1(_at + {k * size})",
        ]
    lines += [
        *(f"            _y{k} = _widen(multiply(_unscaling, _x{k}))" for k in range(4)),
        f"            _sum = _add(_add(_add({squares[0]}, {squares[1]}), {squares[2]}), {squares[3]})",
        f"            if {_is_special('_sum')}:",
        f"                if {' or '.join(_is_special(f'_y{k}') for k in range(4))}:",
        f"                    _flags |= {NOT_FINITE}",
        "            _lanes[_i + (_i >> 5)] = _sum",
        "            _i += _cuda.blockDim.x",
        "        _cuda.syncthreads()",
        "",
        "        # Eight lanes of each block, with the lanes that are 16, 8 and 24 behind.",
        "        _i = _thread",
        f"        while _i < {8 * TILE}:",
        f"            _at = {ROW} * (_i & {TILE - 1}) + (_i >> 5)",
        f"            if _i & {TILE - 1} < _blocks:",
        f"                {at[0]} = _add(_add({at[0]}, {at[16]}), _add({at[8]}, {at[24]}))",
        "            _i += _cuda.blockDim.x",
        "        _cuda.syncthreads()",
        "",
        "        # These eight, and the digits of the block's sum.",
        "        _i = _thread",
        "        while _i < _blocks:",
        f"            _at = {ROW} * _i",
        *(f"            _t{k} = _add({at[k]}, {at[k + 4]})" for k in range(4)),
        "            _sum = _bits(_add(_add(_t0, _t2), _add(_t1, _t3)))",
        f"            if _sum & {_SPECIAL} == {_SPECIAL}:",
        f"                _flags |= {INFINITE} if _sum & {_FRACTION} == 0 else {NOT_A_NUMBER}",
        "                _sum = 0",
        f"            _fraction, _place = _sum & {_FRACTION}, _sum >> 52",
        "            if _place > 0:",
        f"                _fraction |= {_FRACTION + 1}",
        "                _place -= 1",
        "            _shift = _place & 31",
        f"            _lower, _upper = (_fraction & {_DIGIT}) << _shift, (_fraction >> 32) << _shift",
        "            _first[_i] = _place >> 5",
        f"            _low[_i] = _lower & {_DIGIT}",
        f"            _middle[_i] = (_lower >> 32) + (_upper & {_DIGIT})",
        "            _high[_i] = _upper >> 32",
        "            _i += _cuda.blockDim.x",
        "        _cuda.syncthreads()",
        "",
        "        # A digit of the total, from all sums.",
        "        _i = _thread",
        f"        while _i < {LIMBS}:",
        "            _digit = _b = 0",
        "            while _b < _blocks:",
        "                _k = _i - _first[_b]",
        "                if _k == 0:",
        "                    _digit += _low[_b]",
        "                elif _k == 1:",
        "                    _digit += _middle[_b]",
        "                elif _k == 2:",
        "                    _digit += _high[_b]",
        "                _b += 1",
        "            if _digit != 0:",
        "                _add_to(_sums + 8 * _i, _digit)",
        "            _i += _cuda.blockDim.x",
        f"        _start += {TILE * BLOCK}",
        "    if _flags != 0:",
        f"        _or_to(_sums + {8 * LIMBS}, _flags)",
    ]
    return "\n".join(lines) + "\n"


@cache
def names(dtype: np.dtype[Any]) -> dict[str, Any]:
    """Those of `source` on a device, behind those that a rule's kernel has."""
    f32, f64, i64 = types.float32, types.float64, types.int64
    wide = on_device(np.dtype(np.float64))
    if dtype == np.float32:
        number, four = f32, "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];"
        widen, narrow = "cvt.f64.f32 $0, $1;", "cvt.rn.f32.f64 $0, $1;"
    else:
        number, four = f64, "ld.global.v2.f64 {$0, $1}, [$4]; ld.global.v2.f64 {$2, $3}, [$4+16];"
        widen = narrow = "mov.f64 $0, $1;"
    return {
        **on_device(dtype),
        **{f"_{name}": wide[name] for name in ("add", "multiply", "divide")},
        "_f64": np.float64,
        "_i64": np.int64,
        "_nan": dtype.type(np.nan),
        "_min": min,
        "_bits": asm("mov.b64 $0, $1;", i64, f64),
        "_widen": asm(widen, f64, number),
        "_narrow": asm(narrow, number, f64),
        "_load_four": asm(four, types.UniTuple(number, 4), i64, memory=True),
        "_read_f32": asm("{ .reg .f32 x; ld.global.f32 x, [$1]; cvt.f64.f32 $0, x; }", f64, i64, memory=True),
        "_read_f64": asm("ld.global.f64 $0, [$1];", f64, i64, memory=True),
        "_read_u8": asm("ld.global.u8 $0, [$1];", i64, i64, memory=True),
        "_add_to": asm("red.global.add.u64 [$0], $1;", types.void, i64, i64, memory=True),
        "_or_to": asm("red.global.or.b64 [$0], $1;", types.void, i64, i64, memory=True),
    }


@cache
def norm_kernel(dtype: np.dtype[Any]) -> Any:
    """Launched as `_numba_cuda_kernels.kernel`, with the arguments of `_cuda_source.norm_source`."""
    function = define(source(dtype), __file__, f"norm_{dtype}", names(dtype))
    return cached(lambda cache, **_: cuda.jit(cache=cache, **OPTIONS)(function))
