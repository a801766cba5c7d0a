"""The global norm of gradients of which each rank has a part: exact digits, which any engine adds up as integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fused_adam._arrays import Array, address
from fused_adam._norm import LIMBS, Total
from fused_adam.backends import module
from fused_adam.distributed._collective import Collective

_DIGIT = 0xFFFFFFFF
_INF, _NAN, _NOT_FINITE = range(LIMBS, LIMBS + 3)


def local(arrays: Sequence[Array], unscaling: float, dtype: np.dtype[Any], backend: str) -> Total:
    """Of 1-D arrays that begin on a multiple of 128 in canonical space, multiplied by `unscaling`."""
    if backend != "numba" or not arrays:
        from fused_adam.backends import numpy_cpu

        return numpy_cpu.total_of([(arrays, dtype.type(unscaling))])
    numba_cpu, norm = module("numba_cpu"), module("_numba_norm")
    columns = numba_cpu.COLUMNS
    rows = np.zeros((len(arrays), columns + 2), np.int64)
    rows[:, 0] = [a.size for a in arrays]
    rows[:, columns + 1] = [address(a) for a in arrays]
    total: Total = norm.total(int(rows[:, 0].sum()), rows, numba_cpu.chunks(rows), [dtype.name], [unscaling])
    return total


def of_all(collective: Collective, total: Total) -> Total:
    """The sum of all ranks' totals, in any order the same. Raises ConnectionError."""
    numbers = np.zeros(LIMBS + 3, np.int64)
    carry = 0
    for k, limb in enumerate(total.limbs.tolist()):  # so that a sum over 2**31 ranks fits
        carry += limb
        numbers[k] = carry & _DIGIT
        carry >>= 32
    numbers[_INF], numbers[_NAN] = math.isinf(total.special), math.isnan(total.special)
    numbers[_NOT_FINITE] = not total.finite
    collective.all_reduce(numbers).wait()
    special = math.nan if numbers[_NAN] else math.inf if numbers[_INF] else 0.0
    return Total(numbers[:LIMBS], special, not numbers[_NOT_FINITE])
