"""Arrays on a GPU, of any library: through the CUDA array interface or DLPack, and what the driver knows of them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fused_adam._arrays import BFLOAT16, CudaArray

LEGACY_STREAM = 1  # the default stream, as the array protocols number it
_KIND = {0: "i", 1: "u", 2: "f", 4: "bfloat", 5: "c", 6: "b"}  # DLPack's type codes
_CUDA, _CUDA_MANAGED = 2, 13  # its device types


# --- the driver -------------------------------------------------------------------------------------------------------


@cache
def _libcuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def no_device() -> str:
    """Why there is no GPU to run on, and what to do; "" if there is one. Imports no CUDA package."""
    try:
        driver = _libcuda()
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 is not found); install one, or use host arrays"
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value < 1:
        return f"the NVIDIA driver finds no GPU (CUDA error {status}); check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return ""


_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


def device_of(pointer: int) -> int:
    """The number of the GPU that memory lies on. Raises ValueError for memory the driver does not know."""
    found = ctypes.c_int(0)
    status = _libcuda().cuPointerGetAttribute(ctypes.byref(found), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    if status != 0:
        raise ValueError(f"{pointer:#x} is no memory of a GPU (CUDA error {status})")
    return found.value


def is_capturing(stream: int) -> bool:
    """Whether work for a stream is recorded for a CUDA graph now; that of the default streams (0 to 2) cannot be."""
    status = ctypes.c_int(0)
    known = stream > 2 and _libcuda().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status)) == 0
    return known and status.value == 1


def zero(address: int, nbytes: int, stream: int) -> None:
    """Set memory of the current device to 0, in the order of a stream. Raises RuntimeError."""
    arguments = ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
    if status := _libcuda().cuMemsetD8Async(*arguments):
        raise RuntimeError(f"setting {nbytes} bytes at {address:#x} to 0 failed (CUDA error {status})")


# --- arrays -----------------------------------------------------------------------------------------------------------


def view(name: str, a: Any, stream: int = LEGACY_STREAM) -> CudaArray | None:
    """What a message calls `name` as memory on a GPU, or None if it is something else.

    Args:
        stream: the one that will use it, for DLPack, whose producers order themselves before it.

    Raises:
        TypeError: it says that it is such memory, and then cannot be read.
    """
    if isinstance(a, np.ndarray | np.generic):
        return None
    try:
        interface = getattr(a, "__cuda_array_interface__", None)
        # Before version 3 the interface says nothing of streams (PyTorch's, JAX's); DLPack orders them.
        if interface is not None and ("stream" in interface or not hasattr(a, "__dlpack__")):
            return _from_interface(interface, a)
        if hasattr(a, "__dlpack__") and int(a.__dlpack_device__()[0]) in (_CUDA, _CUDA_MANAGED):
            found = _from_dlpack(a, stream or LEGACY_STREAM)
            read_only = interface is not None and interface["data"][1]  # DLPack before version 1 cannot say it
            return replace(found, writable=found.writable and not read_only)
    except Exception as error:
        raise TypeError(f"{name} cannot be read as memory on a GPU: {error}") from error
    return None


def never_moves(a: Any) -> bool:
    """Whether an array object stands for the same memory as long as it lives; a tensor of PyTorch's does not."""
    return type(a).__module__.partition(".")[0] in ("cupy", "numba")


def _order(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> str:
    """ "C", "F" or "" from strides in bytes."""
    if strides is None or 0 in shape:
        return "C"
    for order, axes in (("C", reversed(range(len(shape)))), ("F", iter(range(len(shape))))):
        expected = itemsize
        for k in axes:
            if shape[k] != 1 and strides[k] != expected:
                break
            expected *= shape[k]
        else:
            return order
    return ""


def _from_interface(interface: Any, a: Any) -> CudaArray:
    pointer, read_only = interface["data"]
    shape = tuple(interface["shape"])
    dtype = np.dtype(interface["typestr"])
    if dtype.kind == "V" and isinstance(own := getattr(a, "dtype", None), np.dtype):
        dtype = own  # the interface has no word for ml_dtypes' bfloat16
    if interface.get("mask") is not None:
        raise TypeError("it is masked")
    device = device_of(pointer) if pointer and 0 not in shape else -1
    order = _order(shape, interface.get("strides"), dtype.itemsize)
    return CudaArray(pointer or 0, shape, dtype, order, not read_only, device, interface.get("stream"), a)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1  # of the flags


def _from_dlpack(a: Any, stream: int) -> CudaArray:
    """The capsule stays unconsumed and is kept as the owner: its destructor then frees what the producer lent."""
    try:
        capsule = a.__dlpack__(stream=stream, max_version=(1, 1))
    except TypeError:  # a producer of before version 1
        capsule = a.__dlpack__(stream=stream)
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    name = name_of(capsule)
    address = pointer_of(capsule, name)
    writable = True
    if name == b"dltensor_versioned":
        versioned = _Versioned.from_address(address)
        if versioned.major != 1:
            raise TypeError(f"it speaks DLPack {versioned.major}, which is not known here")
        t, writable = versioned.tensor, not versioned.flags & _READ_ONLY
    else:
        t = _Tensor.from_address(address)
    kind = _KIND.get(t.code)
    if t.lanes != 1 or kind is None or (kind == "bfloat" and t.bits != 16):
        raise TypeError(
            f"it holds {kind or 'numbers of an unknown kind'} of {t.bits} bits; expected float32 or float64"
        )
    dtype = BFLOAT16 if kind == "bfloat" else np.dtype("?") if kind == "b" else np.dtype(f"{kind}{t.bits // 8}")
    shape = tuple(t.shape[: t.ndim])
    strides = tuple(s * dtype.itemsize for s in t.strides[: t.ndim]) if t.strides else None
    order = _order(shape, strides, dtype.itemsize)
    device = -1 if 0 in shape else t.device
    # the producer has put its own work before that stream's
    return CudaArray((t.data or 0) + t.byte_offset, shape, dtype, order, writable, device, stream, (a, capsule))
