"""What only a real GPU can show: the order of streams, more elements than 32 bits count, memory that runs out."""

from __future__ import annotations

from typing import Any

import numpy as np

import fused_adam
from fused_adam._codegen import Rule, bind
from fused_adam._cuda_arrays import view

from .arrays import Library, same
from .bits_tables import shared
from .peers import our_graph
from .worker import Skipped

_LATE = r"""
// Spins, and writes g only then.
extern "C" __global__ void late(float* g, const float* source, long long n, long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
    for (long long i = threadIdx.x; i < n; i += blockDim.x) g[i] = source[i];
}
"""
_CYCLES = 200_000_000  # a tenth of a second
_N = 5000
_TILE = 2**24 - 3  # repeated, it is another value at i - 2**31 and i - 2**32
_WINDOW = 2**20
_LARGE = (("momentum", 2**31 + _WINDOW + 77), ("sgd", 2**32 + _WINDOW + 77))


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise Skipped(f"streams and slow kernels are made with CuPy: {error}") from error
    return cupy


class _Lent:
    """An array that says on which stream it is being written."""

    def __init__(self, a: Any, stream: int) -> None:
        self._a = a
        self.__cuda_array_interface__ = {**a.__cuda_array_interface__, "stream": stream}


def streams_case(lib: Library, backend: str, how: str) -> dict[str, Any]:
    """A gradient that is late on its stream is the one that the step sees, with the default stream idle."""
    cupy = _cupy()
    late = cupy.RawKernel(_LATE, "late")
    rng = np.random.default_rng(4)
    host, first, second = rng.normal(size=(3, _N)).astype(np.float32)
    p, source = cupy.asarray(host), cupy.asarray(second)
    flat = fused_adam.flatten([p]) if how == "flat, current stream" else None
    given = None if flat is None else flat.zeros_like()
    g = cupy.zeros(_N, np.float32) if given is None else given.tree[0]
    g[...] = cupy.asarray(first)
    ours = fused_adam.AdamW([p] if flat is None else flat, backend=backend)
    expected = fused_adam.AdamW([host], backend="numpy")
    gradients = [g] if given is None else given
    ours.step(gradients)  # compiles, and uploads tables
    expected.step([first])
    g[...] = np.float32(np.nan)  # what a step that does not wait sees
    cupy.cuda.Device().synchronize()

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late((1,), (256,), (g, source, np.int64(_N), np.int64(_CYCLES)))
        if how.endswith("current stream"):
            ours.step(gradients)
    if how == "stream=":
        ours.step(gradients, stream=stream)
    elif how == "lent by another stream":
        ours.step([_Lent(g, stream.ptr)])
    ahead = not stream.done
    cupy.cuda.Device().synchronize()
    expected.step([second])
    same(how, (p if flat is None else flat.tree[0]).get(), host)
    return {"note": "the step returned before its gradient was there" if ahead else "the step waited on the host"}


def graph_case(lib: Library, backend: str) -> None:
    """A step that was captured in a CUDA graph is the same step at each replay."""
    cupy = _cupy()
    p, g = np.random.default_rng(6).normal(size=(2, _N)).astype(np.float32)
    device, given = cupy.asarray(p), [cupy.asarray(g)]
    opt = fused_adam.AdamW([device], backend=backend)
    try:
        replay = our_graph([lambda: opt.step(given)])
    except Exception as error:
        raise Skipped(f"the capture was refused: {error}") from error
    m, v = np.zeros((2, _N), np.float32)
    for step in (1, 2, 2, 2):  # number 2 is the one that was captured
        fused_adam.adamw_step(p, g, m, v, step=step, backend="numpy")
    for _ in range(3):
        replay()
    cupy.cuda.Device().synchronize()
    same("p after three replays", device.get(), p)


def large_case(lib: Library, backend: str) -> None:
    """More elements than 31 and 32 bits count: one case, so that only one process of a backend takes so much memory."""
    for rule_name, n in _LARGE:
        rule = bind(rule_name)
        needed, free = (n * (2 + len(rule.states)) + 2**28) * 4, lib.free_bytes()
        if needed > free:
            raise Skipped(f"{n} elements need {needed / 2**30:.0f} GiB; {free / 2**30:.0f} are free")
        _large(lib, backend, rule, n)


def _large(lib: Library, backend: str, rule: Rule, n: int) -> None:
    """Windows at both ends, around 2**31 and 2**32 and anywhere between are what NumPy makes of them."""
    rng = np.random.default_rng(5)
    tiles = [rng.standard_normal(_TILE, np.float32) for _ in range(2 + len(rule.states))]
    device = []
    for tile in tiles:
        a, lent = lib.empty(n, np.float32), lib.put(tile)
        for lo in range(0, n, _TILE):
            hi = min(lo + _TILE, n)
            lib.copy(a[lo:hi], lent[: hi - lo])
        device.append(a)

    values = shared().coefficients(rule)
    shared().run(backend, rule, values, [view("an array", a) for a in device])
    starts = [0, n - _WINDOW, *(x - _WINDOW // 2 for x in (2**31, 2**32) if x < n)]
    for lo in (*starts, *rng.integers(0, n - _WINDOW, 12).tolist()):
        index = np.arange(lo, lo + _WINDOW) % _TILE
        expected = [tile[index] for tile in tiles]
        shared().run("numpy", rule, values, expected)
        for name, a, b in zip(("p", "g", *rule.states), device, expected, strict=True):
            same(f"{rule.name}: {name} from element {lo}", lib.get(a[lo : lo + _WINDOW]), b)


def room_case(lib: Library, backend: str) -> dict[str, Any]:
    """Wherever CuPy's memory ends, before the first step or in it, the parameters are as they were."""
    if backend != "cupy":
        raise Skipped("Numba's memory cannot be limited")
    cupy = _cupy()
    host = [np.random.default_rng(k).normal(size=50).astype(np.float32) for k in range(3)]
    gradients = [a.copy() for a in host]
    device, given = [cupy.asarray(a) for a in host], [cupy.asarray(g) for g in gradients]
    fused_adam.AdamW([a.copy() for a in device], backend=backend).step(given)  # compiles
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    used = pool.total_bytes()
    for refused in range(64):
        pool.set_limit(size=used + 1 + 512 * refused)
        try:
            fused_adam.AdamW(device, backend=backend).step(given)
            break
        except MemoryError:
            for k, (a, b) in enumerate(zip(device, host, strict=True)):
                same(f"parameter {k} with room for {512 * refused} bytes", a.get(), b)
        finally:
            pool.set_limit(size=0)
    fused_adam.AdamW(host, backend="numpy").step(gradients)
    for k, (a, b) in enumerate(zip(device, host, strict=True)):
        same(f"parameter {k} once there was room", a.get(), b)
    return {"note": f"refused {refused} times"}


def cases() -> list[tuple[Any, ...]]:
    ways = ("list, current stream", "flat, current stream", "stream=", "lent by another stream")
    return [
        *((f"a late gradient: {how}", streams_case, how) for how in ways),
        ("a captured step", graph_case),
        ("more than 2**31 elements", large_case),
        ("memory that ends anywhere", room_case),
    ]
