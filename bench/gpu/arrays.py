"""Arrays on the GPU as the users of each backend have them, and whether two arrays hold the same bits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, Protocol

import numpy as np

from fused_adam.backends import reason

from .worker import Different, Skipped

Array = np.ndarray[Any, np.dtype[Any]]


class Library(Protocol):
    def put(self, a: Array) -> Any:
        """A copy on the GPU."""

    def get(self, a: Any) -> Array:
        """A copy on the host, after all work given to the default stream."""

    def empty(self, n: int, dtype: Any) -> Any:
        """Uninitialised, 1-D."""

    def copy(self, destination: Any, source: Any) -> None:
        """From the GPU to the GPU; both of one shape."""

    def free_bytes(self) -> int:
        """How much of the GPU's memory nobody uses."""


class _Cupy:
    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def put(self, a: Array) -> Any:
        return self._cupy.asarray(a)

    def get(self, a: Any) -> Array:
        host: Array = a.get()
        return host

    def empty(self, n: int, dtype: Any) -> Any:
        return self._cupy.empty(n, dtype)

    def copy(self, destination: Any, source: Any) -> None:
        destination[...] = source

    def free_bytes(self) -> int:
        self._cupy.get_default_memory_pool().free_all_blocks()
        return int(self._cupy.cuda.runtime.memGetInfo()[0])


class _Numba:
    def __init__(self) -> None:
        from numba import cuda

        self._cuda = cuda

    def put(self, a: Array) -> Any:
        return self._cuda.to_device(a)

    def get(self, a: Any) -> Array:
        host: Array = a.copy_to_host()
        return host

    def empty(self, n: int, dtype: Any) -> Any:
        return self._cuda.device_array(n, dtype)

    def copy(self, destination: Any, source: Any) -> None:
        destination.copy_to_device(source)

    def free_bytes(self) -> int:
        context = self._cuda.current_context()
        context.memory_manager.deallocations.clear()
        return int(context.get_memory_info()[0])


def bridge() -> str:
    """numba-cuda 0.30 asks for numpy.row_stack, which NumPy 2.5 has no more: lend it, in this process; and say so."""
    if hasattr(np, "row_stack") or importlib.util.find_spec("numba_cuda") is None:
        return ""
    vars(np)["row_stack"] = np.vstack
    version = importlib.metadata.version("numba-cuda")
    return f"numpy.row_stack = numpy.vstack for numba-cuda {version} under NumPy {np.__version__}"


def usable(backend: str) -> str:
    """The bridge that it took, if any. Raises Skipped if the backend cannot run here."""
    bridged = bridge() if backend == "numba-cuda" else ""
    if why := reason(backend):  # not `backends()`, which would load CuPy into a process that is about Numba
        raise Skipped(why)
    return bridged


def library(backend: str) -> Library:
    """The arrays that the users of a usable backend have."""
    return _Cupy() if backend == "cupy" else _Numba()


def same(what: str, ours: Array, expected: Array) -> None:
    """Raises Different unless every byte is equal; all NaNs count as one."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        raise Different(f"{what}: {ours.dtype}{ours.shape} against {expected.dtype}{expected.shape}")
    a, b = np.ravel(ours), np.ravel(expected)
    bits = f"u{a.itemsize}"
    wrong = np.flatnonzero((a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b)))
    if len(wrong):
        i = wrong[0]
        raise Different(f"{what}: {len(wrong)} of {a.size} differ, the first at {i}: {a[i]!r} against {b[i]!r}")
