"""A GPU that is not there: the part of CuPy that fused_adam uses, over host memory, whose kernels g++ builds.

RawModule gets the very string that CuPy would compile; a launch gets the very arguments, and is checked as CuPy and the
driver would check it. What is allocated here is "on the GPU" as far as anyone can tell; anything else is not.
"""

from __future__ import annotations

import bisect
import ctypes
import importlib.machinery
import re
import sys
import types
from contextlib import contextmanager
from typing import Any

import fake_guard
import fake_rows
import fake_stored
import host_kernel
import numpy as np

_memory: dict[int, tuple[int, Any]] = {}  # of the device: start -> (size, what keeps it)
_starts: list[int] = []  # the same, in order
launches: list[tuple[str, int, int]] = []  # (kernel, blocks, stream) of each
copies: list[int] = []  # bytes of each copy to the device
compiled: list[str] = []  # texts
waits: list[tuple[int, int]] = []  # (stream, the one it waits for)
reads: list[int] = []  # elements of each read by `allow_arithmetic`'s functions
stream_now = 0
capturing: set[int] = set()  # streams, of which launches go to the graph instead
graph: list[Any] = []  # calls to make at each replay
fail: dict[str, int] = {}  # "alloc" or "launch": after how many more calls to fail


def _count(call: str) -> bool:
    """Whether this call should fail."""
    if call not in fail:
        return False
    fail[call] -= 1
    return fail[call] < 0


def on_device(pointer: int, nbytes: int = 1) -> bool:
    k = bisect.bisect_right(_starts, pointer) - 1
    return k >= 0 and pointer + nbytes <= _starts[k] + _memory[_starts[k]][0]


def device_of(pointer: int) -> int:
    """In the place of the driver's answer."""
    if not on_device(pointer):
        raise ValueError(f"{pointer:#x} is no memory of a GPU (CUDA error 1)")
    return 0


