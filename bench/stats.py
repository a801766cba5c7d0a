"""Medians of few samples, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

LEVEL = 0.95
_DRAWS = 1000


def _medians(samples: Sequence[float], seed: int = 0) -> Vector:
    """The median of each of many resamplings; the same samples give the same ones, in whichever process."""
    x = np.asarray(samples, np.float64)
    drawn = np.random.default_rng(seed).integers(0, x.size, (_DRAWS, x.size))
    return np.asarray(np.median(x[drawn], axis=1))


def _middle(medians: Vector, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(samples: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap interval of the median, with a confidence of `level`."""
    return _middle(_medians(samples), level)


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """The quotient of the medians of samples that were drawn apart, and its interval."""
    low, high = _middle(_medians(over) / _medians(under, seed=1))
    return float(np.median(over) / np.median(under)), low, high
