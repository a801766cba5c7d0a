"""kernels/stored.cu on the CPU, byte for byte what NumPy gives: any kernel, size, place in memory, table and chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bits import coefficients
from stored_cases import (
    ALL,
    SMALLEST,
    HostStored,
    bound,
    first_difference,
    inputs,
    kernel_id,
    names,
    numpy_step,
    scales_of,
)

from fused_adam._codegen import Rule
from fused_adam._storage import Format

SEED, T = 2**40 + 77, 2**33 + 5
# Every tail of an access; the ends of blocks of 64, of warps' passes, of passes and of chunks.
SIZES = (*range(20), *(n + k for n in (64, 128, 256, 512, 2048, 4096) for k in (-1, 0, 1)))
SOME = (0, 5, 1, 128, 0, 131, 64, 2049, 4097, 0)
# Every way to keep a parameter or states, and random bits for each.
_FORMS = {SMALLEST, Format("float16", "float16"), Format("bfloat16", "bfloat16", "bfloat16", "split16")}
FEW = [(rule, form) for rule, form in ALL if rule == "adamw" and form._replace(stochastic_rounding=False) in _FORMS]
assert len(FEW) == 2 * len(_FORMS)
GAP = 128  # elements at least between segments


def check(
    rule: Rule,
    form: Format,
    sizes: Sequence[int],
    *,
    groups: int = 1,
    chunk: int = 2048,
    late: int | None = None,
    table: bool = True,
) -> None:
    """One launch over segments of these sizes steps their elements and no others: there are gaps between them.

    late: the number of the array that starts an element later than a multiple of 16 bytes.
    """
    end, parts = GAP, []
    for k, n in enumerate(sizes):
        start = -(-(end + GAP) // 128) * 128
        end = start + n
        parts.append((k % groups, slice(start, end)))
    total = -(-(end + GAP) // 128) * 128
    called = names(rule, form)
    before = inputs(rule, form, total)
    ours, expected = _placed(before, late), [a.copy() for a in before]
    values = [[x * (1 + k / 64) for x in coefficients(rule)] for k in range(groups)]

    def segment(arrays: list[Any], part: slice) -> list[Any]:
        return [a[scales_of(part) if name == "scales" else part] for name, a in zip(called, arrays, strict=True)]

    for group, part in parts:
        numpy_step(rule, form, values[group], segment(expected, part), part.start, SEED, T)
    segments = [(group, part.start, segment(ours, part)) for group, part in parts]
    HostStored(rule, form)(values, segments, SEED, T, chunk, table)
    for name, a, b in zip(called, ours, expected, strict=True):
        i = first_difference(a, b)
        where = f"sizes {sizes[:12]} chunk {chunk} late {late}"
        assert i < 0, f"{where}: {name}[{i}] is {a[i]!r}, not {b[i]!r}"


def _placed(arrays: Sequence[Any], late: int | None) -> list[Any]:
    result = []
    for k, a in enumerate(arrays):
        room = np.empty(a.nbytes + 32, np.uint8)
        start = -room.ctypes.data % 16 + (k == late) * a.itemsize
        result.append(room[start : start + a.nbytes].view(a.dtype))
        result[-1][:] = a
    return result


@pytest.mark.parametrize("kernel", ALL, ids=kernel_id)
def test_any_kernel(kernel: tuple[str, Format]) -> None:
    rule, form = bound(kernel[0]), kernel[1]
    check(rule, form, SOME, groups=3)
    check(rule, form, [4099], table=False)
    check(rule, form, SOME, groups=2, chunk=128, late=len(rule.states))


@pytest.mark.parametrize("chunk", [128, 2048, 4096])
@pytest.mark.parametrize("kernel", FEW, ids=kernel_id)
def test_any_size_and_place(kernel: tuple[str, Format], chunk: int) -> None:
    rule, form = bound(kernel[0]), kernel[1]
    for late in (None, *range(2 + bool(form.master) + len(rule.states))):
        check(rule, form, SIZES, chunk=chunk, late=late)


@pytest.mark.parametrize("kernel", FEW, ids=kernel_id)
def test_any_group(kernel: tuple[str, Format]) -> None:
    """As many as the arguments hold."""
    rule, form = bound(kernel[0]), kernel[1]
    groups = HostStored(rule, form).source.groups
    check(rule, form, [100 + k for k in range(groups)], groups=groups)


@pytest.mark.parametrize("which", ["m", "v"])
def test_what_is_not_finite_leaves_its_block_alone(which: str) -> None:
    """In any lane: the codes of the others are those of a step without it."""
    rule, form = bound("adamw"), SMALLEST
    host, values = HostStored(rule, form), coefficients(rule)
    for at in range(64):
        runs = []
        for bad in (0x7FC0, 0x7F80, 0):  # NaN, inf, and a gradient of 0
            arrays = inputs(rule, form, 64)
            arrays[1][:] = 0x3C00 + np.arange(64, dtype=np.uint16)
            arrays[3][at] = arrays[4][at] = 0
            arrays[1][at] = bad
            host([values], [(0, 0, arrays)], SEED, T, table=False)
            runs.append(arrays[3 if which == "m" else 4])
        assert np.array_equal(runs[0], runs[2]) and np.array_equal(runs[1], runs[2])
