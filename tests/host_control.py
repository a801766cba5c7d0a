"""norm.cu and prologue.cu on the CPU, as `host_kernel` has the step, and what NumPy makes of the same arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from host_kernel import build

from fused_adam import _norm
from fused_adam._arrays import BLOCK
from fused_adam.backends._cuda_source import (
    CLIPPING,
    CONTROL,
    FORMULAS,
    GROUP,
    KINDS,
    MOST_RESULTS,
    SUMS,
    UNSCALING,
    norm_source,
    prologue_source,
)

COPIES, SET = 64, 72
_GUARD = 77  # in the place behind the last coefficient
INFINITE, NOT_A_NUMBER, NOT_FINITE = 1, 2, 4


def scalar(x: Any) -> tuple[int, int, float]:
    """A Scalar: a number, or an array of one element."""
    return (KINDS[x.dtype], x.ctypes.data, 0.0) if isinstance(x, np.ndarray) else (0, 0, float(x))


def empty_sums() -> Any:
    return np.zeros(SUMS, np.uint64).reshape(COPIES, SET)


class Found(NamedTuple):
    """What gradients add up to: in units of 2**-1074; inf or NaN if the sum is; whether all elements are finite."""

    units: int
    special: str
    finite: bool


class HostNorm:
    """The kernel that sums up squares."""

    def __init__(self, dtype: Any) -> None:
        self.source = norm_source(np.dtype(dtype))
        self.launch = build(self.source.text, self.source.name)

    def alone(self, g: Any, sums: Any, scale: Any = 1.0, chunk: int = 2048, blocks: int | range | None = None) -> None:
        """One gradient, in the arguments themselves; by default all of its blocks."""
        arguments = self._arguments(sums, scale, chunk)
        arguments["segment"], arguments["gradient"] = (g.size, 0), g.ctypes.data
        self.launch(-(-g.size // chunk) if blocks is None else blocks, arguments)

    def table(self, gradients: Sequence[Any], sums: Any, scale: Any = 1.0, chunk: int = 2048) -> None:
        chunks = [-(-g.size // chunk) for g in gradients]
        firsts = np.cumsum([0, *chunks]).tolist()
        tables = {
            "segments": np.array([(g.size, k) for g, k in zip(gradients, firsts, strict=False)], self.source.segment),
            "gradients": np.array([g.ctypes.data for g in gradients], np.int64),
            "segment_of_chunk": np.repeat(np.arange(len(gradients), dtype=np.int32), chunks),
        }
        arguments = self._arguments(sums, scale, chunk)
        for name, table in tables.items():
            arguments[name] = table.ctypes.data
        self.launch(firsts[-1], arguments)

    def _arguments(self, sums: Any, scale: Any, chunk: int) -> Any:
        arguments = np.zeros((), self.source.arguments)
        arguments["chunk"], arguments["scale"], arguments["sums"] = chunk, scalar(scale), sums.ctypes.data
        return arguments


def found(sums: Any) -> Found:
    """What the kernel has left; of the flags only what they are for."""
    assert not sums[:, _norm.LIMBS + 1 :].any()
    flags = int(np.bitwise_or.reduce(sums[:, _norm.LIMBS]))
    assert not flags & ~(INFINITE | NOT_A_NUMBER | NOT_FINITE)
    special = "nan" if flags & NOT_A_NUMBER else "inf" if flags & INFINITE else ""
    return Found(_units(sums[:, : _norm.LIMBS].sum(0)), special, not flags & NOT_FINITE)


def numpy_total(gradients: Sequence[Any], scale: float = 1.0) -> _norm.Total:
    """By the definition."""
    total = _norm.Total()
    for g in gradients:
        room = -(-g.size // BLOCK) * BLOCK
        with np.errstate(all="ignore"):
            x = g * g.dtype.type(_norm.unscaling(scale, g.dtype))
            total.add(_norm.block_sums(x, (np.empty(room), np.empty(room // 4))))
        total.finite = total.finite and bool(np.isfinite(x).all())
    return total


def expected(gradients: Sequence[Any], scale: float = 1.0) -> Found:
    total = numpy_total(gradients, scale)
    return Found(_units(total.limbs), f"{total.special}" if total.special else "", total.finite)


def left(total: _norm.Total) -> Any:
    """The sums that the kernel would have left of a total, in the copies by turns."""
    sums = empty_sums()
    for k, limb in enumerate(total.limbs.tolist()):
        sums[k % COPIES, k] = limb - limb // 3
        sums[(k + 1) % COPIES, k] += np.uint64(limb // 3)
    special = NOT_A_NUMBER if math.isnan(total.special) else INFINITE if total.special else 0
    sums[COPIES - 1, _norm.LIMBS] = special
    sums[1, _norm.LIMBS] = 0 if total.finite else NOT_FINITE
    return sums


def _units(limbs: Any) -> int:
    return sum(int(limb) << (32 * k) for k, limb in enumerate(limbs.tolist()))


class Group(NamedTuple):
    """A group of prologue.cu, with the names of results, the names of the two other sources, or numbers as sources."""

    formula: str
    arguments: Sequence[float]
    dtype: Any
    results: tuple[str, ...]
    coefficients: Sequence[str | float]

    def row(self, into: Any) -> tuple[Any, ...]:
        constants = [x for x in self.coefficients if not isinstance(x, str)]
        source, k = [], 0
        for x in self.coefficients:
            if x == "unscaling":
                source.append(UNSCALING)
            elif x == "clipping":
                source.append(CLIPPING)
            elif isinstance(x, str):
                source.append(self.results.index(x))
            else:
                source.append(MOST_RESULTS + k)
                k += 1
        (room,) = GROUP["source"].shape
        wide = np.dtype(self.dtype) == np.float64
        arguments = (*self.arguments, *[math.nan] * (GROUP["arguments"].shape[0] - len(self.arguments)))
        formula = FORMULAS.index(self.formula)
        source += [-9] * (room - len(source))
        constants += [math.nan] * (room - len(constants))
        return formula, arguments, wide, len(self.coefficients), into.ctypes.data, source, constants


class Prologue:
    """The kernel before a step, over groups, and the control that it keeps."""

    def __init__(self, groups: Sequence[Group] = (), t: int = 0) -> None:
        made = prologue_source()
        self._launch, self._arguments = build(made.text, made.name), np.zeros((), made.arguments)
        self.control = np.zeros((), CONTROL)
        self.control["t"] = t
        self._results = [np.full(len(g.coefficients) + 1, _GUARD, g.dtype) for g in groups]
        self._table = np.array([g.row(into) for g, into in zip(groups, self._results, strict=True)], GROUP)
        self._arguments["control"], self._arguments["count"] = self.control.ctypes.data, len(groups)
        self._arguments["groups"] = self._table.ctypes.data

    def __call__(
        self,
        sums: Any = None,
        *,
        dtypes: Sequence[Any] = (np.float32, np.float64),
        max_norm: float = math.inf,
        skip_nonfinite: bool = False,
        scale: Any = 1.0,
        found: Any = 0.0,
    ) -> list[Any]:
        """The coefficients of each group. dtypes: of the gradients."""
        a = self._arguments
        a["narrow"], a["wide"] = np.float32 in dtypes, np.float64 in dtypes
        a["sums"] = 0 if sums is None else sums.ctypes.data
        a["max_norm"], a["skip_nonfinite"] = max_norm, skip_nonfinite
        a["scale"], a["found"] = scalar(scale), scalar(found)
        self.control["unmoved"] = 5
        self._launch(1, a)
        assert self.control["unmoved"] == 0
        assert sums is None or not sums.any(), "the next step's sums should begin at 0"
        assert all(x[-1] == _GUARD for x in self._results), "wrote behind the coefficients"
        return [x[:-1].copy() for x in self._results]
