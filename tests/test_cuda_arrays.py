"""Arrays on a GPU as other libraries describe them: the array interface and DLPack, old and versioned."""

from __future__ import annotations

import ctypes
import gc

import fake_cupy
import numpy as np
import pytest
from conftest import same_bits

import fused_adam
from fused_adam._cuda_arrays import _Tensor, _Versioned, view

F32 = np.float32
_NEW = ctypes.pythonapi.PyCapsule_New
_NEW.restype, _NEW.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Producer:
    """An array that only speaks DLPack. Keeps what it was asked for."""

    def __init__(self, a, versioned=False, read_only=False, device=(2, 0), strided=True, offset=0, code=2, major=1):
        self.array = fake_cupy.asarray(a)._a
        self.versioned, self.device, self.asked, self.alive = versioned, device, [], []
        self._shape = (ctypes.c_int64 * self.array.ndim)(*self.array.shape)
        steps = [s // self.array.itemsize for s in self.array.strides]
        self._strides = (ctypes.c_int64 * self.array.ndim)(*steps)
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = _Tensor(
            self.array.ctypes.data - offset, *device, self.array.ndim, code, self.array.itemsize * 8, 1,
            ctypes.cast(self._shape, pointer), ctypes.cast(self._strides, pointer) if strided else None, offset,
        )  # fmt: skip
        self._managed = _Versioned(major, 0, None, None, int(read_only), tensor) if versioned else tensor

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.versioned and "max_version" in options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked.append(options)
        self.name = b"dltensor_versioned" if self.versioned else b"dltensor"  # the capsule does not copy it
        return _NEW(ctypes.addressof(self._managed), self.name, None)


@pytest.fixture
def cupy(monkeypatch):
    with fake_cupy.installed(monkeypatch) as module:
        yield module


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("offset", [0, 64])
def test_a_step_on_dlpack_arrays(cupy, versioned, strided, offset):
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=(2, 30, 40)).astype(F32)
    device = Producer(p, versioned, strided=strided, offset=offset)
    gradient = Producer(g, versioned, read_only=True, strided=strided, offset=offset)
    opt, expected = fused_adam.AdamW([device]), fused_adam.AdamW([p])
    for _ in range(3):
        opt.step([gradient], stream=9)
        expected.step([g])
    gc.collect()
    assert same_bits(p, device.array)
    assert [asked["stream"] for asked in gradient.asked] == [9, 9, 9]
    flat = fused_adam.flatten([device])
    assert same_bits(flat.data.get()[:1200], p.reshape(-1))


def test_dlpack_on_the_default_stream(cupy):
    """Which DLPack calls 1: it knows no stream 0."""
    p, g = Producer(np.zeros(9, F32)), Producer(np.zeros(9, F32))
    fused_adam.AdamW([p]).step([g])
    assert [asked["stream"] for asked in g.asked] == [1] and fake_cupy.waits == []


def test_adam_step_waits_for_what_dlpack_ordered(cupy):
    """The producers come before the default stream, the step is on another."""
    arrays = [Producer(np.ones(9, F32)) for _ in range(4)]
    with cupy.cuda.Stream(77):
        fused_adam.adam_step(*arrays, step=1)
    assert fake_cupy.waits == [(77, 1)]


class Old(Producer):
    """Version 2 of the array interface, without a stream, beside DLPack, as PyTorch's."""

    read_only = False

    @property
    def __cuda_array_interface__(self):
        described = {"shape": self.array.shape, "typestr": "<f4", "version": 2, "strides": None}
        return described | {"data": (self.array.ctypes.data, self.read_only)}


def test_an_interface_without_a_stream_gives_way_to_dlpack(cupy):
    p, g = Old(np.zeros(9, F32)), Old(np.ones(9, F32))
    opt = fused_adam.AdamW([p])
    with cupy.cuda.Stream(77):
        opt.step([g])
    assert [asked["stream"] for asked in g.asked] == [77] and fake_cupy.waits == []
    p.read_only = True
    with pytest.raises(ValueError, match=r"params\[0\] is read-only"):
        fused_adam.AdamW([p])


def test_what_dlpack_says_is_understood(cupy):
    a = np.zeros((4, 6), F32)
    assert view("a", Producer(np.asfortranarray(a))).order == "F"
    assert view("a", Producer(a, versioned=True, read_only=True)).writable is False
    assert view("a", Producer(a.astype(np.float64))).dtype == np.float64
    assert view("a", Producer(a, device=(13, 3))).device == 3  # managed memory
    assert view("a", Producer(a[:0])).device == -1
    assert view("a", Producer(a, device=(1, 0))) is None  # host memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": 4}, "expected float32 or float64"),  # bfloat
        ({"code": 99}, "numbers of an unknown kind"),
        ({"versioned": True, "major": 2}, "speaks DLPack 2"),
        ({"device": (10, 0)}, "should be a NumPy array or one on a GPU"),  # ROCm
    ],
)
def test_dlpack_that_is_refused(cupy, options, message):
    with pytest.raises(TypeError, match=message):
        fused_adam.AdamW([Producer(np.zeros(8, F32), **options)])
    with pytest.raises(ValueError, match="has dtype int32; expected float32 or float64"):
        fused_adam.AdamW([Producer(np.zeros(8, np.int32), code=0)])


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((4, 6), None, "C"),
        ((4, 6), (24, 4), "C"),
        ((4, 6), (4, 16), "F"),
        ((4, 6), (48, 8), ""),
        ((4, 6), (24, 0), ""),
        ((4, 6), (0, 0), ""),
        ((1, 6), (999, 4), "C"),
        ((6, 1), (4, 999), "C"),
        ((), (), "C"),
        ((0, 3), (7, 7), "C"),
        ((2, 3, 4), (4, 8, 24), "F"),
        ((2, 3, 4), (48, 4, 12), ""),
        ((4, 6), (-24, 4), ""),
    ],
)
def test_orders(cupy, shape, strides, order):
    a = fake_cupy.Foreign(np.zeros(1000, F32), shape=shape, strides=strides)
    assert view("a", a).order == order


def test_interfaces_that_lie(cupy):
    for broken in ({"shape": None}, {"typestr": "nonsense"}, {"data": None}):
        with pytest.raises(TypeError, match=r"params\[0\] cannot be read as memory on a GPU"):
            fused_adam.AdamW([fake_cupy.Foreign(np.zeros(3, F32), **broken)])
    with pytest.raises(ValueError, match=r"params\[0\] has the byte order of another machine"):
        fused_adam.AdamW([fake_cupy.Foreign(np.zeros(3, F32), typestr=">f4")])
    with pytest.raises(ValueError, match=r"params\[0\] is not contiguous"):
        fused_adam.AdamW([fake_cupy.Foreign(np.zeros(6, F32), shape=(3,), strides=(8,))])
