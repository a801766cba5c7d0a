"""The global norm: the same bits however the gradients are cut, ordered, threaded and placed, and the right ones."""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from conftest import BACKENDS, missing, require, same_bits
from guard_cases import block_sums, root_of_sum

import fused_adam
from fused_adam._norm import Total, clipping, unscaling
from fused_adam.backends import load

OPTIONS = {"skip_nonfinite": True, "max_grad_norm": math.inf}


def measured(backend: str, grads: Any, scale: Any = 1.0) -> tuple[float, bool]:
    """The norm of gradients, and whether their step was skipped."""
    grads = grads if isinstance(grads, list | fused_adam.FlatBuffer) else [grads]
    params = [np.zeros_like(g) for g in (grads if isinstance(grads, list) else grads.tree)]
    params = params if isinstance(grads, list) else fused_adam.flatten(params)
    opt = fused_adam.SGD(params, backend=backend, **OPTIONS)
    opt.step(grads, grad_scale=scale)
    return opt.last_stats().grad_norm, bool(opt.last_stats().skipped)


def wild(seed: int, n: int, dtype: Any, span: float = 1.0) -> Any:
    """Of all magnitudes whose squares float64 holds; with a span above 1 of others too."""
    rng = np.random.default_rng(seed)
    reach = span * (38 if dtype == np.float32 else 150)
    with np.errstate(over="ignore"):
        x = (rng.standard_normal(n) * 10 ** rng.uniform(-reach, min(reach, 300), n)).astype(dtype)
    x[rng.random(n) < 0.1] = 0
    return x


