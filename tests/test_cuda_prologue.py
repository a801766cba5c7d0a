"""The CUDA kernel before a step on the CPU: the sum, the norm, what is decided and each coefficient are Python's."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from conftest import assert_same_bits
from host_control import SET, Group, HostNorm, Prologue, empty_sums, left, numpy_total
from host_kernel import compiled

from fused_adam import _coefficients, _norm
from fused_adam._coefficients import FORMULAS
from fused_adam._guard import Guard, Settings
from fused_adam.backends import _cuda_source
from fused_adam.backends._cuda_source import MOST_COEFFICIENTS

MOST_T = 2**53

# --- digits.cuh -------------------------------------------------------------------------------------------------------


def exact_sums() -> Iterator[int]:
    """In units of 2**-1074: on, just above and just below what two neighbours share, at any place; and both ends."""
    rng = random.Random(0)
    yield from (*range(3), 2**52 - 1, 2**52, 2**52 + 1, 2**53 - 1, 2**53, 2**53 + 1, 2**63, 2**64 - 1)
    largest = (2**53 - 1) << 2045
    yield from (largest, largest + 2**2044 - 1, largest + 2**2044, 2**2098, 2**2099 - 1, 2**2100, 2**2150)
    for shift in (*range(1, 130), *rng.sample(range(130, 2045), 120), 2044, 2045):
        for fraction in (2**52, 2**52 + 1, 2**53 - 1, 2**53 - 2, rng.getrandbits(52) | 2**52):
            middle = fraction << shift | 1 << shift - 1
            far = 1 << rng.randrange(shift)
            yield from (fraction << shift, middle - 1, middle, middle + 1, middle + far, middle - far)


def digits_of(units: int, carries: Any) -> Any:
    """In digits of which each but the last takes over some of the next: as `carries` many of 2**32."""
    digits = [units >> (32 * k) & 0xFFFFFFFF for k in range(_norm.LIMBS)]
    for k in reversed(range(1, _norm.LIMBS)):
        moved = min(digits[k], carries())
        digits[k] -= moved
        digits[k - 1] += moved << 32
    return np.array([*digits, *[0] * (SET - _norm.LIMBS)], np.uint64)


def test_rounding() -> None:
    """The quotient of two integers in Python, which is rounded once; and the digits are carried."""
    texts = [_cuda_source._text(name) for name in ("step.cuh", "digits.cuh")]
    texts.append('extern "C" double round_sum(Digit* digits) { return rounded(digits).x; }')
    library = ctypes.CDLL(str(compiled("\n".join(texts), "-O2", "-shared")))
    library.round_sum.restype = ctypes.c_double
    rng = random.Random(1)
    for units in exact_sums():
        try:
            quotient = units / 2**1074
        except OverflowError:
            quotient = math.inf
        for carries in (lambda: 0, lambda: 2**31 - 1, lambda: rng.getrandbits(rng.randrange(30))):
            digits = digits_of(units, carries)
            assert library.round_sum(ctypes.c_void_p(digits.ctypes.data)) == quotient, hex(units)
            assert digits.max() < 2**32 and sum(int(d) << (32 * k) for k, d in enumerate(digits)) == units


# --- coefficients.cuh -------------------------------------------------------------------------------------------------


def drawn(name: str, rng: random.Random) -> float:
    """A hyperparameter of any size in its range, and now and then 0."""
    if rng.random() < 0.1:
        return 0.0
    small = 10 ** rng.uniform(-12, 0)
    if name in ("beta1", "beta2", "alpha", "dampening", "mu"):
        return 1 - small if rng.random() < 0.7 else rng.random()
    return small * (10 ** rng.uniform(0, 4) if name == "lr" else 1)


def steps() -> list[int]:
    rng = random.Random(0)
    some = {int(MOST_T ** rng.random()) for _ in range(80)}
    return sorted(some | {1, 2, 3, 4, 5, 255, 256, 2**31 - 1, 2**31, 2**32, 2**32 + 1, MOST_T - 1, MOST_T})


def test_any_formula() -> None:
    """Of float64 and, rounded once, float32. There are more groups than threads."""
    rng, ts = random.Random(0), steps()
    cases: list[tuple[Any, list[float]]] = []
    groups = []
    for name, results in FORMULAS.items():
        formula = getattr(_coefficients, name)
        names = list(inspect.signature(formula).parameters)[1:]
        for k in range(-(-10_000 // len(ts))):
            arguments = [drawn(n, rng) for n in names]
            cases.append((formula, arguments))
            order = (results, (*results[::-1], results[0]))[k % 2]
            groups += [Group(name, arguments, dtype, results, order) for dtype in DTYPES]
    prologue = Prologue(groups)
    for t in ts:
        prologue.control["t"] = t - 1
        made = prologue()
        assert prologue.control["t"] == t
        exact = [formula(t, *arguments) for formula, arguments in cases for _ in DTYPES]
        by_name = [dict(zip(g.results, x, strict=True)) for g, x in zip(groups, exact, strict=True)]
        with np.errstate(over="ignore"):
            wanted = [np.array([x[n] for n in g.coefficients], g.dtype) for g, x in zip(groups, by_name, strict=True)]
        for dtype in DTYPES:  # all at once is faster
            ours, theirs = (
                np.concatenate([x for x in side if x.dtype == dtype]).view(f"u{np.dtype(dtype).itemsize}")
                for side in (made, wanted)
            )
            if not np.array_equal(ours, theirs):
                for group, x, y in zip(groups, made, wanted, strict=True):
                    assert_same_bits(["coefficients"], [x], [y], f"t={t} {group}")


def test_what_a_coefficient_may_come_from() -> None:
    """Constants, the two factors, results in any order; none at all, and as many as there is room for."""
    norm, most, scale = 3.7, 0.3, 1 / 3
    sums = left(numpy_total([np.array([norm * scale])], scale))
    clipping = _norm.clipping(norm, most)
    numbers = [0.1 * k - 0.7 for k in range(MOST_COEFFICIENTS)]
    groups, wanted = [], []
    for dtype in DTYPES:
        unscaling = _norm.unscaling(scale, np.dtype(dtype))
        for names, values in (
            ([], []),
            (numbers, numbers),
            (["unscaling", 0.7, "clipping", 1e-3], [unscaling, 0.7, clipping, 1e-3]),
            (["clipping", *numbers[2:], "unscaling"], [clipping, *numbers[2:], unscaling]),
        ):
            groups.append(Group("", (), dtype, (), names))
            wanted.append(np.array(values, dtype))
        values = {**dict(zip(FORMULAS["lion"], _coefficients.lion(1, 0.1, 0.9, 0.99, 0.01), strict=True))}
        groups.append(Group("lion", (0.1, 0.9, 0.99, 0.01), dtype, FORMULAS["lion"], ["decay", 5.0, "c1", "unscaling"]))
        wanted.append(np.array([values["decay"], 5.0, values["c1"], unscaling], dtype))
    made = Prologue(groups)(sums, max_norm=most, scale=scale)
    assert_same_bits([str(g.coefficients) for g in groups], made, wanted)


# --- decisions --------------------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
# Gradients whose sum is ordinary, 0, subnormal, infinite though they are finite, infinite, and NaN.
GRADIENTS = ([3.0, -4.0], [0.0, -0.0], [1e-160], [1e200], [1.0, INF], [1.0, NAN], [-INF, NAN])
GUARDED = [
    (gradients, most, skip)
    for gradients in GRADIENTS
    for most in (None, INF, 5.0, math.nextafter(5.0, 0), 0.3, 1e-300, 5e-324)
    for skip in (False, True)
]
SCALED = [
    (scale, of, dtypes)
    for scale in (1.0, 3.0, 0.0, -0.0, -1.0, INF, -INF, NAN, 1e-38, 1e-39, 1e-40, 1e39, 1e308, 1e-320)
    for of in (None, *DTYPES)
    for dtypes in ((), (np.float32,), (np.float64,), (np.float32, np.float64))
]
FOUND = [
    (value, of)
    for value in (0, 1, -0.0, 0.5, -1, NAN, INF)
    for of in (None, np.float32, np.float64, np.bool_, np.uint8)
    if of not in (np.bool_, np.uint8) or (value in (0, 1))
]


def compare(
    prologue: Prologue,
    total: _norm.Total | None = None,
    most: float | None = None,
    skip: bool = False,
    scale: Any = 1.0,
    found: Any = 0.0,
    dtypes: tuple[Any, ...] = (np.float32,),
) -> bool:
    """One step of the prologue, and of the guard that a host has. Returns whether it is skipped."""
    before = prologue.control.copy()
    prologue(
        None if total is None else left(total),
        dtypes=dtypes,
        max_norm=INF if most is None else most,
        skip_nonfinite=skip,
        scale=scale,
        found=found,
    )
    number = float(scale[0] if isinstance(scale, np.ndarray) else scale)
    flag = bool(found[0] if isinstance(found, np.ndarray) else found)
    settings = Settings(skip, most, zeroes=False, counts=False, device_scalars=True)
    guard = Guard(settings, number, flag, set(map(np.dtype, dtypes)), lambda unscaling, clipping: [])
    skips = guard.decide(total) is None
    control = prologue.control
    assert (control["skips"], control["t"]) == (skips, before["t"] + (not skips))
    assert control["skipped"] == before["skipped"] + skips
    if total is not None:
        assert_same_bits(["norm"], [control["norm"]], [np.float64(guard.norm)])
    if guard.factor is not None:
        assert_same_bits(["factor"], [control["factor"]], [np.float64(guard.factor)])
    return skips


def test_norm_clipping_and_skipping() -> None:
    """t begins beyond 32 bits."""
    prologue = Prologue(t=2**40)
    skipped = dict.fromkeys((False, True), 0)
    for gradients, most, skip in GUARDED:
        skipped[skip] += compare(prologue, numpy_total([np.array(gradients)]), most, skip)
    assert skipped == {False: 0, True: 3 * 7} and prologue.control["skipped"] == 21


def test_scales() -> None:
    prologue = Prologue()
    results = {compare(prologue, scale=_given(x, of), dtypes=dtypes) for x, of, dtypes in SCALED}
    assert results == {False, True}


@pytest.mark.parametrize(("value", "of"), FOUND)
def test_found(value: float, of: Any) -> None:
    skips = compare(Prologue(), found=_given(value, of))
    assert skips == bool(value)


def _given(x: float, of: Any) -> Any:
    with np.errstate(over="ignore"):
        return x if of is None else np.array([x]).astype(of)


def test_any_clip_factor() -> None:
    """The norms of gradients of any size, by norm.cu itself."""
    rng, prologue = np.random.default_rng(0), Prologue([Group("", (), np.float64, (), ["clipping"])])
    for k, dtype in itertools.product(range(100), DTYPES):
        g = (rng.normal(size=300) * 10 ** rng.uniform(-30, 30)).astype(dtype)
        sums = empty_sums()
        HostNorm(dtype).alone(g, sums, chunk=128)
        norm = numpy_total([g]).norm()
        most = norm * rng.choice([0.5, 1.0, 2.0, rng.uniform()]) if k % 10 else norm
        ((clipping,),) = prologue(sums, max_norm=most)
        assert (clipping, prologue.control["norm"]) == (_norm.clipping(norm, most), norm)
        assert math.isclose(norm, float(np.linalg.norm(g.astype(np.float64))), rel_tol=1e-12)


def test_a_step_that_is_skipped_holds_t_back() -> None:
    """The coefficients of the next one are those of the same t."""
    group = Group("adagrad", (1.0, 0.5, 1e-8), np.float64, FORMULAS["adagrad"], ["lr"])
    prologue = Prologue([group], t=1)
    for t, found in ((2, 0), (2, 1), (2, 1), (3, 0), (4, 0)):
        ((lr,),) = prologue(found=found)
        assert prologue.control["t"] == t
        assert found or lr == 1.0 / (1.0 + (t - 1) * 0.5)
    assert prologue.control["skipped"] == 2
