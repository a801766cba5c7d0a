"""Steps over some rows of a parameter: loops that find their addresses as they go, in the caches of each thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fused_adam._arrays import Array, address
from fused_adam._sparse import Gather
from fused_adam.backends._numba_kernels import CHUNK, view_of
from fused_adam.backends.numba_cpu import COEFFICIENTS, F64, I64, INTS, TABLE, Loops, call, chunk

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


# What the columns of the table of moves hold: numbers; addresses, of which those of what there is not are 0; and from
# FIRST_ARRAY on the addresses of p and the states. TURN: rows a thread takes at a time. GIVEN: how many of ROWS have
# gradients, which are number SOURCE of VALUES. LINES: of coefficients, LINE each.
(
    COUNT, WIDTH, ITEMSIZE, EVERY, TURN, KERNEL, GIVEN, ROWS,
    SOURCE, VARIANT, LINES, LINE, STEPS, ROW_STEPS, ZEROS, VALUES, FIRST_ARRAY,
) = range(17)  # fmt: skip
_MOST_PIECES = 2**12  # of a turn


@numba.njit(inline="always")
def _turn(move: Any, lo: Any, pieces: Any) -> None:
    """Moving rows from number lo. Neighbours that find their gradients side by side, or have none, are one piece.

    pieces: room for them: elements, variant, addresses of g, p and the states, in the kernel's order.
    """
    hi, size, given_rows = min(move[COUNT], lo + move[TURN]), move[WIDTH] * move[ITEMSIZE], move[GIVEN]
    rows = view_of(move[ROWS], 0, given_rows, I64)
    source = view_of(move[SOURCE], 0, given_rows, I64)
    variant = view_of(move[VARIANT], 0, move[COUNT] if move[VARIANT] else 0, I64)
    arrays = pieces.shape[1] - 2
    used, given = 0, False
    k = np.searchsorted(rows, lo) if move[EVERY] else lo
    for j in range(lo, hi):
        row = j if move[EVERY] else rows[j]
        before, given = given, k < given_rows and rows[k] == row
        start = row * size
        if (
            used > 0
            and given == before
            and pieces[used - 1, 2] + pieces[used - 1, 0] * move[ITEMSIZE] == move[FIRST_ARRAY] + start
            and (not given or source[k] == source[k - 1] + 1)
            and (variant.size == 0 or variant[j] == variant[j - 1])
        ):
            pieces[used - 1, 0] += move[WIDTH]
        else:
            pieces[used, 0] = move[WIDTH]
            pieces[used, 1] = variant[j] if variant.size else 0
            pieces[used, 2] = move[FIRST_ARRAY] + start
            pieces[used, 3] = move[VALUES] + source[k] * size if given else move[ZEROS]
            for state in range(1, arrays - 1):
                pieces[used, 3 + state] = move[FIRST_ARRAY + state] + start
            used += 1
        k += given
    for r in range(used):
        if r + _AHEAD < used:
            for column in range(2, pieces.shape[1]):
                for byte in range(0, min(pieces[r + _AHEAD, 0] * move[ITEMSIZE] + _LINE - 1, 8 * _LINE), _LINE):
                    prefetch(pieces[r + _AHEAD, column] + byte)
        line = view_of(move[LINES], pieces[r, 1] * move[LINE], move[LINE], F64)
        for start in range(0, pieces[r, 0], CHUNK):
            call(move[KERNEL], pieces[r, 2:], start, min(CHUNK, pieces[r, 0] - start), line)


@numba.njit(inline="always")
def _unit(k: Any, rows: Any, first: Any, kernels: Any, coefficients: Any, moves: Any, turns: Any, pieces: Any) -> None:
    """Number k of the chunks of ordinary rows, as in `numba_cpu`, and then of the turns of moves."""
    if k < first[-1]:
        r = np.searchsorted(first, k, side="right") - 1
        chunk(rows, kernels, coefficients, r, (k - first[r]) * CHUNK)
    else:
        turn = k - first[-1]
        m = np.searchsorted(turns, turn, side="right") - 1
        _turn(moves[m], (turn - turns[m]) * moves[m, TURN], pieces)


@numba.njit(inline="always")
def _commit(moves: Any, t: Any, t_new: Any) -> None:
    for move in moves:
        if move[STEPS]:
            steps = view_of(move[STEPS], 0, move[COUNT], I64)
            rows = view_of(move[ROWS], 0, move[GIVEN], I64)
            for j in range(move[COUNT]):
                view_of(move[ROW_STEPS], j if move[EVERY] else rows[j], 1, I64)[0] = steps[j]
    t[0] = t_new


def _serial(
    rows: Any, first: Any, kernels: Any, coefficients: Any, moves: Any, turns: Any, pieces: Any, t: Any, t_new: Any
) -> None:
    for k in range(first[-1] + turns[-1]):
        _unit(k, rows, first, kernels, coefficients, moves, turns, pieces[0])
    _commit(moves, t, t_new)


def _parallel(
    rows: Any, first: Any, kernels: Any, coefficients: Any, moves: Any, turns: Any, pieces: Any, t: Any, t_new: Any
) -> None:
    for k in numba.prange(first[-1] + turns[-1]):
        _unit(k, rows, first, kernels, coefficients, moves, turns, pieces[numba.get_thread_id()])
    _commit(moves, t, t_new)


_PIECES = types.Array(I64, 3, "C")
LOOPS = Loops([types.void(TABLE, INTS, INTS, COEFFICIENTS, TABLE, INTS, _PIECES, INTS, I64)], _serial, _parallel)


class Moves:
    """The rows that move in one step, parameter by parameter. What the addresses point to lives as long as it does."""

    def __init__(self) -> None:
        self.n = 0  # elements
        self._moves: list[list[int]] = []
        self._alive: list[Array] = []

    def add(self, kernel: int, row: Sequence[Array], values: Array, moved: Gather) -> None:
        """row: p and the states. values: the checked gradients."""
        w, size = moved.width, row[0].size
        g, source = moved.summed(values)
        zeros = np.zeros(max(w, CHUNK) if moved.every else 0, g.dtype)  # a piece is no longer
        lines = np.array(moved.coefficients, np.float64)
        turn = max(1, min(_MOST_PIECES, CHUNK // max(w, 1)))
        arrays = [moved.rows, source, moved.variant, lines, moved.steps, moved.row_steps, zeros, g, *row]
        numbers = [moved.moving, w, g.itemsize, moved.every, turn, kernel, len(moved.rows)]
        addresses = [0 if a is None else address(a) for a in arrays]
        self._moves.append([*numbers, *addresses[:4], lines.shape[-1], *addresses[4:]])
        self._alive += [a for a in arrays if a is not None]
        self.n += moved.moving * w if size else 0

    def arguments(self) -> tuple[Array, Array, Array]:
        """moves, turns and pieces, as the loops take them."""
        widest = max(map(len, self._moves))
        moves = np.array([move + [0] * (widest - len(move)) for move in self._moves], np.int64)
        turns = np.where(moves[:, WIDTH] > 0, -(-moves[:, COUNT] // moves[:, TURN]), 0)
        room = (numba.config.NUMBA_NUM_THREADS, int(moves[:, TURN].max()), widest - FIRST_ARRAY + 3)
        return moves, np.concatenate([[0], turns.cumsum()]), np.empty(room, np.int64)
