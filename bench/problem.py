"""What a step is timed on, and what a candidate is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

import fused_adam
from fused_adam.cli import oracle

from .timing import Call

Array = npt.NDArray[Any]

HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3},
    "momentum": {"lr": 1e-3, "momentum": 0.9},
    "nesterov": {"lr": 1e-3, "momentum": 0.9},
    "adagrad": {"lr": 1e-2, "eps": 1e-10},
    "rmsprop": {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8},
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "amsgrad": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1e-2},
}
_TILE = 2**20


class Skipped(Exception):
    """A candidate cannot take part; why."""


def bytes_per_parameter(rule: str, dtype: str) -> int:
    """What a step has to move: p, g and the states are read, p and the states written."""
    states = len(oracle.RULES[rule][0])
    return (3 + 2 * states) * np.dtype(dtype).itemsize


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if find_spec(module) is None]


class Problem:
    """n elements in so many parameters, with gradients and states; values are those of a run under way.

    Candidates that step the same problem share its arrays, so that none owes its speed to a luckier placement in
    memory. xp: NumPy, or CuPy for a problem on the GPU.
    """

    def __init__(self, n: int, tensors: int = 1, dtype: str = "float32", rule: str = "adamw", xp: Any = np) -> None:
        self.n = n
        self.tensors = tensors
        self.dtype = np.dtype(dtype)
        self.rule = rule
        self.hyper = HYPER[rule]
        self.xp = xp
        shortest, longer = divmod(n, tensors)
        self.params = fused_adam.flatten([xp.zeros(shortest + (k < longer), self.dtype) for k in range(tensors)])
        self.grads = self.params.zeros_like()
        self.states = {name: self.params.zeros_like() for name in oracle.RULES[rule][0]}
        self.result: Callable[[], list[Array]] = lambda: self.host("p")  # a candidate may keep it elsewhere
        self.draw()

    def draw(self) -> None:
        """The same values each time."""
        tile = np.random.default_rng(0).standard_normal(_TILE).astype(self.dtype)
        buffers = {"p": self.params, "g": self.grads, **self.states}
        for k, (name, buffer) in enumerate(buffers.items()):
            values = np.roll(tile, 1009 * k) * self.dtype.type(0.1 if name == "p" else 1e-3)
            values = self.xp.asarray(values**2 if name in ("v", "max_v") else values)
            for start in range(0, buffer.data.size, _TILE):
                part = buffer.data[start : start + _TILE]
                part[...] = values[: part.size]

    @property
    def on_gpu(self) -> bool:
        return self.xp is not np

    def host(self, name: str) -> list[Array]:
        """Copies on the host of each parameter's p, g or state."""
        buffer = {"p": self.params, "g": self.grads, **self.states}[name]
        return [a.get() if self.on_gpu else a.copy() for a in buffer.tree]

    # The one parameter's, where there is only one.
    p = property(lambda self: self.params.tree[0])
    g = property(lambda self: self.grads.tree[0])
    m = property(lambda self: self.states["m"].tree[0])
    v = property(lambda self: self.states["v"].tree[0])


@dataclass(frozen=True)
class Candidate:
    """A name for tables, the call it times, and what must be installed for it.

    build: takes the problem and returns the step as a call without arguments; raises Skipped. graph: the same, to be
    captured in a CUDA graph. kind and backend as in `results.Row`. launches: kernels a step on a GPU, where known.
    """

    name: str
    build: Callable[[Problem], Call]
    needs: tuple[str, ...] = ()
    kind: str = "peer"
    backend: str | None = None
    graph: Callable[[Problem], Call] | None = None
    launches: int | None = None

    @property
    def missing(self) -> list[str]:
        return missing(*self.needs)
