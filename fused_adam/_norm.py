"""The global norm of gradients, which depends on neither chunks, threads, launches nor shards.

Each parameter is cut into blocks of 128 elements. The squares of a block are added in float64 in one order: lane l of
32 adds those of elements 4l .. 4l + 3 from left to right, then lanes are added to those 16, 8, 4, 2 and 1 before them.
The blocks are then added exactly, in any order, as an integer in units of 2**-1074, in digits of 32 bits that are kept
in int64 with room for the carries of 2**30 blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fused_adam._arrays import BLOCK, Array

LIMBS = 68  # for any float64, and three digits for the carries
LANES = 32
_UNIT = 1 << 1074
_DIGIT = 0xFFFFFFFF


@dataclass
class Total:
    """limbs: digits of the sum. special: the sum of what is inf or NaN, else 0. finite: whether all elements are."""

    limbs: Array = field(default_factory=lambda: np.zeros(LIMBS, np.int64))
    special: float = 0.0
    finite: bool = True

    def add(self, sums: Array) -> None:
        """Sums of blocks, float64."""
        ordinary = np.isfinite(sums)
        if not ordinary.all():
            with np.errstate(invalid="ignore"):
                self.special += float(sums[~ordinary].sum())
            sums = sums[ordinary]
        bits = np.ascontiguousarray(sums).view(np.int64)
        exponent, fraction = bits >> 52, bits & ((1 << 52) - 1)
        fraction |= np.where(exponent > 0, 1 << 52, 0)
        place = np.maximum(exponent, 1) - 1
        digit, shift = place >> 5, place & 31
        low, high = (fraction & _DIGIT) << shift, (fraction >> 32) << shift
        np.add.at(self.limbs, digit, low & _DIGIT)
        np.add.at(self.limbs, digit + 1, (low >> 32) + (high & _DIGIT))
        np.add.at(self.limbs, digit + 2, high >> 32)

    def plus(self, other: Total) -> Total:
        """Of both together."""
        return Total(self.limbs + other.limbs, self.special + other.special, self.finite and other.finite)

    def norm(self) -> float:
        """The root of the sum, rounded once before it."""
        if self.special:
            return math.sqrt(self.special) if self.special > 0 else math.nan
        used = np.flatnonzero(self.limbs).tolist()
        units = sum(int(self.limbs[k]) << (32 * k) for k in used)
        try:
            return math.sqrt(units / _UNIT)
        except OverflowError:
            return math.inf


def block_sums(x: Array, rows: tuple[Array, Array]) -> Array:
    """The sum of squares of each block of x, 1-D; what is missing of the last one counts as 0.

    rows: two of float64 with room for x, up to a multiple of 128 elements; the result is in the first.
    """
    blocks = -(-x.size // BLOCK)
    n = blocks * BLOCK
    y, lanes = rows[0][:n], rows[1][: n // 4]
    y[: x.size] = x
    y[x.size :] = 0
    np.multiply(y, y, y)
    four = y.reshape(-1, 4)
    np.add(four[:, 0], four[:, 1], lanes)
    np.add(lanes, four[:, 2], lanes)
    np.add(lanes, four[:, 3], lanes)
    # One lane of all blocks after the other: where memory runs out, NumPy crashes on rows of a few elements.
    sums = y[: n // 4]
    np.copyto(sums.reshape(LANES, blocks), lanes.reshape(blocks, LANES).T)
    while sums.size > blocks:
        half = sums.size // 2
        sums = np.add(sums[:half], sums[half:], sums[:half])
    return sums


def clipping(norm: float, most: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most `most`; NaN for a norm that is NaN."""
    return 1.0 if norm <= most else most / norm


def unscaling(scale: float, dtype: Any) -> float:
    """1 / scale as the compute type has it, or NaN for a scale by which nothing can be divided."""
    with np.errstate(all="ignore"):
        inverse = float(dtype.type(1.0 / scale)) if 0 < scale < math.inf else math.nan
    return inverse if 0 < inverse < math.inf else math.nan
