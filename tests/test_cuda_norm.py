"""The CUDA kernel of the norm on the CPU: the digits it leaves are those of the definition in NumPy, bit for bit."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, specials
from host_control import COPIES, HostNorm, empty_sums, expected, found
from test_cuda_host import protect, sparse

CHUNKS = (128, 256, 2048, 4096)
SIZES = (*range(301), *(n + k for n in (1024, 2048, 4096, 3 * 4096) for k in (-1, 0, 1)))
SCALES = (1.0, 1024.0, 3.0, 1e-3)


def values(dtype: Any, n: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=n) * 10 ** rng.uniform(-6, 6, n)).astype(dtype)


def late_copy(x: Any, late: int) -> Any:
    """`late` elements after a multiple of 16 bytes."""
    copy = np.empty(x.size + 4, x.dtype)
    start = -copy.ctypes.data % 16 // x.itemsize + late
    copy = copy[start : start + x.size]
    copy[:] = x
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("late", [0, 1])
def test_any_size(late: int, chunk: int, dtype: Any) -> None:
    """Each alone, and all in a table, in which some are empty."""
    gradients = [late_copy(values(dtype, n, n), late) for n in SIZES]
    kernel = HostNorm(dtype)
    for g in gradients[:: 1 if chunk == CHUNKS[-1] else 20]:
        sums = empty_sums()
        kernel.alone(g, sums, chunk=chunk)
        assert found(sums) == expected([g]), f"n={g.size}"
    sums = empty_sums()
    kernel.table(gradients, sums, chunk=chunk)
    assert found(sums) == expected(gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_table(dtype: Any) -> None:
    """In any order, with nothing but empty segments too; and what is already in the sums stays."""
    rng = np.random.default_rng(0)
    sizes = [0, 0, 5, 1, 128, 131, 0, 2049, 4097, 8192, 3, 0]
    gradients = [values(dtype, n, n) for n in sizes]
    kernel, sums = HostNorm(dtype), empty_sums()
    for k, chunk in enumerate((128, 2048, 384)):
        kernel.table([gradients[j] for j in rng.permutation(len(sizes))], sums, chunk=chunk)
        assert found(sums) == expected(gradients * (k + 1))
    kernel.table([gradients[0]] * 3, sums)
    assert found(sums) == expected(gradients * 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_spread_over_the_copies(dtype: Any) -> None:
    sums = empty_sums()
    HostNorm(dtype).alone(np.ones(128 * (COPIES + 1), dtype), sums, chunk=128)
    first, *rest = [found(copy[None]).units for copy in sums]
    assert first == 2 * rest[0] and set(rest) == {128 << 1074}


KINDS: dict[str, Sequence[float]] = {
    "ordinary": (1.0, -3.0, 0.1, 1e-5),
    "zero": (0.0, -0.0),
    "subnormal": (5e-324, -1e-310, 1e-45, -1e-40, 1e-39, 0.0),
    "huge": (1e38, -3.4e38, 1.0, 1e200, -1e200, 1e154, 1e-200),
    "smallest normal": (1.6e-154, 0.0),  # the squares are, by their exponent
    "tiny": (1e-200, -1e-160, 1e-38, 0.0),
    "infinite": (1.0, -0.5, np.inf),
    "negative infinite": (1.0, -np.inf, 0.0),
    "nan": (1.0, np.nan, 2.0),
    "both": (np.inf, np.nan, -np.inf),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_any_value(scale: float, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    kernel, met = HostNorm(dtype), set()
    with np.errstate(over="ignore"):
        rows = {name: np.array(given).astype(dtype) for name, given in KINDS.items()}
    if dtype == np.float32:
        rows["huge"] = rows["huge"][np.isfinite(rows["huge"])]
    for name, given in {**rows, "any": specials(dtype)}.items():
        for n in (1, 3, 150, 1500):
            g = rng.choice(given, n)
            if name in ("infinite", "nan"):  # a single one among others
                g[:] = rng.choice(given[np.isfinite(given)], n)
                g[rng.integers(n)] = given[~np.isfinite(given)][0]
            sums = empty_sums()
            kernel.alone(g, sums, scale)
            assert found(sums) == expected([g], scale), f"{name} n={n}"
            met.add(found(sums)[1:])
    # In float32 no sum of finite numbers overflows.
    assert met == {("", True), ("inf", False), ("nan", False)} | ({("inf", True)} if dtype == np.float64 else set())


@pytest.mark.parametrize("dtype", DTYPES)
def test_flags_of_several_blocks(dtype: Any) -> None:
    """An infinity in one block and NaN in another is NaN; what is found before stays."""
    g = values(dtype, 1000)
    sums, kernel = empty_sums(), HostNorm(dtype)
    for k, x in ((3, np.inf), (999, np.nan), (500, np.inf)):
        g[k] = x
        kernel.alone(g, sums, chunk=128)
        g[k] = 0
        assert found(sums)[1:] == ("inf" if k == 3 else "nan", False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, 1e-320, 1e-40, 1e308])
def test_a_scale_by_which_nothing_can_be_divided(scale: float, dtype: Any) -> None:
    """The last two are float64's alone. There is no tail, whose zeros would turn an infinite inverse into NaN."""
    g = values(dtype, 256)
    for given in (scale, np.array([scale])):
        sums = empty_sums()
        HostNorm(dtype).alone(g, sums, given)
        assert found(sums) == expected([g], scale)
        assert found(sums)[1:] == (("", True) if scale in (1e-40, 1e308) and dtype == np.float64 else ("nan", False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_a_scale_in_memory(of: Any, dtype: Any) -> None:
    g, sums = values(dtype, 300), empty_sums()
    scale = np.array([1 / 3], of)
    HostNorm(dtype).alone(g, sums, scale)
    assert found(sums) == expected([g], float(scale[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_have_64_bits(dtype: Any) -> None:
    """Blocks at and beyond 2**31 and 2**32 elements, and the last with its tail."""
    chunk, n = 4096, 2**32 + 2**31 + 77
    g, kernel = sparse(n, dtype), HostNorm(dtype)
    protect(g, 0)  # lest a mistake touch, and so take, all of it
    for block in (2**31 // chunk - 1, 2**31 // chunk, 2**32 // chunk, n // chunk):
        here = g[block * chunk : min((block + 1) * chunk, n)]
        protect(here, mmap.PROT_READ | mmap.PROT_WRITE)
        here[:] = values(dtype, here.size, block)
        sums = empty_sums()
        kernel.alone(g, sums, chunk=chunk, blocks=range(block, block + 1))
        assert found(sums) == expected([here])
