"""kernels/rows.cu on the CPU, behind the stepper of the CUDA backends: byte for byte what NumPy gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bits import DTYPES, Variant, assert_arrays, inputs, variant_id
from host_kernel import FEW
from numba_cuda_cases import OWN
from rows_cases import KINDS, SHAPES, WIDE, Host, check, described, every_way, step
from test_cuda_host import sparse

from fused_adam._codegen import bind
from fused_adam._sparse import Mask, gather
from fused_adam.backends import Loose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [*FEW, None], ids=lambda v: variant_id(v) if v else "own")
def test_rows(variant: Variant | None, dtype: Any) -> None:
    rule = bind(*variant) if variant else OWN
    for way in every_way():
        check(Host(), rule, np.dtype(dtype), SHAPES, KINDS, **way)
        check(Host(), rule, np.dtype(dtype), WIDE, KINDS, **way)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 10_000])
def test_offsets_have_64_bits(width: int, dtype: Any) -> None:
    """Rows at and beyond 2**31 and 2**32 elements, of gradients too."""
    rule, dtype, n = bind("adamw"), np.dtype(dtype), (2**32 + 2**31) // width + 5
    moving = np.array(sorted({x // width + k for x in (2**31, 2**32, n * width - width - 1) for k in (-1, 0, 1)}))
    ours, theirs = ([sparse(n * width, dtype).reshape(n, width) for _ in range(4)] for _ in range(2))
    given = inputs(rule, dtype, len(moving) * width, share=0.05)
    for a, b, x in zip(ours, theirs, given, strict=True):
        a[moving] = b[moving] = x.reshape(len(moving), width)
    g = ours[1]
    loose = Loose(["g"], [g], [ours[0]])
    moved = gather("g", g, Mask("mask", n, moving), ours[0], 5, None, lambda number: [0.1, 0.01, 0.003, 1e-8, 1e-5])
    rows = [[[described(a.reshape(-1)) for k, a in enumerate(ours) if k != 1]]]
    step(Host(), rule, dtype, [loose], rows, [[[a.reshape(-1) for k, a in enumerate(theirs) if k != 1]]], [[moved]])
    near = np.unique(np.clip(moving[:, None] + np.arange(-2, 3), 0, n - 1))
    assert_arrays(rule, [a[near] for a in ours], [a[near] for a in theirs])
    assert not np.array_equal(ours[0][moving], given[0].reshape(len(moving), width))
