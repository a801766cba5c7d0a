"""How numbers are kept: 16 bits, and float32 split over a bfloat16 parameter and 8 or 16 bits beside it.

A rule computes in float32. What is kept in fewer bits is decoded into float32 rows, the rule runs over these, and they
are encoded again: tile by tile, so that the rows stay in cache. Every backend does that with the same integers and the
same roundings, and so with the same bits; a NaN is always encoded as the one NaN of its format.

This is the description of the formats and NumPy's side. Its functions return ufunc calls with every view and constant
already made, which allocate nothing when they run, under ``np.errstate(all="ignore")``. A row x of float32 has as many
elements as the array that it is decoded from or encoded to, but never less than two, for to write one element in place
a ufunc allocates. bfloat16 is carried as uint16. Bytes are taken out of words by views: the machine is little-endian.

The split forms cut the bits of a float32 in two, as integers: ``bits = (p << 16) + (low << (16 - n))`` with a low part
of n bits that has a sign. So they hold subnormals, and know no boundary between binades.

split16: p = (bits + 0x8000) >> 16, low = bits mod 2**16. Every float32 comes back; p is the nearest bfloat16. Between
two, it is the one further from zero: to even would give one p 65,537 float32 numbers, of which 16 bits cannot tell.

split8: the same, of bits rounded to their upper 24. What rounds to infinity in 24 bits is infinity.

Rounding is to nearest even, or stochastic: away from zero with the probability of the part cut off, by 16 random bits
(see `_philox`). What is beyond a format's largest number is rounded to nearest all the same: the same finite numbers
become infinite as otherwise, and no others. Infinity, NaN and what a format holds exactly never change. What is
subnormal in float16 is rounded to 2**-37 before, to nearest, which is the last bit and 13 more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fused_adam._arrays import Array

Call = tuple[Callable[..., Any], tuple[Any, ...]]

BLOCK8 = 64  # elements of 8-bit states that share scales, and never lie in two parameters

NAN_BF16, NAN_F16 = 0x7FC0, 0x7E00


class Format(NamedTuple):
    """How a parameter and what belongs to it is kept.

    p, g: "float32", "float16" or "bfloat16". states: also "int8". master: None, "float32", "split16" or "split8".
    """

    p: str = "float32"
    g: str = "float32"
    states: str = "float32"
    master: str | None = None
    stochastic_rounding: bool = False


def constant(x: int, dtype: Any = np.uint32) -> Array:
    """An array of no dimension: an operand that no ufunc has to convert."""
    return np.array(x, dtype)


class Scratch:
    """Rows for tiles of at most n elements."""

    def __init__(self, n: int) -> None:
        n = max(n, 2)
        self.a, self.b, self.c = (np.empty(n, np.uint32) for _ in range(3))
        self.mask = np.empty(n, np.bool_)


def run(calls: Sequence[Call]) -> None:
    with np.errstate(all="ignore"):
        for f, arguments in calls:
            f(*arguments)


def _high(words: Array, n: int) -> Array:
    """The upper 16 bits of the first n words."""
    return words.view(np.uint16)[1 : 2 * n : 2]


_ONE, _16, _13, _8 = (constant(k) for k in (1, 16, 13, 8))
_MAGNITUDE = constant(0x7FFFFFFF)
_HALF16, _BELOW16 = constant(0x8000), constant(0x7FFF)  # of the last bit kept when 16 are cut off; one less
_HALF8, _BELOW8 = constant(0x80), constant(0x7F)
_NAN32, _NAN16 = constant(NAN_BF16 << 16), constant(NAN_BF16, np.uint16)


def decode(stored: Array, x: Array) -> list[Call]:
    """float16, or bfloat16 as uint16, to float32."""
    row = x[: stored.size]
    if stored.dtype == np.float16:
        return [(np.copyto, (row, stored))]
    bits = row.view(np.uint32)
    return [(np.copyto, (bits, stored)), (np.left_shift, (x.view(np.uint32), _16, x.view(np.uint32)))]


def encode(x: Array, stored: Array, scratch: Scratch, noise: Array | None = None) -> list[Call]:
    """float32 to float16, or to bfloat16 as uint16. noise: 16 random bits an element, for stochastic rounding."""
    n, bits = x.size, x.view(np.uint32)
    a, mask = scratch.a[:n], scratch.mask[:n]
    if stored.dtype == np.float16:
        words = stored.view(np.uint16)
        if noise is None:
            calls: list[Call] = [(np.copyto, (stored, x[: stored.size], "same_kind"))]
        else:
            calls = _to_float16(x, words, scratch, noise)
        nan = constant(NAN_F16, np.uint16)
    else:
        words, nan = stored, _NAN16
        if noise is None:
            calls = _nearest(bits, a, _16, _BELOW16)
        else:
            calls = _up_to(bits, scratch, noise, 0, 0x7F7F0000, _HALF16)
        calls += [(np.add, (a, bits, a)), (np.copyto, (stored, _high(a, stored.size)))]
    return [*calls, (np.not_equal, (x, x, mask)), (np.putmask, (words, mask[: stored.size], nan))]


def _nearest(bits: Array, a: Array, shift: Array, below: Array) -> list[Call]:
    """a becomes what has to be added to bits before the lower ones are cut off: half of the last, or less to even."""
    return [
        (np.right_shift, (bits, shift, a)),
        (np.bitwise_and, (a, _ONE, a)),
        (np.add, (a, below, a)),
    ]


def _up_to(bits: Array, scratch: Scratch, noise: Array, shift: int, largest: int, half: Array) -> list[Call]:
    """a becomes the upper bits of the noise, or half of the last bit kept from the largest number on. b: magnitudes."""
    n = bits.size
    a, b, mask = scratch.a[:n], scratch.b[:n], scratch.mask[:n]
    return [
        (np.copyto, (a[: noise.size], noise)),
        (np.right_shift, (a, constant(shift), a)),
        (np.bitwise_and, (bits, _MAGNITUDE, b)),
        (np.greater_equal, (b, constant(largest), mask)),
        (np.putmask, (a, mask, half)),
    ]


def _to_float16(x: Array, words: Array, scratch: Scratch, noise: Array) -> list[Call]:
    """Stochastically. Both ranges become integers whose lower 13 bits are cut off once the noise is added."""
    n, bits = x.size, x.view(np.uint32)
    a, b, c, mask = scratch.a[:n], scratch.b[:n], scratch.c[:n], scratch.mask[:n]
    fixed, least = c.view(np.float32), np.array(2.0**-14, np.float32)  # the smallest normal number
    return [
        *_up_to(bits, scratch, noise, 3, 0x477FE000, constant(0x1000)),
        (np.less, (b, constant(0x38800000), mask)),
        (np.add, (b.view(np.float32), least, fixed)),  # of a number below it, in units of 2**-37
        (np.subtract, (c, constant(0x38800000), c)),
        (np.subtract, (b, constant(0x38000000), b)),
        (np.putmask, (b, mask, c)),
        (np.add, (b, a, b)),
        (np.right_shift, (b, _13, b)),
        (np.fmin, (b, constant(0x7C00), b)),
        (np.right_shift, (bits, _16, a)),
        (np.bitwise_and, (a, _HALF16, a)),
        (np.bitwise_or, (a, b, a)),
        (np.copyto, (words, a[: words.size], "unsafe")),
    ]


def decode_split(p: Array, low: Array, x: Array, scratch: Scratch) -> list[Call]:
    """A bfloat16 parameter and the part beside it, uint16 or uint8, to float32."""
    n, bits, a = p.size, x.view(np.uint32), scratch.a[: x.size]
    calls: list[Call] = [
        (np.copyto, (bits[:n], p)),
        (np.left_shift, (bits, _16, bits)),
        (np.copyto, (a.view(np.int32)[:n], low.view(f"i{low.itemsize}"))),
    ]
    if low.itemsize == 1:
        calls.append((np.left_shift, (a, _8, a)))
    return [*calls, (np.add, (bits, a, bits))]


def encode_split(x: Array, p: Array, low: Array, scratch: Scratch, noise: Array | None = None) -> list[Call]:
    """float32 to a bfloat16 parameter and the part beside it, uint16 or uint8, which the noise may round."""
    n, bits = x.size, x.view(np.uint32)
    a, c, mask = scratch.a[:n], scratch.c[:n], scratch.mask[:n]
    calls: list[Call] = [(np.copyto, (c, bits)), (np.not_equal, (x, x, mask)), (np.putmask, (c, mask, _NAN32))]
    if low.itemsize == 2:
        part: Array = c.view(np.uint16)[: 2 * p.size : 2]
    else:
        part = c.view(np.uint8)[1 : 4 * p.size : 4]
        if noise is None:
            calls += _nearest(c, a, _8, _BELOW8)
        else:
            calls += _up_to(c, scratch, noise, 8, 0x7F7FFF00, _HALF8)
        calls.append((np.add, (c, a, c)))
    # What is left of the lower 8 bits never carries.
    return [*calls, (np.copyto, (low, part)), (np.add, (c, _HALF16, c)), (np.copyto, (p, _high(c, p.size)))]


# --- whole arrays -----------------------------------------------------------------------------------------------------


def decoded(stored: Array) -> Array:
    """A new float32 array of what is kept in float32, float16, or as bfloat16 in uint16; 1-D."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encoded(x: Array, dtype: np.dtype[Any]) -> Array:
    """The other way, to nearest even. x: 1-D, float32."""
    if dtype == np.float32:
        return x
    stored = np.empty(x.size, dtype)
    row = np.zeros(max(x.size, 2), np.float32)
    row[: x.size] = x
    run(encode(row, stored, Scratch(x.size)))
    return stored


def joined(p: Array, low: Array) -> Array:
    """A new float32 array of bfloat16 parameters and the parts beside them."""
    row = np.empty(max(p.size, 2), np.float32)
    run(decode_split(p, low, row, Scratch(p.size)))
    return row[: p.size]


def split(x: Array, beside: np.dtype[Any]) -> tuple[Array, Array]:
    """bfloat16 parameters and the part beside them, of uint16 or uint8."""
    p, low = np.empty(x.size, np.uint16), np.empty(x.size, beside)
    row = np.zeros(max(x.size, 2), np.float32)
    row[: x.size] = x
    run(encode_split(row, p, low, Scratch(x.size)))
    return p, low
