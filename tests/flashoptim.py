"""FlashOptim's 8-bit states, after its published formulas: what the ratio code is measured against.

Groups of 32 elements are divided by their largest absolute value, m and the root of v apart. m is companded by
2 x / (1 + abs(x)). Both are rounded to nearest, and the scales, which decode them, are kept in float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GROUP = 32


def _over_scales(x: Any) -> tuple[Any, Any]:
    """Groups over their largest absolute value, and that as it is kept."""
    groups = x.reshape(-1, GROUP)
    largest = np.maximum(np.abs(groups).max(1, keepdims=True), np.float32(1e-12))
    return groups / largest, largest.astype(np.float16).astype(np.float32)


def coded_m(m: Any) -> Any:
    """m as it is after it was kept."""
    x, scales = _over_scales(m)
    y = np.floor(2 * x / (1 + np.abs(x)) * np.float32(127) + np.float32(0.5)) / np.float32(127)
    return (y / (2 - np.abs(y)) * scales).ravel()


def coded_v(v: Any) -> Any:
    x, scales = _over_scales(np.sqrt(v))
    s = np.floor(x * np.float32(255) + np.float32(0.5)) / np.float32(255) * scales
    return (s * s).ravel()
