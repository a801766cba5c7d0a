"""Numba CUDA: the same kernel without CuPy. Its arguments are copied to the device before each launch."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
from numba import config, cuda
from numba.cuda.cudadrv.driver import CudaAPIError, device_to_host, host_to_device

from fused_adam._arrays import Array
from fused_adam._codegen import Rule
from fused_adam._cuda_arrays import is_capturing, zero
from fused_adam.backends import _cuda, _cuda_guard
from fused_adam.backends._cuda_source import THREADS, Made, NormSource, RowsSource
from fused_adam.backends._numba_cuda_kernels import kernel
from fused_adam.backends._numba_cuda_norm import norm_kernel
from fused_adam.backends._numba_cuda_rows import rows_kernel

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_ERRORS: tuple[type[Exception], ...] = (CudaAPIError,)
with suppress(ImportError, AttributeError):  # what launches raise from numba-cuda 0.30 on
    _ERRORS += (importlib.import_module("cuda.core._utils.cuda_utils").CUDAError,)


def unusable() -> str:
    """Why this backend cannot run although it can be imported; "" if it can."""
    if config.ENABLE_CUDASIM:
        return "NUMBA_ENABLE_CUDASIM is set, so there is only a simulated GPU; unset it"
    if not cuda.is_available():
        return f"numba-cuda cannot use the driver: {cuda.cuda_error()}; install the version for its CUDA"
    if not hasattr(np, "row_stack"):
        try:
            importlib.import_module("numba.cuda.np.arrayobj")  # what the compiler imports at its first kernel
        except AttributeError:
            version = importlib.metadata.version("numba-cuda")
            needs = f"numba-cuda {version} needs numpy.row_stack, which NumPy {np.__version__} no longer has"
            return f"{needs}; install numpy<2.5, or use CuPy"
    return ""


@contextmanager
def _on(device: int, call: str) -> Iterator[None]:
    """On a device, with the call named in what goes wrong."""
    try:
        if cuda.get_current_device().id == device:
            yield
        else:
            with cuda.gpus[device]:
                yield
    except _ERRORS as error:
        kind = MemoryError if int(getattr(error, "code", 0)) == _OUT_OF_MEMORY else RuntimeError
        raise kind(f"{call} on GPU {device} failed: {error}") from error


@cache
def _works(cupy: Any) -> bool:
    """Whether CuPy, which somebody has imported, can use the GPU too."""
    try:
        return not cupy.cuda.runtime.is_hip and cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:
        return False


@cache
def _stream(device: int, address: int) -> Any:
    """Numba's object for a stream of anybody's; made on its device."""
    return cuda.external_stream(address) if address else cuda.default_stream()


class _Table:
    def __init__(self, nbytes: int, device: int) -> None:
        self._device = device
        with _on(device, f"allocating {nbytes} bytes"):
            self._bytes = cuda.device_array(nbytes, np.uint8)
        self.address = int(self._bytes.device_ctypes_pointer.value)

    def write(self, a: Array, stream: int, wait: bool = False) -> None:
        with _on(self._device, f"copying a table of {a.nbytes} bytes"):
            # from pageable memory: the driver has taken its own copy when this returns
            host_to_device(self._bytes, a, a.nbytes, _stream(self._device, stream))
            if wait:
                _stream(self._device, stream).synchronize()

    def read(self, a: Array) -> None:
        with _on(self._device, f"reading {a.nbytes} bytes"):
            cuda.synchronize()
            device_to_host(a, self._bytes, a.nbytes)


class _Event:
    def __init__(self, device: int) -> None:
        self._device = device
        with _on(device, "ordering two streams"):
            self._event = cuda.event(timing=False)

    def record(self, stream: int) -> None:
        with _on(self._device, "ordering two streams"):
            self._event.record(_stream(self._device, stream))

    def wait(self, stream: int) -> None:
        with _on(self._device, "ordering two streams"):
            self._event.wait(_stream(self._device, stream))


class _Driver:
    def kernel(self, made: Made, rule: Rule | None, dtype: np.dtype[Any], device: int) -> _cuda.Kernel:
        """rule: None for the norm."""
        if isinstance(made, NormSource):
            dispatcher = norm_kernel(dtype)
        else:
            assert rule is not None
            dispatcher = (rows_kernel if isinstance(made, RowsSource) else kernel)(rule, dtype)
        with _on(device, f"compiling {made.name}"):
            dispatcher.compile("void(int64)")
        copied = self.table(made.arguments.itemsize, device)
        lock = threading.Lock()

        @cache
        def launcher(blocks: int, stream: int) -> Any:
            with warnings.catch_warnings():  # small steps have few blocks; Numba warns of each such launch once
                warnings.simplefilter("ignore")
                return dispatcher[blocks, THREADS, _stream(device, stream)]

        def run(blocks: int, arguments: Array, stream: int) -> None:
            if is_capturing(stream):
                raise RuntimeError("a step of the numba-cuda backend cannot be captured in a CUDA graph; use CuPy's")
            with lock:  # no other thread's copy may come between
                copied.write(arguments, stream)
                with _on(device, f"launching {made.name}"):
                    launcher(blocks, stream)(copied.address)

        return run

    def table(self, nbytes: int, device: int) -> _cuda.Table:
        return _Table(nbytes, device)

    def current_stream(self, device: int) -> int:
        """CuPy's, if it is in use: Numba has no current stream, only a default one."""
        cupy = sys.modules.get("cupy")
        if cupy is not None and _works(cupy):
            return int(cupy.cuda.get_current_stream(device).ptr)
        return _cuda.stream_address(cuda.default_stream())

    def zero(self, address: int, nbytes: int, device: int, stream: int) -> None:
        with _on(device, f"zeroing {nbytes} bytes"):
            zero(address, nbytes, stream)

    def event(self, device: int) -> _cuda.Event:
        return _Event(device)

    def address(self, g: Any, shape: tuple[int, ...] | None, dtype: np.dtype[Any], device: int) -> int | None:
        return None


_driver = _Driver()


class Stepper(_cuda_guard.HostGuard):
    driver = _driver


def run(rule: Rule, coefficients: Sequence[float], p: Any, g: Any, states: Sequence[Any]) -> None:
    """One step on checked 1-D arrays, for `adam_step`."""
    _cuda.run(_driver, rule, coefficients, p, g, states)
