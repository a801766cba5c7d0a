"""The codes of `_int8` for Numba: of one element, to be inlined into loops, and of tiles, as in `_numba_storage`."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from fused_adam._int8 import END_V, LARGEST_SCALE, LEAST_SCALE, LEAST_V, OF_M, OF_T, OF_V, RHO, V
from fused_adam._storage import BLOCK8
from fused_adam.backends._numba_storage import bits_of, float_of, tiles

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
def _block(b: Any, size: Any) -> Any:
    """Its first element, without a sign, for an index with one may count from the end; and how many it has."""
    return _U64(BLOCK8 * b), min(BLOCK8, size - BLOCK8 * b)


@tiles
def decode_int8(q_m: Any, q_v: Any, scales: Any, m: Any, v: Any) -> None:
    """scales: uint16, (blocks, 2)."""
    for b in range(scales.shape[0]):
        s_rho, s_v = float_of(_U32(scales[b, RHO] << 16)), float_of(_U32(scales[b, V] << 16))
        lo, n = _block(b, m.size)
        for j in range(n):
            k = lo + _U64(j)
            m[k], v[k] = decoded(q_m[k], q_v[k], s_rho, s_v)


@numba.njit(inline="always")
def _rescaled(largest: Any, old: Any) -> Any:
    """The bits of a scale: what it is from now on."""
    a, s = float_of(largest), float_of(old)
    new = _U32(_U32(min(largest, _LARGEST_SCALE) + 0x1FFFFF) & 0xFFE00000)
    new = new if new >= _LEAST_SCALE else _U32(0)
    return old if _THREE_QUARTERS * s < a and a <= s else new


@numba.njit(inline="always")
def _inverse(bits: Any) -> Any:
    return _1 / float_of(bits) if bits > 0 else _0


@numba.njit(inline="always")
def _dither(hashed: Any) -> Any:
    return _F32(np.int32(_U32(hashed) >> 8)) * _UNIT


@tiles
def encode_ratios(rho: Any, s: Any, q_m: Any, q_v: Any, scales: Any, first: Any, t: Any) -> None:
    """What `ratio` gives. first: the canonical index of the first element. t: the step that made m and v."""
    of_v, of_m = _U32(first * _OF_V + t * _OF_T), _U32(first * _OF_M + t * _OF_T)
    for b in range(scales.shape[0]):
        lo, n = _block(b, s.size)
        most_s = most_rho = _U32(0)
        for j in range(n):
            k = lo + _U64(j)
            most_s = max(most_s, bits_of(s[k]))
            most_rho = max(most_rho, _U32(bits_of(rho[k]) & _MAGNITUDE))
        scale_v = _rescaled(most_s, _U32(scales[b, V] << 16))
        scale_rho = _rescaled(most_rho, _U32(scales[b, RHO] << 16))
        scales[b, V], scales[b, RHO] = scale_v >> 16, scale_rho >> 16
        by_v, by_rho = _inverse(scale_v), _inverse(scale_rho)
        for j in range(n):
            k = lo + _U64(j)
            i = _U32(k)
            x = _255 * math.sqrt(s[k] * by_v) + _dither(of_v + _U32(i * _OF_V))
            y = _127 * math.sqrt(abs(rho[k]) * by_rho) + _dither(of_m + _U32(i * _OF_M))
            code = np.int32(min(max(x, _1), _255))
            size = np.int32(min(y, _127))
            q_v[k] = code if s[k] > _0 else np.int32(0)
            q_m[k] = -size if rho[k] < _0 else size
