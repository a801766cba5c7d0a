"""Checkpoints of numbers in 16 and 8 bits as float32, for files that others are to read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fused_adam import _int8, _storage
from fused_adam._arrays import Array
from fused_adam._part import MASTER, SCALES
from fused_adam.checkpoint._elements import FORTRAN_SCALES
from fused_adam.checkpoint._held import array_of
from fused_adam.checkpoint._manifest import PARAMETER, Contents, Spec
from fused_adam.checkpoint._saved import Saved

_NARROW = ("F16", "BF16", "I8", "U8", "U16")


def _is_scales(name: str, spec: Spec) -> bool:
    return name in (SCALES, FORTRAN_SCALES) and spec.dtype == "U16"


def wide(contents: Contents) -> Contents:
    """The same with states and masters in float32, as `wide_array` gives them. Parameters stay as they are."""
    parameters = []
    for p in contents.parameters:
        arrays = {
            name: Spec("F32", p.shape) if name != PARAMETER and spec.dtype in _NARROW else spec
            for name, spec in p.arrays.items()
            if not _is_scales(name, spec)
        }
        parameters.append(replace(p, arrays=arrays))
    return replace(contents, parameters=parameters)


def wide_array(saved: Saved, number: int, name: str) -> Array:
    """All elements of an array that `wide` leaves. Raises CheckpointError."""
    arrays = saved.contents.parameters[number].arrays
    kept = array_of(saved, number, name)
    if name == PARAMETER or arrays[name].dtype not in _NARROW:
        return kept
    if name == MASTER:
        x = _storage.joined(array_of(saved, number, PARAMETER).reshape(-1), kept.reshape(-1))
    elif scales := [other for other, spec in arrays.items() if _is_scales(other, spec)]:
        order: Any = "F" if scales[0] == FORTRAN_SCALES else "C"
        q_m, q_v = (array_of(saved, number, a).ravel(order) for a in _int8.CODES)
        x = _int8.to_floats(q_m, q_v, array_of(saved, number, scales[0]))[name]
        return np.reshape(x, kept.shape, order)
    else:
        x = _storage.decoded(kept.reshape(-1))
    return x.reshape(kept.shape)