class CUDADriverError(RuntimeError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class CompileException(Exception):
    pass


def _allocate(nbytes: int) -> Any:
    """Device memory between two guard zones, which `check_guards` looks at."""
    if _count("alloc"):
        raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes")
    room = np.full(nbytes + 1024, 0xA5, np.uint8)
    start = 256 + -(room.ctypes.data + 256) % 512
    inside = room[start : start + nbytes]
    _memory[inside.ctypes.data] = (nbytes, room)
    bisect.insort(_starts, inside.ctypes.data)
    return inside


def held() -> int:
    """Bytes of device memory that were allocated so far."""
    return sum(size for size, _ in _memory.values())


def check_guards() -> None:
    """No byte beside any allocation was written."""
    for start, (size, room) in _memory.items():
        lo = start - room.ctypes.data
        assert (room[:lo] == 0xA5).all() and (room[lo + size :] == 0xA5).all(), "a write beside device memory"


class _Pointer:
    device_id = 0

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class ndarray:
    """As much of CuPy's as is used; NumPy refuses to take it for an array, as it does with CuPy's."""

    __array_ufunc__ = None

    def __init__(self, a: Any) -> None:
        self._a = a
        self.data = _Pointer(a.ctypes.data)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self._a.flags.c_contiguous else self._a.strides
        data = (self.data.ptr if self._a.size else 0, False)
        described = {"shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": strides}
        return described | {"version": 3, "stream": stream_now or 1, "descr": [("", self.dtype.str)]}

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    size = property(lambda self: self._a.size)
    ndim = property(lambda self: self._a.ndim)
    nbytes = property(lambda self: self._a.nbytes)
    flags = property(lambda self: self._a.flags)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return ndarray(self._a.reshape(*shape, order=order))

    @property
    def T(self) -> ndarray:
        return ndarray(self._a.T)

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._a[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._a[key] = value._a if isinstance(value, ndarray) else value

    def set(self, a: Any) -> None:
        assert isinstance(a, np.ndarray) and a.shape == self.shape and a.dtype == self.dtype
        self._a[...] = a

    def get(self) -> Any:
        return self._a.copy(order="K")

    def copy(self) -> ndarray:
        return asarray(self._a)

    def __eq__(self, other: Any) -> Any:
        raise AssertionError("comparing device arrays would launch a kernel")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return asarray, (self.get(),)


ndarray.__module__ = "cupy"


def zeros(shape: Any, dtype: Any) -> ndarray:
    dtype = np.dtype(dtype)
    a = _allocate(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
    a[...] = 0
    return ndarray(a)


def of_interface(a: Any) -> Any:
    """The device memory that an object of another library describes, as a NumPy array."""
    described = a.__cuda_array_interface__
    shape, dtype = described["shape"], np.dtype(described["typestr"])
    flat = _read(described["data"][0], dtype, int(np.prod(shape)))
    return np.ndarray(shape, dtype, flat, strides=described["strides"])


def asarray(a: Any) -> ndarray:
    if isinstance(a, ndarray):
        return a
    if hasattr(a, "__cuda_array_interface__"):
        return ndarray(of_interface(a))
    source = np.asarray(a)
    raw = _allocate(source.nbytes).view(source.dtype)
    order = "F" if source.flags.f_contiguous and not source.flags.c_contiguous else "C"
    copy = raw.reshape(source.shape, order=order)
    copy[...] = source
    return ndarray(copy)


def from_dlpack(a: Any) -> ndarray:
    assert hasattr(a, "__dlpack__")
    return ndarray(a.array)


def asnumpy(a: ndarray) -> Any:
    return a.get()


def allow_arithmetic(patch: Any) -> None:
    """What a network is made of, for callers who ask for it: fused_adam itself launches nothing but its kernels."""

    def on_device(f: Any) -> Any:
        def call(*operands: Any, **options: Any) -> ndarray:
            if any(isinstance(x, np.ndarray) for x in operands):
                raise TypeError("Unsupported type <class 'numpy.ndarray'>")
            return asarray(f(*(x._a if isinstance(x, ndarray) else x for x in operands), **options))

        return call

    cupy = sys.modules["cupy"]
    operators = "add radd sub rsub mul rmul truediv rtruediv matmul neg abs gt eq".split()
    for name in [f"__{operator}__" for operator in operators] + ["sum", "mean", "max", "argmax"]:
        patch.setattr(ndarray, name, on_device(getattr(np.ndarray, name)), raising=False)
    for name in ("maximum", "exp", "log"):
        patch.setattr(cupy, name, on_device(getattr(np, name)), raising=False)

    def take(a: ndarray, key: Any) -> ndarray:
        return asarray(a._a[key._a]) if isinstance(key, ndarray) else ndarray(a._a[key])

    patch.setattr(ndarray, "__getitem__", take)
    patch.setattr(ndarray, "__len__", lambda a: len(a._a), raising=False)
    patch.setattr(cupy, "stack", lambda arrays: asarray(np.stack([a._a for a in arrays])), raising=False)
    for name in ("__float__", "tolist"):
        patch.setattr(ndarray, name, _read_with(getattr(np.ndarray, name)), raising=False)


def _read_with(f: Any) -> Any:
    def call(a: ndarray) -> Any:
        reads.append(a.size)
        return f(a._a)

    return call


class Foreign:
    """An array of a library that nobody has heard of, known by its interface alone."""

    def __init__(self, a: Any, read_only: bool = False, stream: int | None = None, **other: Any) -> None:
        self.array = asarray(a)._a
        self.interface = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, read_only),
            "strides": None if self.array.flags.c_contiguous else self.array.strides,
            "version": 3,
            "stream": stream,
            **other,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


def _layout(text: str) -> Any:
    """The arguments of a kernel, by what its text says of itself."""
    states, coefficients, *groups = map(int, re.findall(r"(?:STATES|COEFFICIENTS|GROUPS) = (\d+)", text))
    number = {"float": np.float32, "double": np.float64}[re.findall(r"typedef (\w+) Number;", text)[0]]
    segment = [(name, np.int64) for name in ("n", "first", "group", "p")] + [("states", np.int64, (max(1, states),))]
    tables = [(name, np.int64) for name in ("segments", "gradients", "segment_of_chunk", "chunk")]
    rest: list[Any] = [("segment", segment), ("gradient", np.int64)]
    if groups:
        rest.append(("coefficients", number, (groups[0], coefficients)))
    else:
        rest += [("control", np.int64), ("coefficients", np.int64)]
    return np.dtype([*tables, *rest], align=True)


class _Function:
    def __init__(self, text: str, name: str) -> None:
        compiled.append(text)
        self._name = name
        self._layout, self._check = held_to(text, name)
        self._run = host_kernel.build(text, name)

    @property
    def kernel(self) -> _Function:
        return self

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int, stream: Any
    ) -> None:
        if _count("launch"):
            raise CUDADriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch")
        assert all(type(x) is int for x in (*grid, *block)) and len(grid) == len(block) == 1
        assert 0 < grid[0] < 2**31 and block == (256,) and shared == 0
        (given,) = args
        assert isinstance(given, np.ndarray) and given.size == 1 and given.nbytes <= 4096
        arguments = given.view(self._layout)
        self._check(arguments[0], grid[0])
        arguments = arguments.copy()  # a graph keeps its own

        def run() -> None:
            self._check(arguments[0], grid[0])
            launches.append((self._name, grid[0], stream.ptr))
            self._run(grid[0], arguments)

        if stream.ptr in capturing:
            graph.append(run)
        else:
            run()


def held_to(text: str, name: str) -> tuple[Any, Any]:
    """A kernel's arguments, and a check of them and the number of blocks, by what its text says of itself."""
    itemsize = 8 if "typedef double Number;" in text else 4
    if "struct Gathered" in text:
        return fake_rows.ARGUMENTS, fake_rows.checker(text)
    if "constexpr Kind P" in text:
        return fake_stored.layout(text), fake_stored.checker(text)
    if name == "prologue":
        return fake_guard.PROLOGUE, fake_guard.check_prologue
    if name.startswith("norm_"):
        return fake_guard.NORM, lambda a, blocks: fake_guard.check_norm(a, blocks, itemsize)
    return _layout(text), lambda a, blocks: check_arguments(a, blocks, itemsize)


def check_arguments(a: Any, blocks: int, itemsize: int) -> None:
    """Everything the kernel will touch is the device's."""
    assert a["chunk"] > 0 and a["chunk"] % 128 == 0
    if "control" in a.dtype.names:
        assert on_device(int(a["control"]), fake_guard.CONTROL) and on_device(int(a["coefficients"]))
    rows, gradients = [a["segment"]], [a["gradient"]]
    if a["segments"]:
        tables = [("segments", 1), ("gradients", 8), ("segment_of_chunk", 4 * blocks)]
        assert all(on_device(int(a[name]), size) for name, size in tables)
        chunks = _read(a["segment_of_chunk"], np.int32, blocks)
        n = int(chunks[-1]) + 1
        rows = _read(a["segments"], a["segment"].dtype, n)
        gradients = _read(a["gradients"], np.int64, n)
        assert (np.diff(chunks) >= 0).all()
    for row, g in zip(rows, gradients, strict=True):
        states = [s for s in row["states"] if s]
        assert all(on_device(int(x), int(row["n"]) * itemsize) for x in (row["p"], g, *states))


def _read(pointer: Any, dtype: Any, n: int) -> Any:
    start = _starts[bisect.bisect_right(_starts, int(pointer)) - 1]
    offset = int(pointer) - _memory[start][1].ctypes.data
    raw = _memory[start][1][offset : offset + n * np.dtype(dtype).itemsize]
    return raw.view(dtype)


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
        assert options == ("-std=c++17",)
        self._code = code

    def get_function(self, name: str) -> _Function:
        return _Function(self._code, name)


class Device:
    def __init__(self, number: int) -> None:
        assert number == 0, "there is one GPU"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Stream:
    """One that the caller makes current; CuPy's own class for a given address, ExternalStream, is deprecated."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __enter__(self) -> Stream:
        global stream_now
        self._before, stream_now = stream_now, self.ptr
        return self

    def __exit__(self, *_: Any) -> None:
        global stream_now
        stream_now = self._before


class Event:
    """Its address is that of the stream it was recorded on, if it was."""

    ptr: int | None = None

    def __init__(self, disable_timing: bool) -> None:
        assert disable_timing

    def record(self, stream: Any) -> None:
        self.ptr = stream.ptr


def _memcpy_async(destination: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    assert kind == 1 and on_device(destination, nbytes) and not on_device(source)
    assert stream not in capturing, "a replay would copy from memory that is another's by then"
    ctypes.memmove(destination, source, nbytes)
    copies.append(nbytes)


def _memcpy(destination: int, source: int, nbytes: int, kind: int) -> None:
    assert kind == 2 and on_device(source, nbytes) and not on_device(destination)
    assert not capturing, "a capture cannot wait for the device"
    ctypes.memmove(destination, source, nbytes)


def zero(address: int, nbytes: int, stream: int) -> None:
    """In the place of the driver's."""
    assert on_device(address, nbytes)
    if stream in capturing:
        graph.append(lambda: ctypes.memset(address, 0, nbytes))
    else:
        ctypes.memset(address, 0, nbytes)


def replay() -> None:
    """What cudaGraphLaunch would do."""
    for call in graph:
        call()


def _module() -> types.ModuleType:
    """This file under CuPy's names."""
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    for thing in (ndarray, zeros, asarray, asnumpy, from_dlpack, RawModule):
        setattr(cupy, thing.__name__, thing)
    space = types.SimpleNamespace
    cupy.cuda = space(  # type: ignore[attr-defined]
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc=lambda nbytes: _Alloc(nbytes),
        get_current_stream=lambda device=0: space(ptr=stream_now),
        memory=space(OutOfMemoryError=OutOfMemoryError),
        driver=space(CUDADriverError=CUDADriverError),
        compiler=space(CompileException=CompileException),
        runtime=space(
            is_hip=False,
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            memcpyAsync=_memcpy_async,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpy=_memcpy,
            streamWaitEvent=lambda stream, event: event is None or waits.append((stream, event)),
            streamSynchronize=lambda stream: None,
            deviceSynchronize=lambda: None,
            CUDARuntimeError=CUDARuntimeError,
        ),
    )
    return cupy


class _Alloc:
    def __init__(self, nbytes: int) -> None:
        self._keep = _allocate(nbytes)
        self.ptr = self._keep.ctypes.data


@contextmanager
def installed(monkeypatch: Any) -> Any:
    """With this as CuPy, and one GPU, for fused_adam; as it was afterwards."""
    from fused_adam import _cuda_arrays

    backends = sys.modules["fused_adam.backends"]
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("cupy.")]:  # lazy ones would look for the real one
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "cupy", _module())
        patch.delitem(sys.modules, "fused_adam.backends.cupy_cuda", raising=False)
        patch.setattr(_cuda_arrays, "device_of", device_of)
        patch.setattr(_cuda_arrays, "zero", zero)
        for name in ("_cuda_arrays", "backends._cuda", "backends._cuda_rows", "backends._cuda_guard"):
            if (module := sys.modules.get(f"fused_adam.{name}")) is not None:
                patch.setattr(module, "is_capturing", lambda stream: stream in capturing)
        patch.setattr(backends, "no_device", lambda: "")
        for record in (_memory, _starts, launches, copies, compiled, waits, reads, fail, capturing, graph):
            record.clear()
        yield sys.modules["cupy"]
        check_guards()
    sys.modules.pop("fused_adam.backends.cupy_cuda", None)
