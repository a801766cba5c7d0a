"""The CUDA kernel on the CPU, byte for byte what NumPy gives: any table of segments, any place in memory, any chunk.

test_bits.py runs the same build over any value and size; this file is about where elements lie.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, VARIANTS, Variant, assert_arrays, coefficients, copies, inputs, run, variant_id
from host_kernel import FEW, HostKernel

from fused_adam._codegen import Rule, bind, parse

CHUNKS = (128, 2048, 4096)
# Every tail of a vector access and of a batch of them; the ends of passes over a chunk, of chunks and of blocks.
SIZES = (*range(41), *(n + k for n in (128, 256, 1024, 2048, 4096, 3 * 4096) for k in (-1, 0, 1)))
SOME = (0, 0, 5, 1, 128, 131, 0, 2049, 4097, 8192, 3, 0)
MARGIN = 2048  # elements before the first segment and after the last


def own_rule(p, g, m, c, lr):
    """With a local, an assigned g, and a name that the kernel uses too."""
    chunk = sign(g) * absolute(p)  # noqa: F821
    g = minimum(g, chunk)  # noqa: F821
    m = (m - c * m) + c * g
    p = p - lr * m
    return p, m


def group_coefficients(rule: Rule, group: int) -> list[float]:
    return [x * (1 + group / 64) for x in coefficients(rule)]


@lru_cache(2)
def given(rule: Rule, dtype: Any, total: int) -> list[Any]:
    return inputs(rule, dtype, total, share=0.05)


@lru_cache(8)
def stepped(rule: Rule, dtype: Any, total: int, group: int) -> list[Any]:
    """All of `given` after one step of NumPy with the group's coefficients."""
    arrays = copies(given(rule, dtype, total))
    run("numpy", rule, group_coefficients(rule, group), arrays)
    return arrays


def late_copies(arrays: Sequence[Any], late: int | None) -> list[Any]:
    """Copies on multiples of 16 bytes, but for one array, which starts an element later."""
    result = []
    for k, a in enumerate(arrays):
        result.append(np.empty(a.size + 1, a.dtype)[k == late :][: a.size])
        assert result[-1].ctypes.data % 16 == (k == late) * a.itemsize
        result[-1][:] = a
    return result


def check(
    rule: Rule,
    dtype: Any,
    sizes: Sequence[int],
    *,
    groups: int = 1,
    chunk: int = 2048,
    late: int | None = None,
    alone: bool = False,
    on_device: bool = False,
    skips: bool = False,
) -> None:
    """One launch over segments of these sizes steps their elements and no others: there are gaps between them.

    skips: with on_device, what a step that is skipped does.
    """
    end, parts = MARGIN, []
    for k, n in enumerate(sizes):
        start = end + 4 + -end % 4 + (k % 5 == 4)  # some lie off a multiple of 16 bytes, in all arrays
        end = start + n
        parts.append((k % groups, slice(start, end)))
    total = 2 ** (end + MARGIN).bit_length()
    before = [a[: end + MARGIN] for a in given(rule, dtype, total)]
    ours, expected = late_copies(before, late), copies(before)
    for group, part in sorted(parts, key=lambda row: row[0]):
        if skips:
            if rule.zeroes:
                expected[1][part] = 0
            continue
        for a, b in zip(expected, stepped(rule, dtype, total, group), strict=True):
            a[part] = b[part]

    kernel = HostKernel(rule, dtype, on_device)
    if kernel.control is not None:
        kernel.control["skips"], kernel.control["unmoved"] = skips, 2**40
    values = [group_coefficients(rule, group) for group in range(groups)]
    segments = [(group, [a[part] for a in ours]) for group, part in parts]
    if alone:
        kernel.alone(values[0], segments[0][1], chunk)
    else:
        kernel.table(values, segments, chunk)
    assert_arrays(rule, ours, expected, f"sizes {sizes[:20]} chunk {chunk} late {late}")
    if kernel.control is not None:
        unmoved = sum(np.count_nonzero((expected[0] == before[0])[x] & (before[1] != 0)[x]) for _, x in parts)
        assert kernel.control["unmoved"] == 2**40 + (unmoved if rule.counts and not skips else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_any_rule(variant: Variant, dtype: Any) -> None:
    rule = bind(*variant)
    for late in (None, *range(2 + len(rule.states))):
        check(rule, dtype, SOME, groups=3, late=late)
        check(rule, dtype, [4099], late=late, alone=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rule(dtype: Any) -> None:
    rule = parse(own_rule)
    for late in (None, *range(2 + len(rule.states))):
        check(rule, dtype, SOME, groups=3, late=late)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("variant", FEW, ids=variant_id)
def test_any_size_and_place(variant: Variant, chunk: int, dtype: Any) -> None:
    rule = bind(*variant)
    for late in (None, *range(2 + len(rule.states))):
        for n in SIZES:
            check(rule, dtype, [n], chunk=chunk, late=late, alone=True)
        check(rule, dtype, SIZES, chunk=chunk, late=late)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 1000, 10_000])
