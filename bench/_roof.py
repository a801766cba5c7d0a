"""The memory roof: a step's traffic, four streams read and three written, and next to no arithmetic.

Numba is imported here, so this module is imported only where the roof is measured.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# As in fused_adam: chunks a worker takes at a time, and the size below which waking workers costs more
# than it saves.
CHUNK = 2**16
PARALLEL_FROM = 2**18


@numba.njit(error_model="numpy", cache=True)
def _serial(p: Array, g: Array, m: Array, v: Array) -> None:
    # One operation each, values that stay bounded (p moves by |g| a call), and v never negative, so
    # that an Adam step on the same arrays still finds something sensible.
    for i in range(p.size):
        a, b, c, d = p[i], g[i], m[i], v[i]
        p[i] = a + b
        m[i] = b - c
        v[i] = max(b, d)


@numba.njit(error_model="numpy", cache=True, parallel=True)
def _parallel(p: Array, g: Array, m: Array, v: Array) -> None:
    for chunk in numba.prange((p.size + CHUNK - 1) // CHUNK):
        # Slices that start at 0: an index that might be negative would keep LLVM from vectorising.
        part = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, p.size))
        _serial(p[part], g[part], m[part], v[part])


def stream(p: Array, g: Array, m: Array, v: Array) -> None:
    """Read p, g, m, v and write p, m, v once, on all of Numba's threads."""
    if p.size < PARALLEL_FROM:
        _serial(p, g, m, v)
    else:
        _parallel(p, g, m, v)
