"""Beyond 2**31 elements, and up to the last byte before a page that must not be touched."""

from __future__ import annotations

import mmap
import sys

import pytest
from test_interrupt import run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")

# Arrays of 2**31 + 5 float32 whose pages are all the same few, but for some at chosen elements, which have their own.
# The shared pages are updated thousands of times over and hold nothing of interest; the others can be told exactly.
LARGE = """
import ctypes, mmap, os, sys, time
import numpy as np
import fused_adam
from fused_adam._memory import HOST

N = 2**31 + 5
PAGE = 2**14  # bytes: 4,096 elements
WINDOW = 2**20  # fits a cache; smaller would ask for more mappings than Linux allows
# Around 0, the int32 limits of bytes and of elements, and the end
OWN = sorted({0, 2**29, 2**30, 2**31 - PAGE // 4, 2**31})

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 16, 32, 0x4000
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def map_at(address, size, flags, fd=-1):
    result = libc.mmap(address, size, READ_WRITE, flags, fd, 0)
    assert result not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return result


class Large:
    def __init__(self, seed):
        size = -(-N * 4 // PAGE) * PAGE
        base = self.base = map_at(None, size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        self.size = size
        fd = os.memfd_create("window")
        os.ftruncate(fd, WINDOW)
        for start in range(0, size, WINDOW):
            map_at(base + start, min(WINDOW, size - start), MAP_SHARED | MAP_FIXED, fd)
        os.close(fd)
        self.a = np.ctypeslib.as_array(ctypes.cast(base, ctypes.POINTER(ctypes.c_float)), (N,))
        rng = np.random.default_rng(seed)
        self.a[: WINDOW // 4] = 0.5
        for first in OWN:
            map_at(base + 4 * first, PAGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
            part = self.a[first : first + PAGE // 4]
            part[:] = np.abs(rng.standard_normal(part.size, np.float32))

    def own(self):
        return np.concatenate([self.a[first : first + PAGE // 4] for first in OWN])


def check(ours, before, step):
    "Every element that has its own memory was updated, as by one small step over them."
    expected = [a.copy() for a in before]
    step(*expected)
    for a, b, old in zip(ours, expected, before):
        assert a.own().tobytes() == b.tobytes(), "not updated to the last element"
    assert (expected[0] != before[0]).all()


backend, way = sys.argv[1:]
peak = int(open("/proc/self/statm").read().split()[1])
if way == "adam_step":
    arrays = [Large(seed) for seed in range(4)]
    before = [a.own() for a in arrays]
    fused_adam.adam_step(*(a.a for a in arrays), step=1, backend=backend)
    check(arrays, before, lambda *small: fused_adam.adam_step(*small, step=1, backend="numpy"))
else:
    p, g = Large(0), Large(1)
    states = []
    plain, HOST.zeros = HOST.zeros, lambda n, dtype: states.append(Large(2)) or states[-1].a
    opt = fused_adam.SGD([p.a], lr=0.5, momentum=0.9, weight_decay=0.1, backend=backend)
    HOST.zeros = plain
    states[0].a[: WINDOW // 4] = 0
    before = [p.own(), g.own(), states[0].own()]
    opt.step([g.a])

    def small(p, g, m):
        opt = fused_adam.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.1, backend="numpy")
        d = opt.state_dict()
        d["state"][0]["m"][...] = m
        opt.load_state_dict(d)
        opt.step([g])
        m[...] = opt.state_dict()["state"][0]["m"]

    check([p, g, states[0]], before, small)
    assert opt.t == 1
print("ok")
"""

# Each array between two pages that fault when touched, once against its end, once against its start.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
from fused_adam import _codegen, _rules, adam_step
import fused_adam
import importlib

backend, dtype = sys.argv[1], np.dtype(sys.argv[2])
run = importlib.import_module(f"fused_adam.backends.{backend}_cpu").run
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
ROOM = -(-1025 * dtype.itemsize // PAGE) * PAGE
kept = []


class Guarded:
    def __init__(self):
        block = mmap.mmap(-1, ROOM + 2 * PAGE)
        kept.append(block)
        self.raw = np.frombuffer(block, np.uint8)
        start = self.raw.ctypes.data
        for guard in (start, start + PAGE + ROOM):
            assert libc.mprotect(guard, PAGE, 0) == 0
        self.raw = self.raw[PAGE : PAGE + ROOM]

    def array(self, n, side):
        nbytes = n * dtype.itemsize
        return (self.raw[ROOM - nbytes :] if side else self.raw[:nbytes]).view(dtype)


if len(sys.argv) > 3:  # that the pages do fault
    a = Guarded().array(5, 1)
    ctypes.memmove(a.ctypes.data + a.nbytes, a.ctypes.data, 1)
blocks = [Guarded() for _ in range(5)]
values = np.random.default_rng(0).uniform(0.5, 1.5, (5, 1025)).astype(dtype)
rules = [_codegen.bind(name) for name in _rules.RULES] + [_codegen.bind("adam", ("maximize", "l2"))]
assert {"sgd", "adagrad", "rmsprop", "adam", "adamw", "amsgrad", "lion"} <= set(_rules.RULES)
for rule in rules:
    coefficients = [0.25] * len(rule.coefficients)
    expected = values[: 2 + len(rule.states)].copy()
    run(rule, coefficients, expected[0], expected[1], list(expected[2:]))
    for n in range(1026):
        for side in (0, 1):
            p, g, *states = (b.array(n, side) for b in blocks[: len(expected)])
            for a, row in zip((p, g, *states), values):
                a[...] = row[:n]
            run(rule, coefficients, p, g, states)
            assert p.tobytes() == expected[0, :n].tobytes(), (rule.name, n)
for n in range(1026):
    for side in (0, 1):
        arrays = [b.array(n, side) for b in blocks[:4]]
        for a, row in zip(arrays, values):
            a[...] = row[:n]
        adam_step(*arrays, step=1, backend=backend)
for n in (0, 1, 3, 1025):
    p, g = blocks[0].array(n, 1), blocks[1].array(n, 0)
    fused_adam.RMSprop([p], centered=True, backend=backend).step([g])
print("ok")
"""


@pytest.mark.parametrize("way", ["adam_step", "class"])
def test_two_to_the_31_and_5_elements(backend, way):
    assert "ok" in run(LARGE, backend, way, timeout=200, NUMBA_NUM_THREADS="2")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unreadable_pages_on_either_side(backend, dtype):
    assert mmap.PAGESIZE >= 4096
    assert "ok" in run(GUARDED, backend, dtype)


def test_the_unreadable_pages_are_unreadable():
    with pytest.raises(AssertionError, match="exit -11"):
        run(GUARDED, "numpy", "float32", "touch")
