"""What the rest needs to know of an array: where it lies and how it is ordered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Of an array on a GPU whose library says that it holds bfloat16, for which NumPy by itself has no dtype.
BFLOAT16 = np.dtype([("bfloat16", "u2")])

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# Parameters start on multiples of this many elements in a flat buffer: blocks, norms and shards never straddle two.
BLOCK = 128


def kind_of(dtype: np.dtype[Any], declared: str | None = None) -> str:
    """What numbers of a dtype are called, "" if they are not known. declared: what uint16 holds."""
    if dtype == np.uint16:
        return declared or ""
    if dtype == BFLOAT16:
        return "bfloat16"
    known = dtype.isnative and dtype.name in ("float64", "float32", "float16", "bfloat16")
    return dtype.name if known else ""


def carrier(kind: str) -> np.dtype[Any]:
    """The dtype in which numbers of a kind are handled: unsigned for bfloat16, and for the part beside one."""
    return np.dtype({"bfloat16": "u2", "split16": "u2", "split8": "u1"}.get(kind, kind))


def carried(a: Any, kind: str) -> Any:
    """An array in its carrier: the same memory."""
    if isinstance(a, CudaArray):
        return replace(a, dtype=carrier(kind))
    return a.view(np.uint16) if kind == "bfloat16" and a.dtype != np.uint16 else a


@dataclass(frozen=True, slots=True)
class CudaArray:
    """Memory on a GPU, whatever library it came from.

    order: as `order` says it. device: its number; -1 if it has no elements, and so lies nowhere. stream: the one whose
    work has to be waited for before the memory may be used, as the array protocol numbers streams, or None. owner: what
    keeps the memory.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str
    writable: bool
    device: int
    stream: int | None
    owner: Any

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For libraries that do not speak what the array came with. Raises AttributeError unless it is contiguous."""
        if not self.order:
            raise AttributeError("its strides are not known")
        strides = None if self.order == "C" else tuple(accumulate((self.dtype.itemsize, *self.shape[:-1]), mul))
        described = {"shape": self.shape, "typestr": self.dtype.str, "strides": strides, "stream": self.stream}
        return described | {"data": (self.address, not self.writable), "version": 3}


AnyArray = Array | CudaArray  # what parameters, gradients and states are once they are checked


def address(a: AnyArray) -> int:
    """The address of the first element."""
    if isinstance(a, CudaArray):
        return a.address
    # not __array_interface__, which a subclass may override and NumPy lets crash where memory runs out
    return int(np.asarray(a).ctypes.data)


def order(a: AnyArray) -> str:
    """How the elements follow each other in memory: "C", "F" (Fortran) or "" for neither."""
    if isinstance(a, CudaArray):
        return a.order
    flags = a.flags
    return "C" if flags.c_contiguous else "F" if flags.f_contiguous else ""


def ravel(a: Any) -> Any:
    """A contiguous array's elements in memory order: a 1-D view, never a copy, of no subclass (a matrix stays 2-D)."""
    if isinstance(a, CudaArray):
        return replace(a, shape=(a.size,), order="C")
    return np.asarray(a).reshape(-1, order="C" if a.flags.c_contiguous else "F")
