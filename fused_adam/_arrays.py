"""What the rest needs to know of an array: where it lies and how it is ordered."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# Parameters start on multiples of this many elements in a flat buffer: blocks, norms and shards never straddle two.
BLOCK = 128
_ALIGNMENT = 128  # bytes: two cache lines, and more than any vector load asks for


def address(a: Array) -> int:
    """The address of the first element."""
    # not __array_interface__, which a subclass may override and NumPy lets crash where memory runs out
    return int(np.asarray(a).ctypes.data)


def order(a: Array) -> str:
    """How the elements follow each other in memory: "C", "F" (Fortran) or "" for neither."""
    flags = a.flags
    return "C" if flags.c_contiguous else "F" if flags.f_contiguous else ""


def ravel(a: Array) -> Array:
    """A contiguous array's elements in memory order: a 1-D view, never a copy, of no subclass (a matrix stays 2-D)."""
    flat: Array = np.asarray(a).reshape(-1, order="C" if a.flags.c_contiguous else "F")
    return flat


def zeros(n: int, dtype: np.dtype[Any]) -> Array:
    """n zeros, aligned for vector access."""
    nbytes = n * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -address(raw) % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype)
