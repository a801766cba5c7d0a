"""Every check of what names rows of a parameter, or gives gradients to some of them. Nothing is written here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fused_adam._arrays import AnyArray, Array, CudaArray, order, ravel
from fused_adam._checks import array, kind, together
from fused_adam._cuda_arrays import LEGACY_STREAM
from fused_adam._memory import on_host


def rows(name: str, p: AnyArray, needed: bool = True) -> tuple[int, int]:
    """How many rows the parameter of a gradient has along its first axis, and of how many elements each is.

    needed: the caller named rows, so there must be a first axis; otherwise a scalar is one row.
    """
    if not p.shape and needed:
        raise ValueError(f"{name} is of some rows but the parameter has shape (); pass an array of that shape")
    if order(p) != "C":
        why = "is stepped row by row but the parameter is in Fortran order"
        raise ValueError(f"{name} {why}; make it a parameter in C order, np.ascontiguousarray(...)")
    n = p.shape[0] if p.shape else 1
    return n, math.prod(p.shape[1:])


def _unmasked(name: str, given: Any) -> Array:
    """A copy on the host of what is no masked array, whose masked entries no later check would see."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} should not be a masked array; pass its .compressed() or .filled()")
    return on_host(given)


def indices(name: str, given: Any, n: int) -> Array:
    """The numbers of rows, of n that there are, as int64 on the host."""
    a = _unmasked(name, given)
    if a.dtype.kind not in "iu" and not (isinstance(given, list | tuple) and not given):
        hint = "; for a mask pass step(grads, mask=...)" if a.dtype == np.bool_ else ""
        raise TypeError(f"{name} should be integers, got {kind(given)}{hint}")
    if a.ndim != 1:
        raise ValueError(f"{name} should be 1-D, got shape {a.shape}")
    if a.size and not (a.min() >= 0 and a.max() < n):
        k = int(np.flatnonzero((a < 0) | (a >= n))[0])
        raise ValueError(f"{name}[{k}] is {a[k]} but the parameter has {n} rows, numbered from 0")
    return a.astype(np.int64)


def row_values(name: str, given: Any, k: int, p: AnyArray, stream: int = LEGACY_STREAM) -> Any:
    """The gradients of k rows of p as a 1-D array. stream: that of the step, for a parameter on a GPU."""
    found = array(name, given, stream)
    shape = (k, *p.shape[1:])
    if found.shape != shape:
        raise ValueError(f"{name} has shape {found.shape} but the indices and the parameter ask for {shape}")
    if found.dtype != p.dtype:
        fix = f"pass .astype({p.dtype.name!r})"
        raise ValueError(f"{name} has dtype {found.dtype} but the parameter has {p.dtype}; {fix}")
    together(name, found, "the parameter", p)
    if isinstance(found, CudaArray):
        if order(found) != "C":
            raise ValueError(f"{name} is not in C order; pass cupy.ascontiguousarray({name})")
        return ravel(found)
    return np.ascontiguousarray(found).reshape(-1)


def row_mask(name: str, given: Any) -> Array:
    """A boolean for each row, on the host."""
    a = _unmasked(name, given)
    if a.dtype != np.bool_:
        raise TypeError(f"{name} should be an array of booleans, got {kind(given)}")
    if a.ndim != 1:
        raise ValueError(f"{name} should be 1-D, a boolean for each row, got shape {a.shape}")
    return a


def row_steps(name: str, given: Any, like: Array, t: int) -> Array:
    """How many steps each row has done, of t that there were."""
    a = _unmasked(name, given)
    if a.dtype != np.int64 or a.shape != like.shape:
        raise ValueError(f"{name} has shape {a.shape} and dtype {a.dtype}; expected {like.shape} and int64")
    if a.size and not (a.min() >= 0 and a.max() <= t):
        raise ValueError(f"{name} should be in [0, {t}], the optimizer's t, got {a.min()} to {a.max()}")
    return a


def mask_fits(name: str, n: int, gradient: str, rows: int) -> None:
    if n != rows:
        raise ValueError(f"{name} has {n} entries but the parameter of {gradient} has {rows} rows")
