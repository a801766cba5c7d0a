"""The conversions of `_storage` for Numba: of one element, to be inlined into loops, and of tiles.

A loop that converts and updates is vectorised as long as all that it does with integers is done in 32 bits. Numba
computes in 64: casts and masks say where that is more than is needed, and comparisons are between casts. 16-bit arrays
are uint16; those of a tile are contiguous and of one size, short enough to stay in the first cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fused_adam._philox import EACH, MULTIPLIERS, ROUNDS, WEYL
from fused_adam._storage import NAN_BF16, NAN_F16
from fused_adam.backends._numba_kernels import cached

_U32 = np.uint32
_MAGNITUDE, _INFINITY, _NAN = _U32(0x7FFFFFFF), _U32(0x7F800000), _U32(0x7FC00000)
_NAN_BF16, _NAN_F16, _INFINITY_F16 = _U32(NAN_BF16), _U32(NAN_F16), _U32(0x7C00)
_ONE = _U32(1)
_LARGEST_BF16, _LARGEST_F16, _LARGEST_SPLIT8 = _U32(0x7F7F0000), _U32(0x477FE000), _U32(0x7F7FFF00)
_NORMAL_F16 = _U32(0x38800000)  # the smallest
_UPPER, _ODD16, _BELOW16 = _U32(0xFFFF0000), _U32(0x10000), _U32(0x7FFF)
_HALF8, _HALF13, _HALF16 = _U32(0x80), _U32(0x1000), _U32(0x8000)  # of the last bit kept when so many are cut off
_UNSCALE = np.float32(2.0**112)  # the difference of the exponents' biases
_HALF, _LEAST = np.float32(0.5), np.float32(2.0**-14)
_MULTIPLIERS, _WEYL = tuple(map(np.uint64, MULTIPLIERS)), tuple(map(_U32, WEYL))


def _bitcast(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
    return builder.bitcast(args[0], context.get_value_type(signature.return_type))


@intrinsic
def bits_of(typingctx: Any, x: Any) -> Any:
    """Those of a float32 as uint32."""
    return types.uint32(types.float32), _bitcast


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 that these uint32 bits are."""
    return types.float32(types.uint32), _bitcast


