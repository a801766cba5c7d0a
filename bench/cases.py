"""What is timed: our steps, the peers', and the memory roof, each as a call without arguments.

A builder takes a `Problem` and returns the call. Builders that step the same `Problem` share its arrays,
so that no candidate owes its speed to a luckier placement in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count, cycle
from typing import Any

import numpy as np
import numpy.typing as npt

import fused_adam

from .timing import Call

Array = npt.NDArray[np.float32]

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def aligned(n: int) -> Array:
    """n float32 zeros on a 64-byte boundary, their pages touched."""
    raw = np.zeros(n * 4 + 64, np.uint8)
    raw.fill(0)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * n].view(np.float32)


@dataclass
class Problem:
    """One parameter of n elements with gradient and state; values are those of a run under way."""

    n: int
    p: Array = field(init=False)
    g: Array = field(init=False)
    m: Array = field(init=False)
    v: Array = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.p, self.g, self.m, self.v = (aligned(self.n) for _ in range(4))
        for x, scale in ((self.p, 0.1), (self.g, 1e-3), (self.m, 1e-3), (self.v, 1e-3)):
            rng.standard_normal(out=x, dtype=np.float32)
            x *= np.float32(scale)
        np.square(self.v, out=self.v)


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if find_spec(module) is None]


@dataclass(frozen=True)
class Candidate:
    """A name for tables, the call it times, and what must be installed for it."""

    name: str
    build: Callable[[Problem], Call]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return missing(*self.needs)


def prepare() -> None:
    """Load the libraries in the order, and with the threads, that make a fair race.

    torch comes first: it then has an OpenMP runtime of its own with its own defaults; loaded after Numba it
    would silently share Numba's. A step of ours comes next, so that Numba's pool starts as it does for users.
    """
    if not missing("torch"):
        import torch

        torch.set_num_threads(THREADS)
    if not missing("numba"):
        ours("numba")(Problem(2**20))()


def roof(x: Problem) -> Call:
    from ._roof import stream

    return lambda: stream(x.p, x.g, x.m, x.v)


def ours(backend: str) -> Callable[[Problem], Call]:
    """fused_adam.adamw_step, all checks included."""

    def build(x: Problem) -> Call:
        t = count(1)
        return lambda: fused_adam.adamw_step(x.p, x.g, x.m, x.v, step=next(t), backend=backend, **HYPER)

    return build


def torch_adamw(*, fused: bool) -> Callable[[Problem], Call]:
    """torch.optim.AdamW.step(), fused or foreach, on the problem's own memory."""

    def build(x: Problem) -> Call:
        import torch

        p = torch.nn.Parameter(torch.from_numpy(x.p))
        p.grad = torch.from_numpy(x.g)
        optimizer = torch.optim.AdamW([p], fused=fused, foreach=not fused, **HYPER)
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.from_numpy(x.m),
            "exp_avg_sq": torch.from_numpy(x.v),
        }
        return optimizer.step

    return build


def textbook(x: Problem) -> Call:
    """AdamW as the paper prints it and as most people write it in NumPy."""
    lr, (beta1, beta2), eps, weight_decay = HYPER.values()
    p, g, m, v, t = x.p, x.g, x.m, x.v, 0

    def step() -> None:
        nonlocal m, v, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        p[...] = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)

    return step


ROOF = Candidate("memory roof", roof, ("numba",))
NUMBA = Candidate("fused_adam numba", ours("numba"), ("numba",))
NUMPY = Candidate("fused_adam numpy", ours("numpy"))
TORCH_FUSED = Candidate("torch fused", torch_adamw(fused=True), ("torch",))
TORCH_FOREACH = Candidate("torch foreach", torch_adamw(fused=False), ("torch",))
TEXTBOOK = Candidate("textbook NumPy", textbook)

SINGLE = (NUMBA, NUMPY, TORCH_FUSED, TORCH_FOREACH, TEXTBOOK, ROOF)


def many(shapes: Sequence[int]) -> dict[str, Call]:
    """One AdamW over many small parameters: ours flat, ours as a list, torch fused."""
    import torch

    rng = np.random.default_rng(0)

    def draw() -> list[Array]:
        return [rng.standard_normal(n, dtype=np.float32) * np.float32(1e-3) for n in shapes]

    params, grads = draw(), draw()
    by_list = fused_adam.AdamW(params, **HYPER)

    flat = fused_adam.flatten(draw())
    by_flat = fused_adam.AdamW(flat, **HYPER)
    flat_grads = flat.zeros_like()
    flat_grads.data[:] = 1e-3

    tensors = [torch.nn.Parameter(torch.from_numpy(x)) for x in draw()]
    for tensor, g in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(g)
    by_torch = torch.optim.AdamW(tensors, fused=True, **HYPER)

    # Training code hands over a new list of new arrays each step, so nothing may be remembered about them.
    # Views made beforehand are that, without timing how they are made.
    fresh = cycle([[g[:] for g in grads] for _ in range(8)])

    return {
        "fused_adam flat": lambda: by_flat.step(flat_grads),
        "fused_adam list": lambda: by_list.step(next(fresh)),
        "torch fused": by_torch.step,
    }
