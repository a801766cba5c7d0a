"""Who is timed: AdamW of ours and of PyTorch's over the same tensors, what bounds both, and each under a CUDA graph.

A builder takes tensors and returns the step as a call without arguments. Each candidate has copies of its own, so that
none finds in the cache what another has left there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np

import fused_adam

from . import rules
from .clock import Call

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_TILE = 2**22
COPY_BYTES = 2**32  # at most; a rate is a rate


@cache
def _tile(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(_TILE, np.float32)


def random(n: int, seed: int, scale: float, positive: bool = False) -> Any:
    """n random float32 in the memory of the GPU, made by NumPy: kernels of CuPy's flush subnormals."""
    import cupy

    tile = _tile(seed) * np.float32(scale)
    a, tile = cupy.empty(n, np.float32), cupy.asarray(abs(tile) if positive else tile)
    for lo in range(0, n, tile.size):
        a[lo : lo + tile.size] = tile[: n - lo]
    return a


class Tensors:
    """So many parameters of one size and their gradients, in so many groups of torch's kind."""

    def __init__(self, count: int, size: int, groups: int = 1) -> None:
        self.count = count
        self.size = size
        self.groups = groups

    @property
    def elements(self) -> int:
        return self.count * self.size

    def draw(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """Parameters and gradients by group, newly allocated."""
        kinds = ((0, 0.1), (1, 1e-3))
        wholes = [random(self.elements, seed, scale) for seed, scale in kinds]
        every = [[whole] if self.count == 1 else self._parts(whole) for whole in wholes]
        params, grads = ([arrays[k :: self.groups] for k in range(self.groups)] for arrays in every)
        return params, grads

    def _parts(self, whole: Any) -> list[Any]:
        return [whole[k * self.size : (k + 1) * self.size].copy() for k in range(self.count)]


Builder = Callable[[Tensors], Call]


def _step(make: Callable[..., Any], params: list[Any], grads: list[Any]) -> Call:
    """With one group as most people call it, with several as a list of group dicts."""
    if len(params) == 1:
        alone, g = make(params[0]), grads[0]
        return lambda: alone.step(g)
    opt = make([{"params": p} for p in params])
    return lambda: opt.step(grads)


def _flat(make: Callable[..., Any], x: Tensors) -> Call:
    """A flat buffer for the parameters of each group, and one for their gradients."""
    params, grads = x.draw()
    flats = [fused_adam.flatten(arrays) for arrays in params]
    gradients = [flat.zeros_like() for flat in flats]
    for flat, arrays in zip(gradients, grads, strict=True):
        for into, g in zip(flat.tree, arrays, strict=True):
            into[...] = g
    return _step(make, flats, gradients)


def ours_flat(backend: str) -> Builder:
    return lambda x: _flat(lambda p: fused_adam.AdamW(p, backend=backend, **HYPER), x)


def ours_list(backend: str) -> Builder:
    def build(x: Tensors) -> Call:
        params, grads = x.draw()
        return _step(lambda p: fused_adam.AdamW(p, backend=backend, **HYPER), params, grads)

    return build


def ours_moving(x: Tensors) -> Call:
    """Another list of other gradients at each step, as from a framework that allocates them anew."""
    (params,), (grads,) = x.draw()
    opt = fused_adam.AdamW(params, backend="cupy", **HYPER)
    turns = cycle([grads, [g.copy() for g in grads]])
    return lambda: opt.step(next(turns))


def torch_adamw(*, fused: bool, capturable: bool = False) -> Builder:
    def build(x: Tensors) -> Call:
        torch: Any = import_module("torch")
        params, grads = x.draw()
        groups = []
        for ps, gs in zip(params, grads, strict=True):
            tensors = [torch.nn.Parameter(torch.from_dlpack(p)) for p in ps]
            for tensor, g in zip(tensors, gs, strict=True):
                tensor.grad = torch.from_dlpack(g)
            groups.append({"params": tensors})
        opt = torch.optim.AdamW(groups, fused=fused, foreach=not fused, capturable=capturable, **HYPER)
        step: Call = opt.step
        return step

    return build


def roof(x: Tensors) -> Call:
    """The same kernel around the least arithmetic."""
    make: Any = rules.roof
    return _flat(lambda p: make(p, backend="cupy"), x)


def copy_bytes(elements: int) -> int:
    """Copied, they are read and written: as many bytes as a step reads and writes, 28 an element."""
    return min(14 * elements, COPY_BYTES)


def copy(x: Tensors) -> Call:
    import cupy

    n = copy_bytes(x.elements)
    source = random(n // 4, 2, 1.0)
    destination = cupy.empty_like(source)
    kind = cupy.cuda.runtime.memcpyDeviceToDevice

    def call() -> None:
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memcpyAsync(destination.data.ptr, source.data.ptr, source.nbytes, kind, stream)

    return call


def in_turn(calls: Sequence[Call]) -> Call:
    """One of them at each call: their memory together is too much for the cache to keep."""
    turns = cycle(calls)
    return lambda: next(turns)()


def our_graph(calls: Sequence[Call]) -> Call:
    """All calls, captured by CuPy and replayed."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # this stream does not wait for the default one
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        try:
            for call in calls:
                call()
        except Exception:
            with suppress(Exception):  # the capture is lost, and the stream is usable again
                stream.end_capture()
            raise
        graph = stream.end_capture()

    def replay(_keep: Any = calls) -> None:
        graph.launch()

    return replay


def torch_graph(calls: Sequence[Call]) -> Call:
    """All calls, captured by PyTorch and replayed."""
    torch: Any = import_module("torch")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(_keep: Any = calls) -> None:
        graph.replay()

    return replay