@intrinsic
def product(typingctx: Any, a: Any, b: Any) -> Any:
    """Of two uint32, modulo 2**32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.mul(*args)

    return types.uint32(types.uint32, types.uint32), codegen


TILE = 2048  # elements: two float32 rows, and what is kept of all, fit in the first cache


@intrinsic
def tile(typingctx: Any, dtype: Any) -> Any:
    """TILE elements on the stack, uninitialised: nothing is allocated in mid-step."""
    array = types.Array(dtype.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(array.dtype)
        data = cgutils.alloca_once(builder, element, size=TILE)
        data.align = 64
        size = ir.Constant(ir.IntType(64), array.dtype.bitwidth // 8)
        count = ir.Constant(ir.IntType(64), TILE)
        result = context.make_array(array)(context, builder)
        context.populate_array(
            result, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None, parent=None
        )
        return result._getvalue()

    return array(dtype), codegen


# --- one element ------------------------------------------------------------------------------------------------------


@numba.njit(inline="always")
def from_bfloat16(h: Any) -> Any:
    return float_of(_U32(h << 16))


@numba.njit(inline="always")
def _rounded(x: Any) -> Any:
    """Bits of which the upper 16 are a bfloat16 number."""
    w = bits_of(x)
    return _NAN if x != x else _U32(w + (_HALF16 if _U32(w & _ODD16) != 0 else _BELOW16))


@numba.njit(inline="always")
def to_bfloat16(x: Any) -> Any:
    return _U32(_rounded(x) >> 16)


@numba.njit(inline="always")
def lower(word: Any) -> Any:
    """The first of two bfloat16 numbers."""
    return float_of(_U32(word << 16))


@numba.njit(inline="always")
def upper(word: Any) -> Any:
    return float_of(_U32(word & _UPPER))


@numba.njit(inline="always")
def both(x: Any, y: Any) -> Any:
    """A word of two bfloat16 numbers."""
    return _U32(_U32(_rounded(x) >> 16) | _U32(_rounded(y) & _UPPER))


@numba.njit(inline="always")
def to_bfloat16_stochastic(x: Any, noise: Any) -> Any:
    w = bits_of(x)
    up = _HALF16 if _U32(w & _MAGNITUDE) >= _LARGEST_BF16 else _U32(noise)
    return _NAN_BF16 if x != x else _U32(_U32(w + up) >> 16)


@numba.njit(inline="always")
def from_float16(h: Any) -> Any:
    """The product mends the exponent, and gives a subnormal number one."""
    a = _U32(h & 0x7FFF)
    scaled = bits_of(float_of(_U32(a << 13)) * _UNSCALE)
    special = _INFINITY if a >= _INFINITY_F16 else _U32(0)
    return float_of(_U32(scaled | special | _U32(_U32(h & 0x8000) << 16)))


@numba.njit(inline="always")
def to_float16(x: Any) -> Any:
    """The sum rounds what is subnormal in float16, in units of its last bit."""
    w = bits_of(x)
    a = _U32(w & _MAGNITUDE)
    normal = _U32(_U32(a + _U32(0xC8000FFF) + _U32(_U32(a >> 13) & _ONE)) >> 13)
    small = _U32(bits_of(float_of(a) + _HALF) - 0x3F000000)
    h = min(small if a < _NORMAL_F16 else normal, _INFINITY_F16)
    return _NAN_F16 if x != x else _U32(h | w >> 16 & 0x8000)


@numba.njit(inline="always")
def to_float16_stochastic(x: Any, noise: Any) -> Any:
    w = bits_of(x)
    a = _U32(w & _MAGNITUDE)
    small = _U32(bits_of(float_of(a) + _LEAST) - 0x38800000)
    fixed = small if a < _NORMAL_F16 else _U32(a - 0x38000000)
    up = _HALF13 if a >= _LARGEST_F16 else _U32(noise >> 3)
    h = min(_U32(_U32(fixed + up) >> 13), _INFINITY_F16)
    return _NAN_F16 if x != x else _U32(h | w >> 16 & 0x8000)


@numba.njit(inline="always")
def from_split16(p: Any, low: Any) -> Any:
    return float_of(_U32((p << 16) + np.int16(low)))


@numba.njit(inline="always")
def to_split16(x: Any) -> Any:
    """p and low."""
    w = bits_of(x)
    w = _NAN if _U32(w & _MAGNITUDE) > _INFINITY else w
    return _U32(_U32(w + 0x8000) >> 16), _U32(w & 0xFFFF)


@numba.njit(inline="always")
def from_split8(p: Any, low: Any) -> Any:
    return float_of(_U32((p << 16) + (np.int8(low) << 8)))


@numba.njit(inline="always")
def _split8(w: Any) -> Any:
    return _U32(_U32(w + 0x8000) >> 16), _U32(w >> 8 & 0xFF)


@numba.njit(inline="always")
def to_split8(x: Any) -> Any:
    w = bits_of(x)
    return _split8(_NAN if _U32(w & _MAGNITUDE) > _INFINITY else _U32(w + 0x7F + (w >> 8 & 1)))


@numba.njit(inline="always")
def to_split8_stochastic(x: Any, noise: Any) -> Any:
    w = bits_of(x)
    up = _HALF8 if _U32(w & _MAGNITUDE) >= _LARGEST_SPLIT8 else _U32(noise >> 8)
    return _split8(_NAN if _U32(w & _MAGNITUDE) > _INFINITY else _U32(w + up))


# --- tiles ------------------------------------------------------------------------------------------------------------


def tiles(f: Any) -> Any:
    """A function over tiles; of whatever types it is called with."""
    return cached(lambda **options: numba.njit(**options)(f))


@numba.njit(inline="always")
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One draw: four words of 32 bits, all uint32, from a counter and a key."""
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _U32(p1 >> 32) ^ c1 ^ k0, _U32(p1), _U32(p0 >> 32) ^ c3 ^ k1, _U32(p0)
        k0, k1 = _U32(k0 + _WEYL[0]), _U32(k1 + _WEYL[1])
    return c0, c1, c2, c3


@tiles
def fill_noise(seed: Any, t: Any, first: Any, stream: Any, noise: Any) -> None:
    """16 random bits for each element (see `_philox`). noise: uint16, of a multiple of 8 elements; first: one too."""
    words = noise.view(np.uint32)
    s0, s1, t0, t1 = _U32(seed), _U32(seed >> 32), _U32(t), _U32(t >> 32)
    for b in range(words.size // 4):
        draw = first // EACH + b
        high = _U32(draw >> 32 | stream << 28)
        words[4 * b], words[4 * b + 1], words[4 * b + 2], words[4 * b + 3] = philox(_U32(draw), high, t0, t1, s0, s1)
