"""Launches of a Numba CUDA kernel, wherever it runs, that must give NumPy's bits and touch nothing else."""

# Rules are source text; the intrinsics are names of their own grammar.
# ruff: noqa: F821

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bits import COEFFICIENTS, LARGEST, VARIANTS, assert_arrays, coefficients, copies, inputs, run
from host_kernel import HostKernel

from fused_adam._codegen import Rule, behind, bind, parse


def own(p, g, n, a, c, lo, hi, cuda, mu, min):
    """Every operator and intrinsic; a local, an assigned g, and names that a loop around it could use."""
    kernel = sign(g) * mu + minimum(p, n)
    g = maximum(g, a) - absolute(kernel) / c
    n = sqrt(n) + g
    a = maximum(n, c) - min
    c = minimum(lo, a)
    lo = sign(hi - c)
    hi = absolute(lo) * kernel
    cuda = cuda + min * g
    p = p - mu * cuda
    return p, n, a, c, lo, hi, cuda


OWN = parse(own)
RULES = [*(bind(*variant) for variant in VARIANTS), OWN]
# What takes long is done for each rule alone, and behind all of its preludes.
FEWER = [*(bind(name, preludes) for name, preludes in VARIANTS if preludes in ((), dict(VARIANTS)[name])), OWN]
# Behind what a scale and a clipped norm put before a rule, and with the gradient zeroed; the largest stand last.
GUARDED = [
    behind(OWN, (), zeroes=True),
    behind(bind("sgd"), ("unscale",), zeroes=True),
    behind(bind("adamw"), ("unscale", "clip")),
    behind(bind("rmsprop_centered_momentum", ("maximize", "l2")), ("clip",), zeroes=True),
    behind(bind(*LARGEST), ("unscale", "clip"), zeroes=True),
]
GROUPS = range(len(COEFFICIENTS["c"]))


def values(rule: Rule, group: int) -> list[float]:
    return [0.7 - group, 1e-3] if OWN in (rule, rule.base) else coefficients(rule, group)


def stepped(rule: Rule, group: int, given: list[Any]) -> list[Any]:
    """NumPy's p, g and states after one step."""
    arrays = copies(given)
    run("numpy", rule, values(rule, group), arrays)
    return arrays


class Guarded:
    """A copy of an array on a multiple of 16 bytes, or `off` it, between bytes that must stay as they are."""

    def __init__(self, a: Any, off: int) -> None:
        self._raw = np.full(a.nbytes + 192, 0xA5, np.uint8)
        start = 64 + -self._raw.ctypes.data % 64 + off
        self._margins = self._raw[:start], self._raw[start + a.nbytes :]
        self.array = self._raw[start : start + a.nbytes].view(a.dtype)
        self.array[:] = a

    def intact(self) -> bool:
        return all(bool(np.all(margin == 0xA5)) for margin in self._margins)


def check(kernel: HostKernel, rule: Rule, dtype: Any, chunk: int, sizes: Sequence[int], off: bool) -> None:
    """A launch over a table of segments in several groups, or over a single segment without one.

    off: in each segment another one of the arrays does not lie on a multiple of 16 bytes.
    """
    segments, expected = [], []
    for k, n in enumerate(sizes):
        given = inputs(rule, dtype, n, share=0.1)
        expected.append(stepped(rule, k % len(GROUPS), given))
        offs = [given[0].itemsize * (off and j == k % len(given)) for j in range(len(given))]
        segments.append([Guarded(a, o) for a, o in zip(given, offs, strict=True)])
    parts = [(k % len(GROUPS), [a.array for a in arrays]) for k, arrays in enumerate(segments)]
    if len(parts) > 1:
        kernel.table([values(rule, group) for group in GROUPS], parts, chunk)
    else:
        kernel.alone(values(rule, 0), parts[0][1], chunk)
    what = f"{np.dtype(dtype)} chunk={chunk} sizes={sizes} off={off}"
    for (_, ours), right in zip(parts, expected, strict=True):
        assert_arrays(rule, ours, right, what)
    assert all(a.intact() for arrays in segments for a in arrays), f"{rule.name} {what}: wrote outside an array"
