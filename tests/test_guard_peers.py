"""Clipping by the global norm, and scaled losses, against those of PyTorch and optax, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import peers
import pytest
from conftest import require

import fused_adam

STEPS = 30
SHAPES = [(3, 5), (17,), (), (2, 3, 70)]
MOST = 2.0  # of norms from 0.2 to 40
TOLERANCE = 1e-10  # of the way p has moved


def trajectory(backend: str, peer: Any, tolerance: float, scale: float = 1.0, **options: Any) -> int:
    """Both step over the same gradients; returns how often these were clipped."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in SHAPES]
    start = [p.copy() for p in params]
    theirs = peer([p.copy() for p in params])
    ours = fused_adam.AdamW(params, lr=1e-2, weight_decay=0.1, max_grad_norm=MOST, backend=backend, **options)
    clipped = 0
    for t in range(STEPS):
        grads = [(rng.normal(size=shape) + 0.3) * 10.0 ** rng.uniform(-2, 0.3) for shape in SHAPES]
        theirs.step([g.copy() for g in grads])
        ours.step([scale * g for g in grads], grad_scale=scale)
        assert ours.last_stats().grad_norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in grads)), rel=1e-14)
        clipped += ours.last_stats().clip_factor < 1
        for p, q, p0 in zip(params, theirs.params(), start, strict=True):
            error, moved = np.max(np.abs(p - q)), np.max(np.abs(q - p0))
            assert error <= tolerance * moved, f"t={t}: {error} off after moving by {moved}"
    assert STEPS // 4 < clipped < STEPS, "nothing was clipped, or everything"
    return clipped


def with_torch(factor: float = 1.0) -> Any:
    class Clipped(peers.Torch):
        def __init__(self, tree: Any) -> None:
            super().__init__("AdamW", tree, {"lr": 1e-2, "weight_decay": 0.1})

        def step(self, grads: Any) -> None:
            torch = require("torch")
            tensors = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads]
            for tensor, g in zip(tensors, grads, strict=True):
                tensor.grad = torch.tensor(g)
            torch.nn.utils.clip_grad_norm_(tensors, factor * MOST)
            super().step([tensor.grad.numpy() for tensor in tensors])

    return Clipped


def with_optax(tree: Any) -> Any:
    peer = peers.Optax("AdamW", tree, {"lr": 1e-2, "weight_decay": 0.1})
    optax = require("optax")
    peer._made = optax.chain(optax.clip_by_global_norm(MOST), peer._made)
    peer._state = peer._made.init(peer._tree)
    return peer


@pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0])
def test_equals_optax(scale: float, backend: str) -> None:
    trajectory(backend, with_optax, TOLERANCE, scale)


@pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0])
def test_equals_torch(scale: float, backend: str) -> None:
    """It divides by norm + 1e-6: half a millionth less for norms above 2, of which Adam takes most out."""
    trajectory(backend, with_torch(), 5e-7, scale)


def test_a_norm_that_is_a_thousandth_off_is_caught(backend: str) -> None:
    with pytest.raises(AssertionError, match="off after moving"):
        trajectory(backend, with_torch(1.001), 5e-7)
