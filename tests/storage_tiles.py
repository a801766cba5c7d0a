"""The conversions of one element that kernels inline, over tiles."""

from __future__ import annotations

from typing import Any

from fused_adam.backends._numba_int8 import encode_ratios, ratio
from fused_adam.backends._numba_storage import (
    from_bfloat16,
    from_float16,
    from_split8,
    from_split16,
    tiles,
    to_bfloat16,
    to_bfloat16_stochastic,
    to_float16,
    to_float16_stochastic,
    to_split8,
    to_split8_stochastic,
    to_split16,
)


@tiles
def decode_bfloat16(stored: Any, x: Any) -> None:
    for k in range(x.size):
        x[k] = from_bfloat16(stored[k])


@tiles
def encode_bfloat16(x: Any, stored: Any) -> None:
    for k in range(x.size):
        stored[k] = to_bfloat16(x[k])


@tiles
def encode_bfloat16_stochastic(x: Any, stored: Any, noise: Any) -> None:
    for k in range(x.size):
        stored[k] = to_bfloat16_stochastic(x[k], noise[k])


@tiles
def decode_float16(stored: Any, x: Any) -> None:
    for k in range(x.size):
        x[k] = from_float16(stored[k])


@tiles
def encode_float16(x: Any, stored: Any) -> None:
    for k in range(x.size):
        stored[k] = to_float16(x[k])


@tiles
def encode_float16_stochastic(x: Any, stored: Any, noise: Any) -> None:
    for k in range(x.size):
        stored[k] = to_float16_stochastic(x[k], noise[k])


@tiles
def decode_split16(p: Any, low: Any, x: Any) -> None:
    for k in range(x.size):
        x[k] = from_split16(p[k], low[k])


@tiles
def encode_split16(x: Any, p: Any, low: Any) -> None:
    for k in range(x.size):
        p[k], low[k] = to_split16(x[k])


@tiles
def decode_split8(p: Any, low: Any, x: Any) -> None:
    for k in range(x.size):
        x[k] = from_split8(p[k], low[k])


@tiles
def encode_split8(x: Any, p: Any, low: Any) -> None:
    for k in range(x.size):
        p[k], low[k] = to_split8(x[k])


@tiles
def encode_split8_stochastic(x: Any, p: Any, low: Any, noise: Any) -> None:
    for k in range(x.size):
        p[k], low[k] = to_split8_stochastic(x[k], noise[k])


@tiles
def encode_int8(m: Any, v: Any, q_m: Any, q_v: Any, scales: Any, first: Any, t: Any) -> None:
    """m and v are written over. Arguments as of `encode_ratios`."""
    for k in range(m.size):
        m[k], v[k] = ratio(m[k], v[k])
    encode_ratios(m, v, q_m, q_v, scales, first, t)
