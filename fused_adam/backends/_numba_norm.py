"""The global norm of gradients on the CPU (see `_norm`), on all threads: each adds blocks into digits of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from fused_adam._arrays import BLOCK, Array
from fused_adam._norm import LANES, LIMBS, Total
from fused_adam.backends._numba_kernels import CHUNK, view_of
from fused_adam.backends._numba_storage import from_bfloat16, from_float16
from fused_adam.backends.numba_cpu import COLUMNS, F64, I64, INTS, TABLE, Loops, launch

_KINDS = ("float32", "float64", "bfloat16", "float16")
_DIGIT = 0xFFFFFFFF
_FRACTION = (1 << 52) - 1
# Columns of what a thread found beside the digits: the sum of what is inf or NaN, and how many blocks were not finite.
_SPECIAL, _NOT_FINITE = 0, 1


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    """Those of a float64 as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(x), codegen


@numba.njit(inline="always")
def _add(x: Any, limbs: Any) -> None:
    bits = _bits(x)
    exponent, fraction = bits >> 52, bits & _FRACTION
    if exponent > 0:
        fraction |= 1 << 52
        exponent -= 1
    digit, shift = exponent >> 5, exponent & 31
    low, high = (fraction & _DIGIT) << shift, (fraction >> 32) << shift
    limbs[digit] += low & _DIGIT
    limbs[digit + 1] += (low >> 32) + (high & _DIGIT)
    limbs[digit + 2] += high >> 32


@numba.njit(inline="always")
def _block(x: Any, unscaling: Any, lanes: Any) -> Any:
    """The sum of squares of the 128 elements of x."""
    for lane in range(LANES):
        a = np.float64(x[4 * lane] * unscaling)
        b = np.float64(x[4 * lane + 1] * unscaling)
        c = np.float64(x[4 * lane + 2] * unscaling)
        d = np.float64(x[4 * lane + 3] * unscaling)
        lanes[lane] = ((a * a + b * b) + c * c) + d * d
    for k in range(16):
        lanes[k] += lanes[k + 16]
    for k in range(8):
        lanes[k] += lanes[k + 8]
    for k in range(4):
        lanes[k] += lanes[k + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@numba.njit(inline="always")
def _add_block(x: Any, scale: Any, lanes: Any, limbs: Any, found: Any) -> None:
    total = _block(x, scale, lanes)
    if np.isfinite(total):
        _add(total, limbs)
    else:
        found[_SPECIAL] += total
        for k in range(BLOCK):
            if not np.isfinite(x[k] * scale):
                found[_NOT_FINITE] = 1


@numba.njit(inline="always")
def _blocks(address: Any, lo: Any, n: Any, unscaling: Any, lanes: Any, limbs: Any, found: Any, dtype: Any) -> None:
    """Elements lo .. lo + n, of which lo is a multiple of 128."""
    rest = view_of(lanes.ctypes.data + 8 * LANES, 0, BLOCK, dtype)  # the last block, with what it lacks
    for start in range(lo, lo + n, BLOCK):
        x = view_of(address, start, BLOCK, dtype)
        size = min(BLOCK, lo + n - start)
        if size < BLOCK:
            for k in range(BLOCK):
                rest[k] = x[k] if k < size else dtype(0)
            x = rest
        _add_block(x, dtype(unscaling), lanes, limbs, found)


@numba.njit(inline="always")
def _decoded_blocks(
    address: Any, lo: Any, n: Any, unscaling: Any, lanes: Any, limbs: Any, found: Any, decode: Any
) -> None:
    """As `_blocks`, of what is kept in 16 bits: the norm is that of its float32 numbers."""
    x = view_of(lanes.ctypes.data + 8 * LANES, 0, BLOCK, np.float32)
    for start in range(lo, lo + n, BLOCK):
        stored = view_of(address, start, BLOCK, np.uint16)
        size = min(BLOCK, lo + n - start)
        for k in range(size):
            x[k] = decode(stored[k])
        for k in range(size, BLOCK):
            x[k] = np.float32(0)
        _add_block(x, np.float32(unscaling), lanes, limbs, found)


@numba.njit(inline="always")
def _chunk(rows: Any, r: Any, lo: Any, kinds: Any, unscaling: Any, lanes: Any, limbs: Any, found: Any) -> None:
    part, address = rows[r, 1], rows[r, COLUMNS + 1]
    n = min(CHUNK, rows[r, 0] - lo)
    if kinds[part] == 0:
        _blocks(address, lo, n, unscaling[part], lanes, limbs, found, np.float32)
    elif kinds[part] == 1:
        _blocks(address, lo, n, unscaling[part], lanes, limbs, found, np.float64)
    elif kinds[part] == 2:
        _decoded_blocks(address, lo, n, unscaling[part], lanes, limbs, found, from_bfloat16)
    else:
        _decoded_blocks(address, lo, n, unscaling[part], lanes, limbs, found, from_float16)


def _serial(rows: Any, first: Any, kinds: Any, unscaling: Any, lanes: Any, limbs: Any, found: Any) -> None:
    for r in range(rows.shape[0]):
        for lo in range(0, rows[r, 0], CHUNK):
            _chunk(rows, r, lo, kinds, unscaling, lanes[0], limbs[0], found[0])


def _parallel(rows: Any, first: Any, kinds: Any, unscaling: Any, lanes: Any, limbs: Any, found: Any) -> None:
    for k in numba.prange(first[-1]):
        r = np.searchsorted(first, k, side="right") - 1
        thread = numba.get_thread_id()
        _chunk(rows, r, (k - first[r]) * CHUNK, kinds, unscaling, lanes[thread], limbs[thread], found[thread])


_FLOATS = types.Array(F64, 1, "C")
_TABLE_OF_FLOATS = types.Array(F64, 2, "C")
LOOPS = Loops(
    [
        types.void(
            TABLE, INTS, INTS, types.Array(F64, 1, "C"), _TABLE_OF_FLOATS, types.Array(I64, 2, "C"), _TABLE_OF_FLOATS
        )
    ],
    _serial,
    _parallel,
)


def total(n: int, rows: Array, first: Array, kinds: Sequence[str], unscaling: Sequence[float]) -> Total:
    """Of the gradients of a step's table, n elements in all.

    kinds: what the gradients of each part are kept in. unscaling: what they are multiplied by.
    """
    threads = numba.config.NUMBA_NUM_THREADS
    # Lines of their own for each thread: what two cores write to one they fight for.
    lanes, limbs, found = (
        np.zeros((threads, LANES + BLOCK)),
        np.zeros((threads, LIMBS + 12), np.int64),
        np.zeros((threads, 16)),
    )
    numbers = np.array([_KINDS.index(kind) for kind in kinds], np.int64)
    launch(n, rows, first, numbers, np.array(unscaling), lanes, limbs, found, loops=LOOPS)
    return Total(limbs[:, :LIMBS].sum(0), float(found[:, _SPECIAL].sum()), not found[:, _NOT_FINITE].any())