@pytest.mark.parametrize("empty", ["none", "first", "last", "middle", "most", "all"])
def test_any_table(empty: str, count: int, dtype: Any) -> None:
    sizes = np.random.default_rng(count).integers(1, 25, count)
    where = {"none": [], "first": [0], "last": [-1], "middle": slice(count // 3, count // 2), "all": slice(None)}
    sizes[where.get(empty, np.arange(count) % 7 > 0) if count else []] = 0
    check(bind("adamw"), dtype, sizes.tolist(), groups=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FEW, ids=variant_id)
def test_any_group(variant: Variant, dtype: Any) -> None:
    """As many groups as the arguments hold."""
    rule = bind(*variant)
    groups = HostKernel(rule, dtype).source.groups
    check(rule, dtype, [100 + k for k in range(2 * groups)], groups=groups)


# --- 64 bits ----------------------------------------------------------------------------------------------------------


def sparse(n: int, dtype: Any) -> Any:
    """n zeros, of which only what is touched takes memory."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, n * np.dtype(dtype).itemsize, flags=flags), dtype)


def protect(a: Any, how: int) -> None:
    failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(a.ctypes.data), ctypes.c_size_t(a.nbytes), how)
    assert not failed


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_have_64_bits(dtype: Any) -> None:
    """Blocks at and beyond 2**31 and 2**32 elements, and the last with its tail; their neighbours stay as they were."""
    rule, chunk, n = bind("adamw"), 4096, 2**32 + 2**31 + 77
    arrays = [sparse(n, dtype) for _ in range(4)]
    for a in arrays:
        protect(a, 0)  # lest a mistake touch, and so take, all of it
    for block in (2**31 // chunk - 1, 2**31 // chunk, 2**32 // chunk, n // chunk):
        lo, hi = block * chunk, min((block + 1) * chunk, n)
        window = slice(lo - chunk, min(hi + chunk, n))
        ours = [a[window] for a in arrays]
        for a in ours:
            protect(a, mmap.PROT_READ | mmap.PROT_WRITE)
        for a, b in zip(ours, given(rule, dtype, 3 * chunk), strict=True):
            a[:] = b[: a.size]
        expected = copies(ours)
        for a, b in zip(expected, stepped(rule, dtype, 3 * chunk, 0), strict=True):
            a[chunk : chunk + hi - lo] = b[chunk : chunk + hi - lo]
        HostKernel(rule, dtype).alone(group_coefficients(rule, 0), arrays, chunk, range(block, block + 1))
        assert_arrays(rule, ours, expected, f"block {block}")


def test_blocks_up_to_the_largest_grid() -> None:
    """A table whose last segment's chunks are the last that a grid of 2**31 - 1 blocks can have."""
    rule, dtype, chunk, end = bind("adamw"), np.float32, 128, 2**31 - 1
    kernel = HostKernel(rule, dtype)
    ours, expected = copies(given(rule, dtype, 1000)), copies(given(rule, dtype, 1000))
    for a, b in zip(expected, stepped(rule, dtype, 1000, 0), strict=True):
        a[:500] = b[:500]
    first = end - 4
    rows = [kernel.segment(0, 0, [a[:0] for a in ours]), kernel.segment(first, 0, [a[:500] for a in ours])]
    segments, gradients = np.array(rows, kernel.source.segment), np.array([ours[1].ctypes.data] * 2)
    segment_of_chunk = sparse(end, np.int32)
    segment_of_chunk[first:] = 1
    arguments = kernel.arguments([group_coefficients(rule, 0)], chunk)
    arguments["segments"], arguments["gradients"] = segments.ctypes.data, gradients.ctypes.data
    arguments["segment_of_chunk"] = segment_of_chunk.ctypes.data
    kernel.launch(range(first, end), arguments)
    assert_arrays(rule, ours, expected)
