"""Where flat buffers and states are kept: host memory, or a GPU's through CuPy or Numba. Allocate, fill and copy."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import numpy as np

from fused_adam._arrays import Array, address
from fused_adam._cuda_arrays import view

_ALIGNMENT = 128  # bytes: two cache lines, and more than any vector load asks for


class Memory(Protocol):
    """library: whose arrays it makes; "numpy", "cupy" or "numba". device: the number of the GPU, None for the host."""

    library: str
    device: int | None

    def zeros(self, n: int, dtype: np.dtype[Any]) -> Any:
        """n zeros, 1-D, aligned for vector access and ready for any stream. Raises MemoryError."""

    def assign(self, destination: Any, source: Any) -> None:
        """Copy any array of the same shape that lies in the same place, or on the host, into one of this memory's."""

    def to_host(self, a: Any) -> Array:
        """A copy in host memory, after all work that was given to the device before."""

    def own(self, a: Any) -> Any:
        """The same memory as an array of its library."""


class Host:
    library = "numpy"
    device: int | None = None

    def zeros(self, n: int, dtype: np.dtype[Any]) -> Array:
        nbytes = n * dtype.itemsize
        raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        start = -address(raw) % _ALIGNMENT
        return raw[start : start + nbytes].view(dtype)

    def assign(self, destination: Any, source: Any) -> None:
        # NumPy takes no cast to ml_dtypes' bfloat16 for safe. (Its name would be a new string, which can fail.)
        np.copyto(destination, source, "unsafe" if destination.dtype.kind == "V" else "same_kind")

    def to_host(self, a: Any) -> Array:
        return np.array(a, order="K")

    def own(self, a: Any) -> Any:
        return a


class Cupy:
    library = "cupy"

    def __init__(self, device: int | None) -> None:
        import cupy

        self._cupy = cupy
        self.device = device

    def zeros(self, n: int, dtype: np.dtype[Any]) -> Any:
        with self._cupy.cuda.Device(self.device):
            a = self._cupy.zeros(n, dtype)
            self._cupy.cuda.runtime.deviceSynchronize()
        return a

    def assign(self, destination: Any, source: Any) -> None:
        with self._cupy.cuda.Device(self.device):
            self._cupy.cuda.runtime.deviceSynchronize()
            if view("source", source) is None:
                destination.set(np.ascontiguousarray(source, destination.dtype))  # without memory of the device's
            else:
                destination[...] = self.own(source)
            self._cupy.cuda.runtime.deviceSynchronize()

    def to_host(self, a: Any) -> Array:
        with self._cupy.cuda.Device(self.device):
            self._cupy.cuda.runtime.deviceSynchronize()
            host: Array = self._cupy.asnumpy(self.own(a))
        return host

    def own(self, a: Any) -> Any:
        return self._cupy.asarray(a) if hasattr(a, "__cuda_array_interface__") else self._cupy.from_dlpack(a)


class Numba:
    library = "numba"

    def __init__(self, device: int | None) -> None:
        from numba import cuda
        from numba.cuda.cudadrv import driver

        self._cuda = cuda
        self._driver = driver
        self.device = device

    def zeros(self, n: int, dtype: np.dtype[Any]) -> Any:
        with self._cuda.gpus[self.device]:
            try:
                a = self._cuda.device_array(n, dtype)
            except self._driver.CudaAPIError as error:
                raise MemoryError(f"{n * dtype.itemsize} bytes on GPU {self.device}: {error}") from error
            if n:
                self._driver.device_memset(a, 0, a.nbytes)
            self._cuda.synchronize()
        return a

    def assign(self, destination: Any, source: Any) -> None:
        with self._cuda.gpus[self.device]:
            self._cuda.synchronize()
            found = view("source", source)
            if found is not None:
                source = self.own(source)
                if found.order != "C" or found.dtype != destination.dtype:  # Numba copies bytes only
                    source = source.copy_to_host()
            if isinstance(source, np.ndarray | np.generic):
                source = np.ascontiguousarray(source, destination.dtype).reshape(destination.shape)
            destination.copy_to_device(source)
            self._cuda.synchronize()

    def to_host(self, a: Any) -> Array:
        with self._cuda.gpus[self.device]:
            self._cuda.synchronize()
            host: Array = self.own(a).copy_to_host()
        return host

    def own(self, a: Any) -> Any:
        # Numba knows nothing of DLPack
        return self._cuda.as_cuda_array(a if hasattr(a, "__cuda_array_interface__") else view("it", a))


HOST: Memory = Host()


def of_library(library: str, device: int | None) -> Memory:
    if device is None:
        return HOST
    return Numba(device) if library == "numba" else Cupy(device)


def on_host(a: Any) -> Array:
    """An array, or a copy of it in host memory if it is on a GPU."""
    return a if isinstance(a, np.ndarray) else like(a).to_host(a)


def like(a: Any) -> Memory:
    """Memory of the library and device of an array; arrays of other libraries get CuPy's where it is installed."""
    found = view("it", a)
    if found is None:
        return HOST
    numba = type(a).__module__.split(".")[0] == "numba" or importlib.util.find_spec("cupy") is None
    return of_library("numba" if numba else "cupy", max(found.device, 0))
