"""A GPU that is not there, as Numba shows it: `fake_cupy`'s device memory behind numba.cuda's names.

A launch runs the CUDA C++ kernel, which g++ builds, in the place of the one that Numba would compile; both take the
same structs, and that both compute the same is for the simulator to show (see test_numba_cuda).
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from contextlib import contextmanager, nullcontext
from typing import Any

import fake_cupy
import host_kernel
import numpy as np

from fused_adam.backends._cuda_source import norm_source, rows_source, source


class CudaAPIError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


class Stream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def synchronize(self) -> None:
        pass


class Event:
    _stream: int | None = None

    def record(self, stream: Stream) -> None:
        self._stream = stream.handle

    def wait(self, stream: Stream) -> None:
        if self._stream is not None:
            fake_cupy.waits.append((stream.handle, self._stream))


class DeviceNDArray(fake_cupy.ndarray):
    def __getitem__(self, key: Any) -> Any:
        return DeviceNDArray(self._a[key])

    def reshape(self, *shape: Any, order: str = "C") -> Any:
        return DeviceNDArray(self._a.reshape(*shape, order=order))

    @property
    def device_ctypes_pointer(self) -> Any:
        return types.SimpleNamespace(value=self.data.ptr)

    def copy_to_device(self, source: Any) -> None:
        assert source.shape == self.shape and source.dtype == self.dtype
        assert source.flags["C_CONTIGUOUS"] and self.flags["C_CONTIGUOUS"]
        self._a[...] = source._a if isinstance(source, DeviceNDArray) else source

    def copy_to_host(self) -> Any:
        return self.get()


DeviceNDArray.__module__ = "numba.cuda.cudadrv.devicearray"


def device_array(shape: Any, dtype: Any) -> DeviceNDArray:
    try:
        a = fake_cupy.zeros(shape, dtype)._a
    except fake_cupy.OutOfMemoryError as error:
        raise CudaAPIError(2, "Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY") from error
    a.view(np.uint8)[...] = 0xFF  # not zeros: nobody promised any
    return DeviceNDArray(a)


def to_device(a: Any) -> DeviceNDArray:
    return DeviceNDArray(fake_cupy.asarray(a)._a)


def as_cuda_array(a: Any) -> DeviceNDArray:
    return DeviceNDArray(fake_cupy.of_interface(a))


def _memset(a: DeviceNDArray, value: int, nbytes: int) -> None:
    assert nbytes == a.nbytes
    a._a.view(np.uint8)[...] = value


def _host_to_device(destination: DeviceNDArray, a: Any, nbytes: int, stream: Stream) -> None:
    assert isinstance(stream, Stream) and a.nbytes == nbytes <= destination.nbytes and a.flags.c_contiguous
    destination._a[:nbytes] = a.reshape(-1).view(np.uint8)
    fake_cupy.copies.append(nbytes)


def _device_to_host(a: Any, source: DeviceNDArray, nbytes: int) -> None:
    assert a.nbytes == nbytes <= source.nbytes and a.flags.c_contiguous
    a.reshape(-1).view(np.uint8)[...] = source._a[:nbytes]


class _Dispatcher:
    def __init__(self, made: Any) -> None:
        self._made = made
        self._check = fake_cupy.held_to(made.text, made.name)[1]

    def compile(self, signature: str) -> None:
        assert signature == "void(int64)"
        fake_cupy.compiled.append(self._made.name)

    def __getitem__(self, configuration: tuple[Any, ...]) -> Any:
        blocks, threads, stream = configuration
        assert type(blocks) is int and 0 < blocks < 2**31 and threads == 256 and isinstance(stream, Stream)

        def launch(address: int) -> None:
            if fake_cupy._count("launch"):
                raise CudaAPIError(701, "Call to cuLaunchKernel results in CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
            arguments = fake_cupy._read(address, self._made.arguments, 1)
            self._check(arguments[0], blocks)
            fake_cupy.launches.append((self._made.name, blocks, stream.handle))
            host_kernel.build(self._made.text, self._made.name)(blocks, arguments)

        return launch


@contextmanager
def installed(monkeypatch: Any) -> Any:
    """With this as Numba's CUDA part, one GPU and no CuPy, for fused_adam; as it was afterwards."""
    import numba

    space = types.SimpleNamespace
    cuda: Any = types.ModuleType("numba.cuda")
    for thing in (device_array, to_device, as_cuda_array):
        setattr(cuda, thing.__name__, thing)
    cuda.default_stream, cuda.external_stream = lambda: Stream(0), Stream
    cuda.event = lambda timing: Event()
    cuda.is_available = lambda: True
    cuda.get_current_device = lambda: space(id=0)
    cuda.gpus = {0: nullcontext()}
    cuda.synchronize = lambda: None
    driver: Any = types.ModuleType("numba.cuda.cudadrv.driver")
    driver.CudaAPIError, driver.host_to_device, driver.device_memset = CudaAPIError, _host_to_device, _memset
    driver.device_to_host = _device_to_host
    kernels: Any = types.ModuleType("fused_adam.backends._numba_cuda_kernels")
    kernels.kernel = lambda rule, dtype: _Dispatcher(source(rule, np.dtype(dtype)))
    rows: Any = types.ModuleType("fused_adam.backends._numba_cuda_rows")
    rows.rows_kernel = lambda rule, dtype: _Dispatcher(rows_source(rule, np.dtype(dtype)))
    norm: Any = types.ModuleType("fused_adam.backends._numba_cuda_norm")
    norm.norm_kernel = lambda dtype: _Dispatcher(norm_source(np.dtype(dtype)))
    package = types.ModuleType("numba_cuda")
    package.__spec__ = importlib.machinery.ModuleSpec("numba_cuda", None)

    with fake_cupy.installed(monkeypatch), monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)  # as if it were not installed
        for module in (package, driver, kernels, rows, norm, cuda):
            patch.setitem(sys.modules, module.__name__, module)
        cudadrv: Any = types.ModuleType("numba.cuda.cudadrv")
        cudadrv.driver = driver
        patch.setitem(sys.modules, "numba.cuda.cudadrv", cudadrv)
        patch.setattr(numba, "cuda", cuda, raising=False)
        patch.delitem(sys.modules, "fused_adam.backends.numba_cuda", raising=False)
        yield cuda
    sys.modules.pop("fused_adam.backends.numba_cuda", None)
