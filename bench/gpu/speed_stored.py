"""The speed of AdamW over numbers in 16 and 8 bits: against PyTorch's in float32, and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fused_adam
from fused_adam import _storage

from . import peers
from .clock import Call, Clock, device_times
from .peers import HYPER, Tensors

SMALLEST, HALF = "12 bytes", "bf16"
# What a parameter has beside it, and the bytes that a step of it reads and writes.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    SMALLEST: ({"state_dtype": "int8", "master": "split8"}, 12),
    HALF: ({"state_dtype": "bfloat16"}, 14),
}
VALUES = {"": 1e-3, ", zeros": 0.0, ", subnormal": 1e-39}  # the scale of the gradients
FUSED = "torch fused"


def copy_of(kind: str) -> str:
    return f"copy, {kind}"


def bfloat16(n: int, seed: int, scale: float) -> Any:
    """n random numbers as uint16, in the memory of the GPU."""
    import cupy

    tile = cupy.asarray(_storage.encoded(peers._tile(seed) * np.float32(scale), np.dtype(np.uint16)))
    a = cupy.empty(n, np.uint16)
    for lo in range(0, n, tile.size):
        a[lo : lo + tile.size] = tile[: n - lo]
    return a


def ours(kind: str, scale: float, n: int) -> Call:
    p, g = bfloat16(n, 0, 0.1), bfloat16(n, 1, scale)
    opt = fused_adam.AdamW(p, backend="cupy", dtype="bfloat16", **HYPER, **KINDS[kind][0])
    return lambda: opt.step(g)


def _copy(nbytes: int) -> Call:
    import cupy

    source, destination = (cupy.empty(nbytes, np.uint8) for _ in range(2))
    how = cupy.cuda.runtime.memcpyDeviceToDevice

    def call() -> None:
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memcpyAsync(destination.data.ptr, source.data.ptr, nbytes, how, stream)

    return call


def builders(n: int) -> dict[str, Callable[[], Call]]:
    found: dict[str, Callable[[], Call]] = {FUSED: partial(peers.torch_adamw(fused=True), Tensors(1, n))}
    for kind, (_, nbytes) in KINDS.items():
        found |= {f"{kind}{values}": partial(ours, kind, scale, n) for values, scale in VALUES.items()}
        found[copy_of(kind)] = partial(_copy, nbytes * n // 2)  # each byte is read and written
    return found


def samples(
    clock: Clock, enter: Callable[[str, Callable[[], Call]], list[Call]], n: int, rounds: int = 15
) -> dict[str, dict[str, list[float]]]:
    """enter: makes a call, or none. Seconds on the device for each."""
    calls = {name: call for name, build in builders(n).items() for call in enter(name, build)}
    return {"device": device_times(clock, calls, rounds, cold=False)}
