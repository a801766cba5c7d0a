"""Any place in memory that is not refused gives the bytes of the plain case: odd sizes, offsets, orders, subclasses."""

from __future__ import annotations

import numpy as np
import pytest
from watch import adam_arrays, misaligned, random

import fused_adam

CLASSES = [
    (fused_adam.SGD, {}),
    (fused_adam.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (fused_adam.Adagrad, {"initial_accumulator_value": 0.5}),
    (fused_adam.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    (fused_adam.Adam, {"amsgrad": True}),
    (fused_adam.AdamW, {"maximize": True}),
    (fused_adam.Lion, {"weight_decay": 0.1}),
]
# Around nothing, vector widths, and the chunks of NumPy (2**15) and Numba (2**16; threads from 2**18 on).
SIZES = [*range(18), 31, 63, 65, 127, 129, 1025, 2**15 - 1, 2**15 + 1, 2**16 + 3, 2**18 + 7]


def plain(name, n, dtype, max_v):
    """What the NumPy backend makes of fresh aligned 1-D arrays."""
    arrays = adam_arrays(n, n, dtype, max_v)
    fused_adam.adam_step(**arrays, step=3, weight_decay=0.1, backend="numpy")
    return {k: a.tobytes() for k, a in arrays.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("max_v", [False, True])
def test_adam_step_on_any_size_and_offset(dtype, max_v, backend):
    size = np.dtype(dtype).itemsize
    for n in SIZES:
        expected = plain("adam", n, dtype, max_v)
        for offset in (0, 1, size - 1, size, 3 * size, 16, 17):
            arrays = {k: misaligned(a, offset) for k, a in adam_arrays(n, n, dtype, max_v).items()}
            fused_adam.adam_step(**arrays, step=3, weight_decay=0.1, backend=backend)
            assert {k: a.tobytes() for k, a in arrays.items()} == expected, (n, offset)
        # each array at an offset of its own
        arrays = {k: misaligned(a, j) for j, (k, a) in enumerate(adam_arrays(n, n, dtype, max_v).items())}
        fused_adam.adam_step(**arrays, step=3, weight_decay=0.1, backend=backend)
        assert {k: a.tobytes() for k, a in arrays.items()} == expected, n


def fortran(a):
    return np.array(a, order="F")


def transposed(a):
    return np.array(a.T, order="C").T


def memory_map(a, path):
    m = np.memmap(path, a.dtype, "w+", shape=a.shape)
    m[...] = a
    return m


class Subclass(np.ndarray):
    """A subclass with a mind of its own: everything but its memory lies."""

    def reshape(self, *args, **kwargs):
        raise AssertionError("a subclass's own reshape was called")

    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError("a subclass's own ufunc was called")

    def __getitem__(self, key):
        raise AssertionError("a subclass's own indexing was called")

    @property
    def __array_interface__(self):
        return {"data": (8, False), "shape": (1,), "typestr": "<f4", "version": 3}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("shape", [(), (1, 1), (7, 5), (300, 200), (2, 3, 4), (4, 1, 3), (0, 3), (1, 70001)])
@pytest.mark.parametrize("kind", ["C", "F", "transposed", "memmap", "matrix", "subclass", "view of a view"])
def test_adam_step_and_optimizers_on_any_order_and_subclass(shape, kind, backend, tmp_path):
    if (kind == "matrix" and len(shape) != 2) or (kind == "memmap" and 0 in shape):
        return
    n = iter(range(10**6))
    make = {
        "C": np.array,
        "F": fortran,
        "transposed": transposed,
        "memmap": lambda a: memory_map(a, tmp_path / str(next(n))),
        "matrix": np.matrix,
        "subclass": lambda a: a.copy().view(Subclass),
        "view of a view": lambda a: np.stack([a, a])[1:].reshape(a.shape),
    }[kind]

    expected = adam_arrays(0, shape)
    arrays = {k: make(a) for k, a in expected.items()}
    fused_adam.adam_step(**expected, step=2, backend="numpy")
    fused_adam.adam_step(**arrays, step=2, backend=backend)
    for k, a in expected.items():
        assert np.asarray(arrays[k]).tobytes() == a.tobytes(), k

    for cls, kw in CLASSES:
        p, g, h = random(1, shape, shape, shape)
        q = make(p)
        p = np.array(q)
        ours, plain = cls({"x": q}, backend=backend, **kw), cls([p], backend="numpy", **kw)
        for gradient in (g, h):
            plain.step([gradient])
        ours.step({"x": make(g)})
        ours.apply_gradients([(h, q)])  # in the plain order: a gradient need not be in the parameter's
        assert np.asarray(q).tobytes() == p.tobytes(), cls
        for mine, theirs in zip(ours.state_dict()["state"], plain.state_dict()["state"], strict=True):
            for name in mine:
                assert mine[name].tobytes() == theirs[name].tobytes(), (cls, name)


@pytest.mark.parametrize(("cls", "kw"), CLASSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers_on_any_size_and_offset(cls, kw, dtype, backend):
    shapes = [*SIZES[:20], 1025, 2**15 + 1, 2**16 + 3]
    params, first, second = (random(k, *shapes, dtype=dtype) for k in range(3))
    skewed = [misaligned(p, k % 9) for k, p in enumerate(params)]
    ours, plain = cls(skewed, backend=backend, **kw), cls(params, backend="numpy", **kw)
    for grads in (first, second):
        plain.step(grads)
        ours.step([misaligned(g, (k + 1) % 9) for k, g in enumerate(grads)])
    for a, b in zip(skewed, params, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("cls", [fused_adam.SGD, fused_adam.Adam])
def test_a_scalar_gradient_is_taken_for_a_0_d_parameter(cls, backend):
    p, q = np.array(1.0, np.float32), np.array(1.0, np.float32)
    cls([p], backend=backend).step([np.float32(0.5)])
    cls([q], backend="numpy").step([np.array(0.5, np.float32)])
    assert p == q != 1


def test_floating_point_errors_are_nobodys_business(backend):
    """A step behaves as IEEE arithmetic does, whatever np.seterr says; and leaves it alone."""
    with np.errstate(all="raise"):
        before = np.geterr()
        arrays = adam_arrays(0)
        arrays["g"][:] = [np.nan, np.inf, -np.inf, 3e38, 1e-45, 0, -0.0, 1e-30, 1e30, 1]
        fused_adam.adam_step(**arrays, step=1, eps=1e-60, backend=backend)
        p, q = random(0, 10, 10)
        fused_adam.RMSprop([p], eps=1e-60, centered=True, backend=backend).step([arrays["g"]])
        fused_adam.Lion([q], backend=backend).step([arrays["g"]])
        assert np.geterr() == before
    assert np.isnan(arrays["p"][0]) and np.isfinite(arrays["p"][5:]).all()
