"""States in eight bits: Adam's m and v as a ratio, rho = m / sqrt(v), and as s = sqrt(v). NumPy's side, as `_storage`.

No gradients take abs(rho) beyond a bound (Cauchy-Schwarz; 7.27 at the default betas), and where v = 0, m = 0: a code of
m never meets one of v for which the step would be large, as it can where m and v are kept apart.

64 elements, of one parameter, share two scales: float32 numbers with two explicit bits of mantissa, of which the upper
16 bits are kept, as (S_rho, S_v). The codes are an int8 for m, from -127 to 127, and a uint8 for v. All are 0 at first.

Decoded, each operation rounded to float32 and in this order, K_n being 1 / n rounded:

    x = q_v K_255; s = S_v (x x); v = s s; y = q_m K_127; m = (S_rho (y abs(y))) s

Encoded, after the step: s = sqrt(v), rho = m / s. With a the largest s, or abs(rho), of the block, a scale stays where
0.75 S < a <= S, and else becomes the least one that is not below a. (One that wandered would round the whole block
anew each time.) With I = 1 / S, or 0 for a scale of 0:

    q_v = min(255, max(1, floor(255 sqrt(s I_v) + r))), abs(q_m) = min(127, floor(127 sqrt(abs(rho) I_rho) + r'))

r and r' are a dither in place of random numbers: the upper 24 bits, as a fraction, of i N + t 0x9E3779B9 mod 2**32, for
the canonical index i, the step t, and one number N for v and another for m.

Some elements are not kept: both codes are 0, and the scales do not see them. These are elements whose m or v is inf or
NaN, by a gradient or by an overflow, and those whose v is below 2**-120 or at least 2**127: a decoded v could become
subnormal, and its root would not fit m, or infinite. Such an element goes on as if it had never had a gradient; the NaN
that IEEE arithmetic calls for is in the parameter, where the step has left it. So none ruins its block, nor can a state
be NaN or inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fused_adam._arrays import BLOCK, Array
from fused_adam._storage import BLOCK8, Call, constant, run

OF_V, OF_M, OF_T = 0x9E3779B1, 0x85EBCA77, 0x9E3779B9  # by which the dither of each is multiplied
LEAST_V, END_V = 0x03800000, 0x7F000000  # the bits of 2**-120 and 2**127
LARGEST_SCALE, LEAST_SCALE = 0x7F600000, 0x00800000
RHO, V = 0, 1  # columns of the scales


def _f32(x: float) -> Array:
    return np.array(x, np.float32)


# Below, fmin and fmax: minimum and maximum want their result by keyword.
_K255, _K127 = (_f32(float(np.float32(1) / np.float32(n))) for n in (255, 127))  # of no dimension, as all constants
_ZERO, _ONE, _THREE_QUARTERS, _127, _255 = map(_f32, (0, 1, 0.75, 127, 255))
_UNIT = _f32(2.0**-24)
_0, _8, _16 = map(constant, (0, 8, 16))
_MAGNITUDE, _INFINITY = constant(0x7FFFFFFF), constant(0x7F800000)
_LEAST_V, _RANGE_V = constant(LEAST_V), constant(END_V - LEAST_V)
_LARGEST_SCALE, _LEAST_SCALE = constant(LARGEST_SCALE), constant(LEAST_SCALE)
_ROUND_UP, _SCALE_BITS = constant(0x1FFFFF), constant(0xFFE00000)


def padded(n: int) -> int:
    """Elements of rows: as many as in whole blocks, of which there are at least two (see `_storage`)."""
    return -(-n // BLOCK) * BLOCK


class Scratch:
    """Rows for tiles of at most n elements."""

    def __init__(self, n: int) -> None:
        n = padded(n)
        self.a, self.b, self.c = (np.empty(n, np.uint32) for _ in range(3))
        self.kept, self.mask = np.empty(n, np.bool_), np.empty(n, np.bool_)
        numbers = np.arange(n, dtype=np.uint32)
        self.dither = {N: numbers * np.uint32(N) for N in (OF_V, OF_M)}
        # Of blocks: a scale before and after, its inverse, the largest element, and a bound.
        self.blocks = [np.empty(n // BLOCK8, np.float32) for _ in range(5)]
        self.masks = [np.empty(n // BLOCK8, np.bool_) for _ in range(2)]


def _scale(scales: Array, column: int, row: Array) -> list[Call]:
    """A column of the scales into a row of float32."""
    bits, blocks = row.view(np.uint32), len(scales)
    return [
        (np.copyto, (bits[blocks:], _0)),
        (np.copyto, (bits[:blocks], scales[:, column])),
        (np.left_shift, (bits, _16, bits)),
    ]


def _spread(row: Array, x: Array) -> Call:
    """A number of each block to its elements. Broadcast by itself, for a ufunc that broadcasts allocates."""
    return np.copyto, (x.reshape(-1, BLOCK8), row[:, np.newaxis])


def _largest(x: Array, spare: Array, row: Array) -> list[Call]:
    """The largest number of each block, into a row; one element of all blocks after the other."""
    blocks = row.size
    calls: list[Call] = [(np.copyto, (spare.reshape(BLOCK8, blocks), x.reshape(blocks, BLOCK8).T))]
    half = spare.size // 2
    while half >= blocks:
        calls.append((np.fmax, (spare[:half], spare[half : 2 * half], spare[:half])))
        half //= 2
    return [*calls, (np.copyto, (row, spare[:blocks]))]


def decode(q_m: Array, q_v: Array, scales: Array, m: Array, v: Array, scratch: Scratch) -> list[Call]:
    """Codes of n elements to float32 rows of `padded(n)`, whose end is left 0. scales: uint16, (blocks, 2)."""
    n, row = q_m.size, scratch.blocks[0][: m.size // BLOCK8]
    x = scratch.a.view(np.float32)[: m.size]
    return [
        (np.copyto, (v[n:], _ZERO)),
        (np.copyto, (m[n:], _ZERO)),
        (np.copyto, (v[:n], q_v)),
        (np.copyto, (m[:n], q_m)),
        (np.multiply, (v, _K255, v)),
        (np.multiply, (v, v, v)),
        *_scale(scales, V, row),
        _spread(row, x),
        (np.multiply, (x, v, v)),
        (np.multiply, (m, _K127, m)),
        (np.absolute, (m, x)),
        (np.multiply, (m, x, m)),
        *_scale(scales, RHO, row),
        _spread(row, x),
        (np.multiply, (x, m, m)),
        (np.multiply, (m, v, m)),
        (np.multiply, (v, v, v)),
    ]


def encode(
    m: Array, v: Array, q_m: Array, q_v: Array, scales: Array, first: int, t: int, scratch: Scratch
) -> list[Call]:
    """Rows of `padded(n)` float32, which are written over, to codes of n elements; the scales move where they have to.

    first: the canonical index of the first element. t: the step that made m and v.
    """
    n = q_m.size
    a, b, c = scratch.a[: m.size], scratch.b[: m.size], scratch.c[: m.size]
    kept, mask = scratch.kept[: m.size], scratch.mask[: m.size]
    rho, x = c.view(np.float32), a.view(np.float32)
    calls: list[Call] = [
        (np.copyto, (v[n:], _ZERO)),
        (np.subtract, (v.view(np.uint32), _LEAST_V, a)),
        (np.less, (a, _RANGE_V, kept)),
        (np.sqrt, (v, v)),
        (np.divide, (m, v, m)),
        (np.bitwise_and, (m.view(np.uint32), _MAGNITUDE, c)),
        (np.less, (c, _INFINITY, mask)),
        (np.logical_and, (kept, mask, kept)),
        (np.logical_not, (kept, mask)),
        (np.putmask, (v, mask, _ZERO)),
        (np.putmask, (c, mask, _0)),
    ]
    for column, row, top, multiplier in ((V, v, _255, OF_V), (RHO, rho, _127, OF_M)):
        rescaled, inverse = _rescale(scales, column, row, b.view(np.float32), scratch)
        calls += rescaled
        calls += [
            _spread(inverse, x),
            (np.multiply, (row, x, x)),
            (np.sqrt, (x, x)),
            (np.multiply, (top, x, x)),
            *_dither(multiplier, first, t, b, scratch),
            (np.add, (x, b.view(np.float32), x)),
            (np.floor, (x, x)),
        ]
        if column == V:
            calls += [
                (np.fmax, (x, _ONE, x)),
                (np.fmin, (x, _255, x)),
                (np.putmask, (x, mask, _ZERO)),
                (np.copyto, (q_v, x[:n], "unsafe")),
            ]
        else:
            calls += [
                (np.fmin, (x, _127, x)),
                (np.copysign, (x, m, x)),
                (np.copyto, (q_m, x[:n], "unsafe")),
            ]
    return calls


def _rescale(scales: Array, column: int, x: Array, spare: Array, scratch: Scratch) -> tuple[list[Call], Array]:
    """Scales for a row of numbers that are not negative, and where their inverses will be."""
    blocks = len(scales)
    old, new, inverse, largest, bound = (r[: x.size // BLOCK8] for r in scratch.blocks)
    stays, mask = (r[: x.size // BLOCK8] for r in scratch.masks)
    bits = new.view(np.uint32)
    calls: list[Call] = [
        *_scale(scales, column, old),
        *_largest(x, spare, largest),
        (np.multiply, (_THREE_QUARTERS, old, bound)),
        (np.less, (bound, largest, stays)),
        (np.less_equal, (largest, old, mask)),
        (np.logical_and, (stays, mask, stays)),
        (np.fmin, (largest.view(np.uint32), _LARGEST_SCALE, bits)),
        (np.add, (bits, _ROUND_UP, bits)),
        (np.bitwise_and, (bits, _SCALE_BITS, bits)),
        (np.less, (bits, _LEAST_SCALE, mask)),
        (np.putmask, (new, mask, _ZERO)),
        (np.putmask, (new, stays, old)),
        (np.divide, (_ONE, new, inverse)),
        (np.equal, (new, _ZERO, mask)),
        (np.putmask, (inverse, mask, _ZERO)),
        (np.copyto, (scales[:, column], bits.view(np.uint16)[1 : 2 * blocks : 2])),
    ]
    return calls, inverse


def _dither(multiplier: int, first: int, t: int, b: Array, scratch: Scratch) -> list[Call]:
    """Into b, as float32."""
    offset = constant((first * multiplier + t * OF_T) & 0xFFFFFFFF)
    return [
        (np.add, (scratch.dither[multiplier][: b.size], offset, b)),
        (np.right_shift, (b, _8, b)),
        (np.copyto, (b.view(np.float32), b)),
        (np.multiply, (b.view(np.float32), _UNIT, b.view(np.float32))),
    ]


CODES = {"m": np.dtype(np.int8), "v": np.dtype(np.uint8)}


def blocks(n: int) -> int:
    """That n elements of one parameter take."""
    return -(-n // BLOCK8)


def to_floats(q_m: Array, q_v: Array, scales: Array) -> dict[str, Array]:
    """m and v of codes, 1-D."""
    m, v = np.zeros((2, padded(q_m.size)), np.float32)
    if q_m.size:
        run(decode(q_m, q_v, scales.reshape(-1, 2), m, v, Scratch(q_m.size)))
    return {"m": m[: q_m.size], "v": v[: q_m.size]}


def from_floats(m: Array, v: Array, first: int, t: int) -> dict[str, Array]:
    """Codes of m and v, 1-D, as step t would have made them, and their scales. first: as of `encode`."""
    n = m.size
    rows = np.zeros((2, padded(n)), np.float32)
    rows[:, :n] = m, v
    q_m, q_v, scales = np.zeros(n, np.int8), np.zeros(n, np.uint8), np.zeros((blocks(n), 2), np.uint16)
    if n:
        run(encode(rows[0], rows[1], q_m, q_v, scales, first, t, Scratch(n)))
    return {"m": q_m, "v": q_v, "scales": scales.reshape(-1)}


def check_codes(name: str, given: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises ValueError for what are no saved codes of a parameter."""
    found = np.asarray(given)
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{name} has shape {found.shape} and dtype {found.dtype}; expected {shape} and {dtype}")


