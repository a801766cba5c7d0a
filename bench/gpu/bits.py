"""Byte for byte what NumPy gives: every rule, any size, any place in memory, any table of segments.

The cases of a backend, most telling first; what only a real device can show is in bits_device.py, steps over rows in
bits_rows.py, scaled and clipped gradients in bits_guard.py, 16 and 8 bits in bits_stored.py, PyTorch in bits_torch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fused_adam._checks import Extents
from fused_adam._codegen import Rule, bind
from fused_adam._cuda_arrays import view
from fused_adam.backends import Loose, Rows, load

from . import bits_api, bits_device, bits_guard, bits_rows, bits_stored, bits_torch
from .arrays import Library, library, same, usable
from .bits_tables import shared
from .worker import Case

# Every tail of a vector access; the ends of blocks, of passes and of chunks of either size; and several chunks.
SIZES = (*range(41), *(n + k for n in (128, 2048, 4096) for k in (-1, 0, 1)), 100_003)
FEW = (0, 1, 5, 127, 2049, 4099, 0, 8192, 3)
ALONE = (1, 2047, 4099, 100_003)
COUNTS = (1, 2, 1000, 10_000)
EMPTY = ("none", "first", "last", "middle", "most", "all")
_COEFFICIENTS = (0, 1, 2)  # of each coefficient the values that tests/bits.py has
_GAP = 4  # elements at least between two segments


@lru_cache(4)
def _given(rule: Rule, dtype: Any, n: int) -> list[Any]:
    """p, g and the states: numbers of every magnitude, and one in twenty is special."""
    given: list[Any] = shared().inputs(rule, dtype, n, share=0.05)
    return given


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Where segments lie in one buffer: apart, most on a multiple of 16 bytes, some an element later."""
    end, found = _GAP, []
    for k, n in enumerate(sizes):
        start = end + _GAP + -end % _GAP + (k % 5 == 4)
        end = start + n
        found.append(slice(start, end))
    return found


def _launch(backend: str, rule: Rule, values: list[list[float]], segments: list[tuple[int, list[Any]]]) -> None:
    """One step over segments, each with its group and its p, g and states on the GPU."""
    parts, gradients = [], []
    for group in range(len(values)):
        mine = [arrays for k, arrays in segments if k == group]
        seen = [[view("an array", a) for a in arrays] for arrays in mine]
        rows: Any = [(p, *states) for p, _, *states in seen]
        names = ["a gradient"] * len(mine)
        parts.append(Rows(np.dtype(mine[0][0].dtype), [p.shape for p, *_ in rows], rows, []))
        gradients.append(Loose(names, [arrays[1] for arrays in mine], [p for p, *_ in rows]))
    writes = Extents([a for part in parts for row in part.rows for a in row])
    stepper = load(backend).Stepper(parts, np.zeros(1, np.int64), writes)
    stepper.step(1, [rule] * len(values), values, gradients)


def segments_case(
    lib: Library,
    backend: str,
    rule: Rule,
    dtype: Any,
    sizes: Sequence[int],
    *,
    groups: int = 1,
    late: int | None = None,
    which: int = 0,
) -> None:
    """One launch over segments of these sizes steps their elements, and not one beside them.

    late: the number of the array that starts an element later than a multiple of 16 bytes. which: coefficients.
    """
    tables = shared()
    slices = _slices(sizes)
    before = _given(rule, dtype, 2 ** (slices[-1].stop + _GAP).bit_length())
    values = [[x * (1 + k / 64) for x in tables.coefficients(rule, which)] for k in range(groups)]
    expected = tables.copies(before)
    for k in range(groups):
        stepped = tables.copies(before)
        tables.run("numpy", rule, values[k], stepped)
        for a, b in zip(expected, stepped, strict=True):
            for part in slices[k::groups]:
                a[part] = b[part]

    offsets = [int(k == late) for k in range(len(before))]
    device = [lib.put(np.concatenate([a[:k], a])) for k, a in zip(offsets, before, strict=True)]
    nothing = lib.put(np.empty(0, dtype))

    def segment(part: slice) -> list[Any]:
        if part.start == part.stop:
            return [nothing] * len(device)
        return [a[part.start + k : part.stop + k] for k, a in zip(offsets, device, strict=True)]

    _launch(backend, rule, values, [(n % groups, segment(part)) for n, part in enumerate(slices)])
    for name, k, a, b in zip(("p", "g", *rule.states), offsets, device, expected, strict=True):
        same(f"{name}, sizes {list(sizes)[:8]}, late {late}, coefficients {which}", lib.get(a)[k:], b)


