"""`adam_step` checked and run by compiled code: what its signature does not refuse, it refuses before any write."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types

from fused_adam import _coefficients, _numbers
from fused_adam._codegen import Rule, bind
from fused_adam.backends._numba_kernels import CHUNK, kernel
from fused_adam.backends.numba_cpu import COEFFICIENTS, F64, I64, INTS, SERIAL_BELOW, TABLE, chunk, jit, launch

# Addresses of the kernels of adam_step: [float32 or float64, rule + 3 * maximize], 0 until compiled.
_ADAM = ("adam", "adamw", "adam_l2")
_adam_kernels = np.zeros((2, 6), np.int64)
_DONE, _REFUSED, _COMPILE, _LARGE = range(4)


def _adam_rule(variant: int) -> Rule:
    name, *l2 = _ADAM[variant % 3].split("_")
    return bind(name, (("maximize",) if variant >= 3 else ()) + tuple(l2))


# The Python functions' own code, with what they call compiled too.
_names: dict[str, Any] = {"sqrt": math.sqrt}
_names["bias_correction"] = numba.njit(FunctionType(_coefficients.bias_correction.__wrapped__.__code__, _names))
_adamw_coefficients = numba.njit(inline="always")(FunctionType(_coefficients.adamw.__code__, _names))


@numba.njit(inline="always")
def _apart(a: Any, b: Any, nbytes: Any) -> Any:
    return abs(np.int64(a) - np.int64(b)) >= np.int64(nbytes)  # addresses are unsigned: a - b would wrap


_ADAM_ARGUMENTS = [
    (types.Array(I64, 2, "C"), p, types.Array(p.dtype, 1, "C", readonly=True), p, p, I64, *[F64] * 5, I64)
    for p in (types.Array(types.float32, 1, "C"), types.Array(types.float64, 1, "C"))
]


@jit([I64(*a, TABLE, INTS, COEFFICIENTS) for a in _ADAM_ARGUMENTS])
def _adam_prepare(
    kernels: Any, p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
    variant: Any, row: Any, kernel: Any, c: Any,
) -> Any:  # fmt: skip
    """Check what the signature cannot, then fill one row, its kernel and its coefficients."""
    n = p.size
    nbytes = p.nbytes
    P, G, M, V = p.ctypes.data, g.ctypes.data, m.ctypes.data, v.ctypes.data
    if g.size != n or m.size != n or v.size != n or t < 1:
        return _REFUSED
    if not (_apart(P, G, nbytes) and _apart(P, M, nbytes) and _apart(P, V, nbytes)):
        return _REFUSED
    if not (_apart(G, M, nbytes) and _apart(G, V, nbytes) and _apart(M, V, nbytes)):
        return _REFUSED
    # Written so that NaN fails.
    if not (0.0 <= lr < np.inf and 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        return _REFUSED
    if not (0.0 <= eps < np.inf and 0.0 <= weight_decay < np.inf):
        return _REFUSED
    if weight_decay == 0.0:
        variant -= variant % 3
    kernel[0] = kernels[p.itemsize >> 3, variant]
    if kernel[0] == 0:
        return _COMPILE
    c1, c2, step, scaled_eps, decay = _adamw_coefficients(t, lr, beta1, beta2, eps, weight_decay)
    c[0, 0], c[0, 1], c[0, 2], c[0, 3], k = c1, c2, step, scaled_eps, 4
    if variant % 3:
        c[0, k] = decay if variant % 3 == 1 else weight_decay
        k += 1
    if variant >= 3:
        c[0, k] = -1.0
        k += 1
    limit = _numbers.FLOAT32_LIMIT if p.itemsize == 4 else 1.7976931348623157e308
    for i in range(k):
        if not abs(c[0, i]) <= limit:
            return _REFUSED
    row[0, 0], row[0, 1], row[0, 2], row[0, 3], row[0, 4], row[0, 5] = n, 0, P, G, M, V
    return _DONE if n < SERIAL_BELOW else _LARGE


@jit([I64(*a) for a in _ADAM_ARGUMENTS])
def _adam_small(
    kernels: Any, p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
    variant: Any,
) -> Any:  # fmt: skip
    """Check and run in one call, unless the arrays are large."""
    row = np.empty((1, 6), np.int64)
    kernel = np.empty(1, np.int64)
    c = np.empty((1, 6))
    status = _adam_prepare(kernels, p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, variant, row, kernel, c)
    if status == _DONE:
        for lo in range(0, p.size, CHUNK):
            chunk(row, kernel, c, 0, lo)
    return status


def adam_step(
    p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any, decoupled: Any,
    maximize: Any,
) -> bool:  # fmt: skip
    """Run the step if the arguments are of the plain kinds that compiled code can check; False if Python must look."""
    try:
        beta1, beta2 = betas
        if not (
            type(t) is int
            and all(isinstance(x, float) for x in (lr, beta1, beta2, eps, weight_decay))
            and type(decoupled) is type(maximize) is bool
            and type(p) is type(g) is type(m) is type(v) is np.ndarray
            and type(betas) is tuple
            # Numba's cache of types does not tell byte orders apart
            and p.dtype == g.dtype == m.dtype == v.dtype
            and p.dtype.isnative
        ):
            return False
        if p.ndim != 1:
            if not (p.shape == g.shape == m.shape == v.shape and all(a.flags.c_contiguous for a in (p, g, m, v))):
                return False
            p, g, m, v = p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1)
        variant = (1 if decoupled else 2) + (3 if maximize else 0)
        arguments = (_adam_kernels, p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, variant)
        status = _adam_small(*arguments)
        if status == _DONE:
            return True
        if status == _REFUSED:
            return False
        row, kernels, c = np.empty((1, 6), np.int64), np.empty(1, np.int64), np.empty((1, 6))
        if status == _COMPILE:
            if weight_decay == 0:
                variant -= variant % 3
            _adam_kernels[p.itemsize >> 3, variant] = kernel(_adam_rule(variant), p.dtype)
            return adam_step(p, g, m, v, t, lr, betas, eps, weight_decay, decoupled, maximize)
        _adam_prepare(*arguments, row, kernels, c)
    except (TypeError, ValueError, OverflowError):
        return False
    launch(p.size, row, np.array([0, -(-p.size // CHUNK)]), kernels, c, np.empty(1, np.int64), t)
    return True
