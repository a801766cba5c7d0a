"""Byte for byte what NumPy gives of steps of scaled, clipped and skipped gradients; and of graphs that replay them."""

from __future__ import annotations

from typing import Any

import numpy as np

import fused_adam

from .arrays import Library, same
from .bits_api import CLASSES, Row
from .peers import our_graph
from .worker import Different, Skipped

# Alone, in a table, off a multiple of 128 and of a chunk; enough for many blocks to add to the same digits.
SHAPES: dict[str, tuple[int, ...]] = {"W": (1000, 257), "one": (1,), "empty": (0, 3), "b": (129,), "long": (300_001,)}
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 0.5},
    "skip": {"skip_nonfinite": True, "zero_grads": True},
    "all": {"max_grad_norm": 2.0, "skip_nonfinite": True, "zero_grads": True, "count_unmoved": True},
    "device scalars": {"device_scalars": True},
}
_OF_THE_DEVICE = ("all", "device scalars")  # which numba-cuda refuses
REPLAYS = 1000


def _tree(dtype: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scale = (1.0, 1e-20, 1e18, 1e-3)[seed % 4]
    return {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def guard_case(lib: Library, backend: str, name: str, options: str, dtype: Any) -> None:
    """Steps with a scale, with what is not finite, with a flag; flat and as arrays."""
    if backend != "cupy" and options in _OF_THE_DEVICE:
        raise Skipped("only CuPy keeps scalars on the device")
    for flat in (False, True):
        host = _tree(dtype, 0)
        device: Any = {key: lib.put(a) for key, a in host.items()}
        params = fused_adam.flatten(device) if flat else device
        expected = CLASSES[name](host, backend="numpy", **OPTIONS[options])
        ours = CLASSES[name](params, backend=backend, **OPTIONS[options])
        for step in range(1, 9):
            gradients = _tree(dtype, step)
            if step % 3 == 0:
                gradients["long"][-step] = (np.inf, np.nan)[step % 2]
            given: dict[str, Any] = {"grad_scale": (1.0, 1024.0, 3.0)[step % 3], "found_inf": step == 7}
            on_device = {key: lib.put(g) for key, g in gradients.items()}
            expected.step(gradients, **given)
            ours.step(on_device, **given)
            for key, g in gradients.items():
                same(f"gradient {key} after step {step}", lib.get(on_device[key]), g)
        for key, a in host.items():
            same(key, lib.get(params[key]), a)
        for k, (mine, theirs) in enumerate(
            zip(ours.state_dict()["state"], expected.state_dict()["state"], strict=True)
        ):
            for state in theirs:
                same(f"{state} of parameter {k}", mine[state], theirs[state])
        if (ours.t, repr(ours.last_stats())) != (expected.t, repr(expected.last_stats())):
            raise Different(f"t {ours.t} and {ours.last_stats()} against {expected.t} and {expected.last_stats()}")


def replay_case(lib: Library, backend: str, dtype: Any) -> dict[str, Any]:
    """A captured step with a schedule and a skip now and then, beside the eager steps of NumPy."""
    if backend != "cupy":
        raise Skipped("only CuPy keeps scalars on the device")
    rng = np.random.default_rng(1)
    host, other = (rng.normal(size=5000).astype(dtype) for _ in range(2))
    gradients = [host * dtype.type(1e-2), other, np.where(np.arange(5000) == 77, np.inf, other).astype(dtype)]
    device, given = lib.put(host), lib.put(gradients[0])
    on_device = [lib.put(g) for g in gradients]
    options: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    expected = fused_adam.AdamW(host, backend="numpy", **options)
    ours = fused_adam.AdamW(device, backend=backend, **options)
    try:
        replay = our_graph([lambda: ours.step(given)])
    except Exception as error:
        raise Skipped(f"the capture was refused: {error}") from error
    for _ in range(ours.t):
        expected.step(gradients[0])
    for k in range(REPLAYS):
        for opt in (expected, ours):
            opt.set_lr(1e-3 / (1 + k))
        lib.copy(given, on_device[k % 3])
        expected.step(gradients[k % 3])
        replay()
    same(f"p after {REPLAYS} replays", lib.get(device), host)
    return {"note": f"t {ours.t}, {ours.last_stats().skipped} skipped"}


def cases(dtypes: list[Any]) -> list[Row]:
    kinds = [(name, options) for name in CLASSES for options in OPTIONS if name == "AdamW" or options == "all"]
    found: list[Row] = [(f"guarded {n} {o} {t}", guard_case, n, o, t) for n, o in kinds for t in dtypes]
    return [*found, *((f"replays {t}", replay_case, t) for t in dtypes)]
