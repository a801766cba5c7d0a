"""Byte for byte what NumPy gives of steps over rows: gradients of some rows, masks, rows with a t of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

import fused_adam

from .arrays import Library, same
from .bits_api import CLASSES, Row

# Rows of one element, of many to a block, of about a block's and of several blocks'; two to four axes.
SHAPES: dict[str, tuple[int, ...]] = {
    "table": (5000, 59), "wide": (40, 5000), "narrow": (30_000, 1), "b": (7,), "cube": (6, 3, 4), "four": (64, 3, 2, 2),
    "whole": (128, 128), "empty": (0, 3),
}  # fmt: skip
STEPS = 6


def _tree(dtype: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def _gradients(lib: Library, dtype: Any, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """For the host and for the GPU; of some rows, in any order and often, or none or all, for most parameters."""
    rng, host = np.random.default_rng(100 + step), _tree(dtype, step)
    device: dict[str, Any] = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        if name == "whole" or (k + step) % 3 == 0:
            device[name] = lib.put(host[name])
            continue
        size = (1, shape[0] // 2, 2 * shape[0], 0, shape[0])[(k + step) % 5] if shape[0] else 0
        indices = rng.integers(0, max(1, shape[0]), size).astype((np.int32, np.int64)[k % 2])
        if size == shape[0]:
            indices = np.arange(size)
        values, lazy = rng.normal(size=(size, *shape[1:])).astype(dtype), step % 2 == 0
        host[name] = fused_adam.SparseGrad(indices, values, lazy)
        device[name] = fused_adam.SparseGrad(lib.put(indices) if k % 2 else indices, lib.put(values), lazy)
    return host, device


def rows_case(lib: Library, backend: str, name: str, dtype: Any, own: bool) -> None:
    """Steps of a class over parameters of which some move row by row, and then under masks."""
    host = _tree(dtype, 0)
    device = {key: lib.put(a) for key, a in host.items()}
    expected = CLASSES[name](host, backend="numpy", per_row_step=own)
    ours = CLASSES[name](device, backend=backend, per_row_step=own)
    for step in range(1, STEPS + 1):
        on_host, on_device = _gradients(lib, dtype, step)
        expected.step(on_host)
        ours.step(on_device)
    for seed, share in enumerate((0.5, 0, 1, 0.01)):
        rng, gradients = np.random.default_rng(seed), _tree(dtype, 50 + seed)
        masks = {key: rng.random(shape[0]) < share for key, shape in SHAPES.items()} | {"whole": None}
        expected.step(gradients, mask=masks)
        ours.step({key: lib.put(g) for key, g in gradients.items()}, mask=masks)
    for key, a in host.items():
        same(key, lib.get(device[key]), a)
    for k, (mine, theirs) in enumerate(zip(ours.state_dict()["state"], expected.state_dict()["state"], strict=True)):
        for state in theirs:
            same(f"{state} of parameter {k}", mine[state], theirs[state])


def cases(dtypes: list[Any]) -> list[Row]:
    kinds = [(name, own) for name in CLASSES for own in (False, True)]
    return [(f"rows {name}{', own t' * own} {t}", rows_case, name, t, own) for name, own in kinds for t in dtypes]
