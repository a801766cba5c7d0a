"""The codes of `_int8` for Numba: of one element, to be inlined into loops, and of tiles, as in `_numba_storage`."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from fused_adam._int8 import END_V, LARGEST_SCALE, LEAST_SCALE, LEAST_V, OF_M, OF_T, OF_V, RHO, V
from fused_adam._storage import BLOCK8
from fused_adam.backends._numba_storage import TILE, bits_of, float_of, product, tile, tiles

_F32, _U32, _U64 = np.float32, np.uint32, np.uint64
_0, _1, _127, _255 = map(_F32, (0, 1, 127, 255))
_K127, _K255 = _1 / _127, _1 / _255
_THREE_QUARTERS, _UNIT = _F32(0.75), _F32(2.0**-24)
_MAGNITUDE, _INFINITY = _U32(0x7FFFFFFF), _U32(0x7F800000)
_LEAST_V, _RANGE_V = _U32(LEAST_V), _U32(END_V - LEAST_V)
_LARGEST_SCALE, _LEAST_SCALE = _U32(LARGEST_SCALE), _U32(LEAST_SCALE)
_OF_V, _OF_M, _OF_T = map(_U32, (OF_V, OF_M, OF_T))


@numba.njit(inline="always")
def decoded(q_m: Any, q_v: Any, s_rho: Any, s_v: Any) -> Any:
    """m and v."""
    x, y = _F32(np.int32(q_v)) * _K255, _F32(np.int32(q_m)) * _K127
    s = s_v * (x * x)
    return (s_rho * (y * abs(y))) * s, s * s


@numba.njit(inline="always")
def ratio(m: Any, v: Any) -> Any:
    """rho and s, or 0 for what is not kept."""
    s = math.sqrt(v)
    rho = m / s
    kept = _U32(bits_of(v) - _LEAST_V) < _RANGE_V and _U32(bits_of(rho) & _MAGNITUDE) < _INFINITY
    return rho if kept else _0, s if kept else _0


@numba.njit(inline="always")
def _decode_block(q_m: Any, q_v: Any, s_rho: Any, s_v: Any, m: Any, v: Any, lo: Any, n: Any) -> None:
    for j in range(n):
        k = lo + _U64(j)
        m[k], v[k] = decoded(q_m[k], q_v[k], s_rho, s_v)


@tiles
def decode_int8(q_m: Any, q_v: Any, scales: Any, m: Any, v: Any) -> None:
    """scales: uint16, (blocks, 2)."""
    for b in range(scales.shape[0]):
        s_rho, s_v = float_of(_U32(scales[b, RHO] << 16)), float_of(_U32(scales[b, V] << 16))
        lo = _U64(BLOCK8 * b)  # without a sign, for an index with one may count from the end
        if m.size - BLOCK8 * b >= BLOCK8:  # a loop of a known length is faster
            _decode_block(q_m, q_v, s_rho, s_v, m, v, lo, BLOCK8)
        else:
            _decode_block(q_m, q_v, s_rho, s_v, m, v, lo, m.size - BLOCK8 * b)


@numba.njit(inline="always")
def _largest(rho: Any, s: Any, lo: Any, n: Any) -> Any:
    """The bits of the largest of a block."""
    most_s = most_rho = _U32(0)
    for j in range(n):
        k = lo + _U64(j)
        most_s = max(most_s, bits_of(s[k]))
        most_rho = max(most_rho, _U32(bits_of(rho[k]) & _MAGNITUDE))
    return most_rho, most_s


@numba.njit(inline="always")
def _rescaled(largest: Any, old: Any) -> Any:
    """The bits of a scale: what it is from now on."""
    a, s = float_of(largest), float_of(old)
    new = _U32(_U32(min(largest, _LARGEST_SCALE) + 0x1FFFFF) & 0xFFE00000)
    new = new if new >= _LEAST_SCALE else _U32(0)
    return old if _THREE_QUARTERS * s < a and a <= s else new


@numba.njit(inline="always")
def _inverse(bits: Any) -> Any:
    inverse = _1 / float_of(bits)
    return inverse if bits > 0 else _0


@numba.njit(inline="always")
def _dither(hashed: Any) -> Any:
    return _F32(np.int32(_U32(hashed) >> 8)) * _UNIT


@numba.njit(inline="always")
def _encode_block(
    rho: Any, s: Any, q_m: Any, q_v: Any, by_rho: Any, by_v: Any, of_m: Any, of_v: Any, lo: Any, n: Any
) -> None:
    """by_rho, by_v: inverses of the scales. of_m, of_v: what the first element's dither is made from."""
    for j in range(n):
        k = lo + _U64(j)
        x = _255 * math.sqrt(s[k] * by_v) + _dither(of_v + product(_U32(j), _OF_V))
        y = _127 * math.sqrt(abs(rho[k]) * by_rho) + _dither(of_m + product(_U32(j), _OF_M))
        code = np.int32(min(max(x, _1), _255))
        size = np.int32(min(y, _127))
        q_v[k] = code if s[k] > _0 else np.int32(0)
        q_m[k] = -size if rho[k] < _0 else size


@tiles
def encode_ratios(rho: Any, s: Any, q_m: Any, q_v: Any, scales: Any, first: Any, t: Any) -> None:
    """What `ratio` gives. first: the canonical index of the first element. t: the step that made m and v.

    The scales of many blocks are found one after the other, for each waits for the last operation of its block.
    """
    by_rho, by_v = tile(types.float32), tile(types.float32)
    for start in range(0, scales.shape[0], TILE):
        blocks = min(TILE, scales.shape[0] - start)
        for i in range(blocks):
            b = start + i
            lo = _U64(BLOCK8 * b)
            if s.size - BLOCK8 * b >= BLOCK8:
                most = _largest(rho, s, lo, BLOCK8)
            else:
                most = _largest(rho, s, lo, s.size - BLOCK8 * b)
            by_rho[i], by_v[i] = float_of(most[0]), float_of(most[1])
        for i in range(blocks):
            b = start + i
            scale_rho = _rescaled(bits_of(by_rho[i]), _U32(scales[b, RHO] << 16))
            scale_v = _rescaled(bits_of(by_v[i]), _U32(scales[b, V] << 16))
            scales[b, RHO], scales[b, V] = scale_rho >> 16, scale_v >> 16
            by_rho[i], by_v[i] = _inverse(scale_rho), _inverse(scale_v)
        for i in range(blocks):
            b = start + i
            lo = _U64(BLOCK8 * b)
            at = _U32(first + BLOCK8 * b)
            of_m = product(at, _OF_M) + product(_U32(t), _OF_T)
            of_v = product(at, _OF_V) + product(_U32(t), _OF_T)
            if s.size - BLOCK8 * b >= BLOCK8:
                _encode_block(rho, s, q_m, q_v, by_rho[i], by_v[i], of_m, of_v, lo, BLOCK8)
            else:
                _encode_block(rho, s, q_m, q_v, by_rho[i], by_v[i], of_m, of_v, lo, s.size - BLOCK8 * b)
