"""The CUDA kernel whose coefficients are in memory, on the CPU: byte for byte what NumPy gives, as in test_cuda_host.

It may skip, zero the gradient and count what did not move.
"""

from __future__ import annotations

from typing import Any

import pytest
from bits import DTYPES, VARIANTS, Variant, variant_id
from host_kernel import FEW
from test_cuda_host import SOME, check, own_rule

from fused_adam._codegen import Rule, behind, bind, parse
from fused_adam._rules import RULES

BOTH = ("unscale", "clip")
# Preludes, zeroes, counts.
WAYS = [((), False, False), (("unscale",), True, False), (("clip",), False, True)]
SOME_WAYS = [(FEW[k % len(FEW)], way, DTYPES[k % 2]) for k, way in enumerate(WAYS * 2)]
# Of each rule the variant with the most preludes, behind everything.
MOST: list[Variant] = [max((v for v in VARIANTS if v[0] == name), key=lambda v: len(v[1])) for name in RULES]


def check_all(rule: Rule, dtype: Any) -> None:
    for skips in (False, True):
        check(rule, dtype, SOME, groups=3, on_device=True, skips=skips)
        check(rule, dtype, SOME, chunk=128, late=1, on_device=True, skips=skips)
        check(rule, dtype, [4099], alone=True, on_device=True, skips=skips)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", MOST, ids=variant_id)
def test_any_rule(variant: Variant, dtype: Any) -> None:
    check_all(behind(bind(*variant), BOTH, zeroes=True, counts=True), dtype)


@pytest.mark.parametrize(("variant", "way", "dtype"), SOME_WAYS)
def test_any_way(variant: Variant, way: Any, dtype: Any) -> None:
    check_all(behind(bind(*variant), *way), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rule(dtype: Any) -> None:
    check_all(behind(parse(own_rule), BOTH, zeroes=True, counts=True), dtype)


def constant(p, g):
    """With no coefficient and no state."""
    p = p - g
    return p


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_coefficient(dtype: Any) -> None:
    check_all(parse(constant), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("late", [None, 0, 1, 2])
def test_any_size_and_place(late: int | None, dtype: Any) -> None:
    """Of what is zeroed and counted: each tail, and the ends of passes over a chunk, of chunks and of blocks."""
    rule = behind(bind("lion"), ("clip",), zeroes=True, counts=True)
    sizes = [*range(1, 20), *(n + k for n in (128, 1024, 2048, 4096) for k in (-1, 0, 1))]
    for skips in (False, True):
        for n in sizes if late is None else sizes[::5]:
            check(rule, dtype, [n], late=late, alone=True, on_device=True, skips=skips)
        check(rule, dtype, sizes, late=late, chunk=4096, on_device=True, skips=skips)
