"""Candidates that keep numbers in 16 and 8 bits, for the speed targets of `ratios`."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np

import fused_adam
from fused_adam import _storage

from .problem import HYPER, Array
from .timing import Call

_HYPER = HYPER["adamw"]


def _values(n: int) -> tuple[Array, Array, Array]:
    """Of a run under way: p, g, and g as it is in 16 bits."""
    rng = np.random.default_rng(0)
    tile = rng.standard_normal(2**20).astype(np.float32)
    p, g = (np.resize(np.float32(scale) * tile, n) for scale in (0.1, 1e-3))
    return p, np.roll(g, 1009), _encoded(np.roll(g, 1009))


def _encoded(x: Array) -> Array:
    return _storage.encoded(x, np.dtype(np.uint16))


def _ours(p: Array, g: Array, **how: Any) -> Call:
    opt = fused_adam.AdamW([p.copy()], backend="numba", **_HYPER, **how)
    turns = cycle([[g[:]] for _ in range(8)])
    for _ in range(3):
        opt.step(next(turns))
    return lambda: opt.step(next(turns))


def _tensor(a: Array) -> Any:
    """bfloat16 of its bits; float32 else."""
    import torch

    return torch.from_numpy(a.copy()).view(torch.bfloat16) if a.dtype == np.uint16 else torch.from_numpy(a.copy())


def half(n: int) -> dict[str, Call]:
    """p, g, m and v in bfloat16."""
    import torch

    p, _, g = _values(n)
    tensor = torch.nn.Parameter(_tensor(_encoded(p)))
    tensor.grad = _tensor(g)
    by_torch = torch.optim.AdamW([tensor], fused=True, **_HYPER)
    return {
        "all in bfloat16": _ours(_encoded(p), g, dtype="bfloat16", state_dtype="bfloat16"),
        "torch fused": by_torch.step,
    }


def mixed(n: int) -> dict[str, Call]:
    """Gradients in bfloat16 for float32 masters, of which there is a bfloat16 copy: in PyTorch three passes."""
    import torch

    p, _, g = _values(n)
    half, gradient = _tensor(_encoded(p)), _tensor(g)
    wide = torch.nn.Parameter(_tensor(p))
    grad = wide.grad = torch.empty_like(wide)
    by_torch = torch.optim.AdamW([wide], fused=True, **_HYPER)

    def cast_step_and_copy() -> None:
        with torch.no_grad():
            grad.copy_(gradient)
            by_torch.step()
            half.copy_(wide)

    return {
        "float32 masters": _ours(_encoded(p), g, dtype="bfloat16", master="float32"),
        "torch, 3 passes": cast_step_and_copy,
    }


def eight(n: int) -> dict[str, Call]:
    """8-bit states, with parameters of 16 + 8 bits and of 32, and all in float32."""
    p, g, short = _values(n)
    return {
        "split8, int8": _ours(_encoded(p), short, dtype="bfloat16", master="split8", state_dtype="int8"),
        "int8": _ours(p, g, state_dtype="int8"),
        "fused_adam numba": _ours(p, g),
    }
