"""What tests of kernels/stored.cu share: every kernel that is offered, arrays of any bits for it, and NumPy's step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from host_kernel import build

from fused_adam import _int8
from fused_adam._arrays import carrier
from fused_adam._codegen import Rule, bind
from fused_adam._formats import ADAM, FORMATS, FORMATS_OF_ADAM, RULES
from fused_adam._storage import BLOCK8, Format
from fused_adam.backends import Kept, _numpy_stored, numpy_cpu
from fused_adam.backends._cuda_source import Source, stored_source

# Behind the preludes with which test_formats.py asks for them.
PRELUDES = {"momentum": ("l2",), "adam": ("maximize", "l2")}
KERNELS: list[tuple[str, Format]] = [(rule, form) for rule in RULES for form in FORMATS]
KERNELS += [(rule, form) for rule in ADAM for form in FORMATS_OF_ADAM]
SMALLEST = Format("bfloat16", "bfloat16", "int8", "split8")  # of all formats


def stochastic(form: Format) -> bool:
    """Whether random bits change anything."""
    return form.states == "bfloat16" or (form.master in (None, "split8") and form.p != "float32")


ALL = [(rule, form._replace(stochastic_rounding=s)) for rule, form in KERNELS for s in (False, True)]
ALL = [(rule, form) for rule, form in ALL if not form.stochastic_rounding or stochastic(form)]


def kernel_id(kernel: tuple[str, Format]) -> str:
    return " ".join(str(x) for x in (kernel[0], *kernel[1][:4]) if x) + " stochastic" * kernel[1].stochastic_rounding


def bound(name: str) -> Rule:
    return bind(name, PRELUDES.get(name, ()))


def names(rule: Rule, form: Format) -> list[str]:
    """Of the arrays, in the order of a backend's rows."""
    beside = ["master"] if form.master else []
    return ["p", "g", *beside, *rule.states, *(["scales"] if form.states == "int8" else [])]


def _bits(rng: Any, kind: str, n: int) -> Any:
    """All bits at random but for an upper share of exponents, so that most results are finite."""
    if kind in ("float32", "float16", "bfloat16"):
        x = (rng.normal(size=n) * 10.0 ** rng.integers(-9, 3, n)).astype(np.float32)
        wild = np.frombuffer(rng.bytes(4 * n), np.float32)
        x = np.where(rng.random(n) < 0.1, wild, x)
        with np.errstate(all="ignore"):
            if kind == "float16":
                return x.astype(np.float16)
        return (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else x
    return np.frombuffer(rng.bytes(n * carrier(kind).itemsize), carrier(kind)).copy()


def inputs(rule: Rule, form: Format, n: int, seed: int = 0) -> list[Any]:
    """In the order of `names`; NaN, infinity and subnormals among them."""
    rng = np.random.default_rng([n, seed])
    kinds = {"p": form.p, "g": form.g, "master": form.master}
    arrays = []
    for name in names(rule, form):
        if name == "scales":
            scales = (rng.integers(0x2000, 0x5000, 2 * _int8.blocks(n)) & 0xFFE0).astype(np.uint16)
            scales[rng.random(scales.size) < 0.1] = 0
            arrays.append(scales)
        elif form.states == "int8" and name in rule.states:
            codes = _bits(rng, "int8", n)
            arrays.append(np.maximum(codes, -127) if name == "m" else codes.view(np.uint8))
        else:
            x = _bits(rng, kinds.get(name, form.states), n)
            if name == "v":
                x = np.abs(x) if x.dtype.kind == "f" else x & np.uint16(0x7FFF)
            arrays.append(x)
    return arrays


def numpy_step(
    rule: Rule, form: Format, values: Sequence[float], arrays: Sequence[Any], first: int, seed: int, t: int
) -> None:
    """In place."""
    function, rows = numpy_cpu.kernel(rule)
    scratch = numpy_cpu._scratch(2 + len(rule.states) + rows, np.dtype(np.float32))
    p, g, *rest = arrays
    kept = Kept(form, seed, None, t)
    calls = _numpy_stored.calls(rule, function, values, p, g, rest, kept, first, scratch, numpy_cpu.CHUNK)
    with np.errstate(all="ignore"):
        for f, arguments in calls:
            f(*arguments)


def first_difference(a: Any, b: Any) -> int:
    """The first element that is not the same, all NaNs of float32 taken as one; -1 for none."""
    bits = np.dtype(f"u{a.itemsize}")
    wrong = a.view(bits) != b.view(bits)
    if a.dtype == np.float32:
        wrong &= ~(np.isnan(a) & np.isnan(b))
    found = np.flatnonzero(wrong)
    return int(found[0]) if found.size else -1


class HostStored:
    """A kernel built by g++. Arrays are in the order of `names`."""

    def __init__(self, rule: Rule, form: Format) -> None:
        self.source: Source = stored_source(rule, form)
        self._form = form
        self._launch = build(self.source.text, self.source.name)

    def __call__(
        self,
        groups: Sequence[Sequence[float]],
        segments: Sequence[tuple[int, int, Sequence[Any]]],
        seed: int,
        t: int,
        chunk: int = 2048,
        table: bool = True,
    ) -> None:
        """segments: each with its group and the canonical index of its first element."""
        chunks = [-(-arrays[0].size // chunk) for *_, arrays in segments]
        firsts = np.cumsum([0, *chunks]).tolist()
        rows = [self._segment(first, *segment) for first, segment in zip(firsts, segments, strict=False)]
        gradients = np.array([arrays[1].ctypes.data for *_, arrays in segments], np.int64)
        a = np.zeros((), self.source.arguments)
        a["chunk"], a["seed"], a["t"] = chunk, seed, t
        a["coefficients"][: len(groups), : len(groups[0])] = groups
        tables = [np.array(rows, self.source.segment), gradients]
        tables.append(np.repeat(np.arange(len(segments), dtype=np.int32), chunks))
        if table:
            for name, one in zip(("segments", "gradients", "segment_of_chunk"), tables, strict=True):
                a[name] = one.ctypes.data
        else:
            a["segment"], a["gradient"] = rows[0], gradients[0]
        self._launch(firsts[-1], a)

    def _segment(self, first: int, group: int, index: int, arrays: Sequence[Any]) -> tuple[Any, ...]:
        p, _, *rest = (ctypes.c_void_p(a.ctypes.data).value for a in arrays)
        master = rest.pop(0) if self._form.master else 0
        scales = rest.pop() if self._form.states == "int8" else 0
        return arrays[0].size, first, group, index, p, master, scales, rest


def scales_of(part: slice) -> slice:
    """Where those of a segment lie that begins on a whole block."""
    return slice(part.start // 32, part.start // 32 + 2 * -(-(part.stop - part.start) // BLOCK8))