def alone_case(lib: Library, backend: str, rule: Rule, dtype: Any, n: int) -> None:
    """A single segment, which needs no table."""
    tables = shared()
    expected = tables.copies(_given(rule, dtype, n))
    device = [lib.put(a) for a in expected]
    tables.run("numpy", rule, tables.coefficients(rule), expected)
    tables.run(backend, rule, tables.coefficients(rule), [view("an array", a) for a in device])
    for name, a, b in zip(("p", "g", *rule.states), device, expected, strict=True):
        same(f"{name}, {n} elements alone", lib.get(a), b)


def rule_case(lib: Library, backend: str, rule: Rule, dtype: Any) -> None:
    for which in _COEFFICIENTS:
        segments_case(lib, backend, rule, dtype, SIZES, groups=3, which=which)
    for late in range(2 + len(rule.states)):
        segments_case(lib, backend, rule, dtype, FEW, groups=2, late=late)
    for n in ALONE:
        alone_case(lib, backend, rule, dtype, n)


def table_case(lib: Library, backend: str, dtype: Any, count: int) -> None:
    """So many segments, of which some are empty."""
    sizes = np.random.default_rng(count).integers(1, 25, count)
    where: dict[str, Any] = {"none": [], "first": [0], "last": [-1], "middle": slice(count // 3, count // 2)}
    where |= {"most": np.arange(count) % 7 > 0, "all": slice(None)}
    for empty in EMPTY if count < 10_000 else ("none", "most"):  # Numba takes a tenth of a millisecond for a view
        some = sizes.copy()
        some[where[empty]] = 0
        segments_case(lib, backend, bind("adamw"), dtype, some.tolist(), groups=min(5, count))


def groups_case(lib: Library, backend: str, dtype: Any) -> None:
    """More groups than one launch takes."""
    for rule in (bind("adamw"), bind("amsgradw", ("maximize",))):
        segments_case(lib, backend, rule, dtype, [100 + k % 31 for k in range(260)], groups=130)


def cases(backend: str) -> list[Case]:
    """Raises Skipped if the backend cannot run here."""
    bridged, lib = usable(backend), library(backend)
    tables = shared()

    def case(name: str, run: Any, *arguments: Any) -> Case:
        return Case(name, partial(_reported, run, lib, backend, *arguments, bridged=bridged))

    def rules(variants: Sequence[Any]) -> list[Case]:
        kinds = [(variant, dtype) for dtype in tables.DTYPES for variant in variants]
        return [case(f"{tables.variant_id(v)} {np.dtype(t)}", rule_case, bind(*v), np.dtype(t)) for v, t in kinds]

    dtypes = [np.dtype(t) for t in tables.DTYPES]
    first = [("adamw", ()), tables.LARGEST]
    return [
        *rules(first),
        *(case(*row) for row in bits_api.first_cases(dtypes)),
        *(case(*row) for row in bits_device.cases()),
        *(case(*row) for row in bits_guard.cases(dtypes)),
        *(case(*row) for row in bits_stored.cases()),
        *(case(*row) for row in bits_rows.cases(dtypes)),
        *(case(*row) for row in bits_torch.cases(dtypes)),
        *(case(f"{n} segments {t}", table_case, t, n) for t in dtypes for n in COUNTS),
        *(case(f"130 groups {t}", groups_case, t) for t in dtypes),
        *(case(*row) for row in bits_api.other_cases(dtypes)),
        *rules([v for v in tables.VARIANTS if v not in first]),
    ]


def _reported(run: Any, lib: Library, backend: str, *arguments: Any, bridged: str) -> dict[str, Any]:
    return {"bridge": bridged, **(run(lib, backend, *arguments) or {})}
