"""Steps over some rows of a parameter: loops that find their addresses as they go, in the caches of each thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fused_adam._arrays import Array, address
from fused_adam._sparse import Gather
from fused_adam.backends.numba_cpu import CHUNK, COEFFICIENTS, I64, INTS, Loops, call

_AHEAD = 8  # pieces for whose memory it asks early: that of scattered rows no processor foresees
_LINE = 64  # bytes of the cache


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line of an address, into the second level: the first is too small to wait for so many."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], byte), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(address), codegen


@numba.njit(inline="always")
def _turn(
    lo: Any, hi: Any, w: Any, itemsize: Any, every: Any, bases: Any, rows: Any, source: Any, variant: Any, kernel: Any,
    coefficients: Any,
) -> None:  # fmt: skip
    """Moving rows lo to hi. Neighbours that find their gradients side by side, or have none, are one piece."""
    pieces = np.empty((hi - lo, bases.size + 1), np.int64)  # elements, variant, addresses of p, g and the states
    used, given = 0, False
    k = np.searchsorted(rows, lo) if every else lo
    for j in range(lo, hi):
        row = j if every else rows[j]
        before, given = given, k < rows.size and rows[k] == row
        start = row * w * itemsize
        if (
            used > 0
            and given == before
            and pieces[used - 1, 2] + pieces[used - 1, 0] * itemsize == bases[2] + start
            and (not given or source[k] == source[k - 1] + 1)
            and (variant.size == 0 or variant[j] == variant[j - 1])
        ):
            pieces[used - 1, 0] += w
        else:
            pieces[used, 0] = w
            pieces[used, 1] = variant[j] if variant.size else 0
            pieces[used, 2] = bases[2] + start
            pieces[used, 3] = bases[1] + source[k] * w * itemsize if given else bases[0]
            for state in range(3, bases.size):
                pieces[used, state + 1] = bases[state] + start
            used += 1
        k += given
    for r in range(used):
        if r + _AHEAD < used:
            for column in range(2, pieces.shape[1]):
                for byte in range(0, min(pieces[r + _AHEAD, 0] * itemsize + _LINE - 1, 8 * _LINE), _LINE):
                    prefetch(pieces[r + _AHEAD, column] + byte)
        for start in range(0, pieces[r, 0], CHUNK):
            n = min(CHUNK, pieces[r, 0] - start)
            call(kernel, pieces[r, 2:], start, n, coefficients[pieces[r, 1]])


_ROWS = [types.void(I64, I64, I64, types.boolean, INTS, INTS, INTS, INTS, I64, COEFFICIENTS)]


def _serial(
    count: Any, w: Any, itemsize: Any, every: Any, bases: Any, rows: Any, source: Any, variant: Any, kernel: Any,
    coefficients: Any,
) -> None:  # fmt: skip
    each = max(1, CHUNK // w)
    for lo in range(0, count, each):
        hi = min(count, lo + each)
        _turn(lo, hi, w, itemsize, every, bases, rows, source, variant, kernel, coefficients)


def _parallel(
    count: Any, w: Any, itemsize: Any, every: Any, bases: Any, rows: Any, source: Any, variant: Any, kernel: Any,
    coefficients: Any,
) -> None:  # fmt: skip
    each = max(1, CHUNK // w)
    for turn in numba.prange((count + each - 1) // each):
        hi = min(count, (turn + 1) * each)
        _turn(turn * each, hi, w, itemsize, every, bases, rows, source, variant, kernel, coefficients)


LOOPS = Loops(_ROWS, _serial, _parallel)


class Move(NamedTuple):
    """A step of the rows of one parameter that move, ready to run. alive: what its addresses point to."""

    n: int
    arguments: tuple[Any, ...]
    alive: tuple[Array, ...]


def move(kernel: int, row: Sequence[Array], values: Array, moved: Gather) -> Move | None:
    """row: p and the states. values: the checked gradients. None if nothing moves."""
    w = moved.width
    count = row[0].size // max(w, 1) if moved.every else len(moved.rows)
    if not row[0].size or not count:
        return None
    g, source = moved.summed(values)
    zeros = np.zeros(max(w, CHUNK) if moved.every else 0, g.dtype)  # a piece is no longer
    bases = np.array([address(a) for a in (zeros, g, *row)], np.int64)
    variant = np.zeros(0, np.int64) if moved.variant is None else moved.variant
    coefficients = np.array(moved.coefficients, np.float64)
    about = (count, w, g.itemsize, moved.every, bases, moved.rows, source, variant, kernel, coefficients)
    return Move(count * w, about, (zeros, g, *row))