def exactly(sums: list[float]) -> float:
    """As `root_of_sum`, by way of Fractions."""
    return math.sqrt(float(sum(map(Fraction, sums), Fraction(0))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_a_block(dtype: Any) -> None:
    """In Python alone, element by element: lane l of 32 takes 4l .. 4l + 3, then strides 16, 8, 4, 2, 1."""
    require("numba")
    for seed in range(30):
        x = wild(seed, 1 + 37 * seed, dtype)
        sums = []
        for start in range(0, x.size, 128):
            block = [*map(float, x[start : start + 128]), *[0.0] * 128][:128]
            lanes = []
            for lane in range(32):
                total = block[4 * lane] * block[4 * lane]
                for k in (1, 2, 3):
                    total += block[4 * lane + k] * block[4 * lane + k]
                lanes.append(total)
            for stride in (16, 8, 4, 2, 1):
                lanes = [lanes[k] + lanes[k + stride] for k in range(stride)]
            sums += lanes
        assert sums == block_sums(x)  # which other tests take for the right ones
        expected = exactly(sums), False
        assert [measured(backend, x) for backend in BACKENDS] == [expected, expected], f"{seed=}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_norm(dtype: Any, backend: str) -> None:
    """Squares of float32 numbers, and of these float64 ones, are exact in float64, and fsum rounds once."""
    for seed, n in enumerate((1, 100, 128, 1000, 2**15 + 77, 2**18 + 5)):
        x = wild(seed, n, np.float32).astype(dtype)
        exact = math.sqrt(math.fsum((x.astype(np.float64) ** 2).tolist()))
        norm, skipped = measured(backend, x)
        assert abs(norm - exact) <= 1e-15 * exact and not skipped


INFO = {dtype: np.finfo(dtype) for dtype in DTYPES}
# dtype, elements, the norm; "infinite" where finite gradients have a sum of squares that float64 cannot hold
VALUES: list[Any] = [
    *((dtype, [], 0.0) for dtype in DTYPES),
    *((dtype, [0.0, -0.0, 0.0], 0.0) for dtype in DTYPES),
    *((dtype, [-3.0, 4.0], 5.0) for dtype in DTYPES),
    *((dtype, [*[1.0] * 200, x, *[1.0] * 200], math.inf) for dtype in DTYPES for x in (math.inf, -math.inf)),
    *((dtype, [*[1.0] * 200, math.nan], math.nan) for dtype in DTYPES),
    *((dtype, [math.inf, *[1.0] * 200, math.nan], math.nan) for dtype in DTYPES),
    *((dtype, [math.inf, math.nan], math.nan) for dtype in DTYPES),
    *((dtype, [*[0.0] * 300, math.inf, *[0.0] * 300, -math.inf], math.inf) for dtype in DTYPES),
    (np.float32, [3e38, 3e38], math.sqrt(2) * float(np.float32(3e38))),
    (np.float32, [INFO[np.float32].smallest_subnormal], float(INFO[np.float32].smallest_subnormal)),
    (np.float32, [1e-40, 0, 1e-40], math.sqrt(2) * float(np.float32(1e-40))),
    (np.float64, [1e200], "infinite"),
    (np.float64, [1.3e154, 1.3e154], "infinite"),  # in one block, the sum overflows and no square does
    (np.float64, [1.3e154, *[0] * 200, 1.3e154], "infinite"),  # in two, each of which is finite
    (np.float64, [1.3e154], 1.3e154),
    (np.float64, [INFO[np.float64].max, math.nan], math.nan),
    (np.float64, [1e-200], 0.0),
    (np.float64, [2.0**-537], 2.0**-537),  # whose square is the smallest float64
    (np.float64, [2.0**-536] * 1000, math.sqrt(1000) * 2.0**-536),
]


@pytest.mark.parametrize(("dtype", "elements", "norm"), VALUES)
def test_values(dtype: Any, elements: list[float], norm: Any, backend: str) -> None:
    x = np.array(elements, dtype)
    found, skipped = measured(backend, x)
    expected = math.inf if norm == "infinite" else norm
    assert math.isnan(found) if math.isnan(expected) else abs(found - expected) <= 1e-15 * expected or found == expected
    assert skipped == (not np.isfinite(x).all())  # an infinite norm alone skips nothing


def test_every_exponent(backend: str) -> None:
    """Alone, for in a sum with others most digits do not reach the norm; subnormal squares and the next ones too."""
    opt = fused_adam.SGD(np.zeros(1), backend=backend, **OPTIONS)
    for exponent in range(-540, 513):
        for g in (np.array([2.0**exponent]), np.array([-1.37 * 2.0**exponent])):
            opt.step(g)
            assert opt.last_stats().grad_norm == root_of_sum(block_sums(g)), g


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(dtype: Any) -> None:
    require("numba")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gs = [wild(seed, n, dtype, span=2.0 if seed % 2 else 1.0) for n in rng.integers(0, 400, 5)]
        if seed % 4 == 3:
            gs[3][:1] = rng.choice([np.inf, np.nan])
        scale = [1.0, 3.0, 1e-3, 2.0**100][seed % 4]
        ours, theirs = (measured(backend, gs, scale) for backend in BACKENDS)
        assert same_bits(ours[0], theirs[0]) and ours[1] == theirs[1], f"{seed=} {gs}"
        with np.errstate(all="ignore"):
            expected = root_of_sum([s for g in gs for s in block_sums(dtype(1 / scale) * g)])
        assert same_bits(ours[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_and_order(dtype: Any, backend: str) -> None:
    x = wild(8, 128 * 999 + 5, dtype)
    expected = root_of_sum(block_sums(x)), False
    for seed, count in enumerate((0, 1, 5, 60)):
        rng = np.random.default_rng(seed)
        pieces = np.split(x, np.sort(rng.integers(0, 1000, count)) * 128)
        rng.shuffle(pieces)
        assert measured(backend, [p.copy() for p in pieces]) == expected
        assert measured(backend, fused_adam.flatten(pieces)) == expected
    assert measured(backend, x[:-5].reshape(27, 37, 128))[0] == root_of_sum(block_sums(x[:-5]))


@pytest.mark.parametrize("chunk", [128, 384, 2**14])
def test_chunks_of_numpy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_cpu = load("numpy")
    monkeypatch.setattr(numpy_cpu, "CHUNK", chunk)
    monkeypatch.setattr(numpy_cpu, "_local", threading.local())  # scratch rows of that size
    for n in (127, 128, 129, 385, 20_000):
        x = wild(n, n, np.float32)
        assert measured("numpy", x) == (root_of_sum(block_sums(x)), False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads(threads: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds to digits of its own; a number that is not finite is found wherever it is."""
    numba, numba_cpu = require("numba"), load("numba")
    if threads > numba.config.NUMBA_NUM_THREADS:
        missing(f"NUMBA_NUM_THREADS is {numba.config.NUMBA_NUM_THREADS}")
    monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", 0)
    x = wild(9, 2**18 + 2**16 + 129, dtype)
    expected = root_of_sum(block_sums(x))
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        for _ in range(5):
            assert measured("numba", x) == (expected, False)
            assert measured("numba", [x[:1], x[128 : 2**17], x[:0], x[2**17 :]]) == (
                root_of_sum(block_sums(x[:1]) + block_sums(x[128:])), False
            )  # fmt: skip
        for k in (0, 2**16 - 1, 2**16, x.size - 1):
            y = x.copy()
            y[k] = np.inf
            assert measured("numba", y) == (math.inf, True)
    finally:
        numba.set_num_threads(before)


def test_total_is_exact() -> None:
    """Against Python's integers, for floats of every exponent, many of each and in any number of parts."""
    rng = np.random.default_rng(10)
    exponents = np.repeat(np.arange(2047), 40)  # 0: subnormals
    fractions = rng.integers(0, 2**52, exponents.size)
    fractions[::40], fractions[1::40] = 0, 2**52 - 1
    x = ((exponents << 52) | fractions).view(np.float64)
    rng.shuffle(x)
    total = Total()
    for part in np.split(x, [1, 1, 7, 1000]):
        total.add(part)
    units = [n * (2**1074 // d) for n, d in map(float.as_integer_ratio, x.tolist())]
    assert sum(int(limb) << (32 * k) for k, limb in enumerate(total.limbs.tolist())) == sum(units)
    assert total.special == 0 and total.norm() == math.inf  # more than float64 holds
    some = x[x < 1e300]
    total = Total()
    total.add(some[::2])
    total.add(some[1::2])
    assert total.norm() == math.sqrt(math.fsum(some))
    # with room for the carries of 2**30 blocks: no digit takes more than 2**33 from one
    largest = Total()
    for exponent in range(1, 2047):
        largest.limbs[:] = 0
        largest.add(np.array([(exponent << 52) | (2**52 - 1)]).view(np.float64))
        assert largest.limbs.min() >= 0 and largest.limbs.max() < 2**33


def test_factors() -> None:
    assert [clipping(norm, 2.0) for norm in (0.0, 2.0, math.nextafter(2, 3), 4.0, math.inf)] == [
        1.0, 1.0, 2.0 / math.nextafter(2, 3), 0.5, 0.0
    ]  # fmt: skip
    assert math.isnan(clipping(math.nan, 2.0)) and clipping(math.inf, math.inf) == 1
    single, double = map(np.dtype, DTYPES)
    assert unscaling(3.0, single) == float(np.float32(1 / 3)) and unscaling(3.0, double) == 1 / 3
    for scale in (0.0, -1.0, math.nan, math.inf, 1e-310):
        assert math.isnan(unscaling(scale, single)) and math.isnan(unscaling(scale, double))
    for scale in (1e-40, 1e50):
        assert math.isnan(unscaling(scale, single)) and unscaling(scale, double) == 1 / scale
