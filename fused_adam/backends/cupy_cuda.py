"""CuPy: each rule's CUDA C++ as a stock RawModule, which CuPy compiles with NVRTC and keeps in its cache on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np

from fused_adam._arrays import Array
from fused_adam._codegen import Rule
from fused_adam._cuda_arrays import zero
from fused_adam.backends import _cuda, _cuda_guard
from fused_adam.backends._cuda_source import THREADS, Made

# What CuPy appends, -ftz=true among it, changes no bit: see kernels/step.cuh.
_OPTIONS = ("-std=c++17",)

_kernels: dict[tuple[str, int], _cuda.Kernel] = {}


def unusable() -> str:
    """Why this backend cannot run although it can be imported; "" if it can."""
    if cupy.cuda.runtime.is_hip:
        return "this CuPy is built for ROCm, on which nothing here is proven; install CuPy for CUDA"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy cannot use the driver: {error}; install the CuPy for its version of CUDA, or a newer driver"
    return ""


@contextmanager
def _named(call: str) -> Iterator[None]:
    """CUDA's errors say what went wrong; this adds in which call."""
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise MemoryError(f"{call}: {error}") from error
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
        raise RuntimeError(f"{call} failed: {error}") from error
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"{call} failed:\n{error}") from error


class _Stream(NamedTuple):
    """All that CuPy asks of a stream; its class for those of others is deprecated."""

    ptr: int


class _Table:
    def __init__(self, nbytes: int, device: int) -> None:
        with cupy.cuda.Device(device), _named(f"allocating {nbytes} bytes on GPU {device}"):
            self._memory = cupy.cuda.alloc(nbytes)
        self.address = int(self._memory.ptr)
        self._device = device

    def write(self, a: Array, stream: int, wait: bool = False) -> None:
        with cupy.cuda.Device(self._device), _named(f"copying a table of {a.nbytes} bytes to GPU {self._device}"):
            # from pageable memory: the driver has taken its own copy when this returns
            cupy.cuda.runtime.memcpyAsync(
                self.address, a.ctypes.data, a.nbytes, cupy.cuda.runtime.memcpyHostToDevice, stream
            )
            if wait:
                cupy.cuda.runtime.streamSynchronize(stream)

    def read(self, a: Array) -> None:
        with cupy.cuda.Device(self._device), _named(f"reading {a.nbytes} bytes from GPU {self._device}"):
            cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.memcpy(a.ctypes.data, self.address, a.nbytes, cupy.cuda.runtime.memcpyDeviceToHost)


class _Event:
    def __init__(self, device: int) -> None:
        self._device = device
        with self._on():
            self._event = cupy.cuda.Event(disable_timing=True)

    @contextmanager
    def _on(self) -> Iterator[None]:
        with cupy.cuda.Device(self._device), _named(f"ordering two streams on GPU {self._device}"):
            yield

    def record(self, stream: int) -> None:
        with self._on():
            self._event.record(_Stream(stream))

    def wait(self, stream: int) -> None:
        with self._on():
            cupy.cuda.runtime.streamWaitEvent(stream, self._event.ptr)


class _Driver:
    def kernel(self, made: Made, rule: Rule | None, dtype: np.dtype[Any], device: int) -> _cuda.Kernel:
        if (made.text, device) not in _kernels:
            _kernels[made.text, device] = self._compile(made, device)
        return _kernels[made.text, device]

    def _compile(self, made: Made, device: int) -> _cuda.Kernel:
        with cupy.cuda.Device(device), _named(f"compiling {made.name}"):
            function = cupy.RawModule(code=made.text, options=_OPTIONS).get_function(made.name).kernel
        launch = f"launching {made.name} on GPU {device}"

        def kernel(blocks: int, arguments: Array, stream: int) -> None:
            try:
                if cupy.cuda.runtime.getDevice() == device:
                    function((blocks,), (THREADS,), (arguments,), 0, _Stream(stream))
                else:
                    with cupy.cuda.Device(device):
                        function((blocks,), (THREADS,), (arguments,), 0, _Stream(stream))
            except cupy.cuda.driver.CUDADriverError as error:
                raise RuntimeError(f"{launch} failed: {error}") from error

        return kernel

    def table(self, nbytes: int, device: int) -> _cuda.Table:
        return _Table(nbytes, device)

    def current_stream(self, device: int) -> int:
        if cupy.cuda.runtime.getDevice() == device:
            return int(cupy.cuda.get_current_stream().ptr)
        return int(cupy.cuda.get_current_stream(device).ptr)

    def zero(self, address: int, nbytes: int, device: int, stream: int) -> None:
        with cupy.cuda.Device(device), _named(f"zeroing {nbytes} bytes on GPU {device}"):
            zero(address, nbytes, stream)

    def event(self, device: int) -> _cuda.Event:
        return _Event(device)

    def address(self, g: Any, shape: tuple[int, ...] | None, dtype: np.dtype[Any], device: int) -> int | None:
        if type(g) is cupy.ndarray and g.shape == shape and g.dtype == dtype and g.flags.c_contiguous:
            data = g.data
            if data.device_id == device:
                return int(data.ptr)
        return None


_driver = _Driver()


class Stepper(_cuda_guard.DeviceGuard):
    driver = _driver


def run(rule: Rule, coefficients: Sequence[float], p: Any, g: Any, states: Sequence[Any]) -> None:
    """One step on checked 1-D arrays, for `adam_step`."""
    _cuda.run(_driver, rule, coefficients, p, g, states)
