"""Rules of our own: one to be checked, one to be the roof."""

# They are source text for `fused_adam.rule`; they are never called as they stand.
# ruff: noqa: F821
# mypy: disable-error-code="no-untyped-def, name-defined"

from __future__ import annotations

import fused_adam


@fused_adam.rule
def clipped(p, g, m, v, c, lr, most, eps):
    """Every intrinsic, a local, and an assigned g."""
    size = maximum(absolute(g), eps)
    g = sign(g) * minimum(size, most)
    m = (m - c * m) + c * g
    v = maximum(v, size)
    p = p - lr * (m / sqrt(v))
    return p, m, v


@fused_adam.rule
def roof(p, g, m, v):
    """AdamW's traffic, four reads and three writes, with one operation for each write."""
    p = p + g
    m = m + g
    v = v + g
    return p, m, v