def checked_scales(name: str, given: Any, q_m: Array) -> Array:
    """Those of saved codes. Raises TypeError or ValueError."""
    scales = np.array(given)
    wanted = 2 * blocks(q_m.size)
    if scales.dtype != np.uint16 or scales.shape != (wanted,):
        raise ValueError(f"{name} has shape {scales.shape} and dtype {scales.dtype}; expected ({wanted},) and uint16")
    if (block := first_corrupt(q_m, scales.reshape(-1, 2))) >= 0:
        raise ValueError(f"{name}: block {block}, of elements from {BLOCK8 * block} on, holds what no step has made")
    return scales


def first_corrupt(q_m: Array, scales: Array) -> int:
    """The first block that no `encode` has made, -1 if there is none: a scale that is not one, or the code -128."""
    bad = np.atleast_1d(wrong_scales(scales).any(1))
    bad[np.flatnonzero(q_m == -128) // BLOCK8] = True
    found = np.flatnonzero(bad)
    return int(found[0]) if found.size else -1


def wrong_scales(scales: Array) -> Array:
    """Which of these, uint16, are none."""
    s = np.asarray(scales, np.uint16)
    wrong: Array = ((s & np.uint16(0x801F)) != 0) | (s > np.uint16(LARGEST_SCALE >> 16))
    wrong |= (s != 0) & (s < np.uint16(LEAST_SCALE >> 16))
    return wrong
