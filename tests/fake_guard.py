"""What launches of kernels/norm.cu and prologue.cu are held to on a GPU that is not there, by what these files say."""

from __future__ import annotations

from typing import Any

import numpy as np

_I64, _F64 = np.int64, np.float64
_SCALAR = [("kind", _I64), ("at", _I64), ("value", _F64)]
_TABLES = [(name, _I64) for name in ("segments", "gradients", "segment_of_chunk", "chunk")]
_SEGMENT = [("n", _I64), ("first", _I64)]
_SUMS = 8 * 64 * 72  # bytes

NORM = np.dtype([*_TABLES, ("segment", _SEGMENT), ("gradient", _I64), ("scale", _SCALAR), ("sums", _I64)])
_INTEGERS = [(name, _I64) for name in ("control", "groups", "count", "narrow", "wide", "sums")]
_SCALARS = [("scale", _SCALAR), ("found", _SCALAR)]
PROLOGUE = np.dtype([*_INTEGERS, ("max_norm", _F64), ("skip_nonfinite", _I64), *_SCALARS])
_BEFORE = [("formula", _I64), ("arguments", _F64, 6), ("wide", _I64), ("count", _I64), ("coefficients", _I64)]
_GROUP = np.dtype([*_BEFORE, ("source", _I64, 24), ("constants", _F64, 24)])
CONTROL = 48  # bytes


def _scalar(s: Any) -> bool:
    from fake_cupy import on_device

    return s["kind"] == 0 or on_device(int(s["at"]), {1: 4, 2: 8, 3: 1}[int(s["kind"])])


def check_norm(a: Any, blocks: int, itemsize: int) -> None:
    """Everything the kernel will touch is the device's."""
    from fake_cupy import _read, on_device

    assert a["chunk"] > 0 and a["chunk"] % 128 == 0
    assert on_device(int(a["sums"]), _SUMS) and _scalar(a["scale"])
    rows, gradients = [a["segment"]], [a["gradient"]]
    if a["segments"]:
        chunks = _read(a["segment_of_chunk"], np.int32, blocks)
        n = int(chunks[-1]) + 1
        assert on_device(int(a["segments"]), 16 * n) and on_device(int(a["gradients"]), 8 * n)
        rows, gradients = _read(a["segments"], np.dtype(_SEGMENT), n), _read(a["gradients"], _I64, n)
        assert (np.diff(chunks) >= 0).all()
    for row, g in zip(rows, gradients, strict=True):
        assert row["n"] > 0 and on_device(int(g), int(row["n"]) * itemsize)


def check_prologue(a: Any, blocks: int) -> None:
    """Everything the kernel will touch is the device's."""
    from fake_cupy import _read, on_device

    count = int(a["count"])
    assert blocks == 1 and on_device(int(a["control"]), CONTROL)
    assert on_device(int(a["groups"]), count * _GROUP.itemsize)
    assert not a["sums"] or on_device(int(a["sums"]), _SUMS)
    assert _scalar(a["scale"]) and _scalar(a["found"])
    for group in _read(a["groups"], _GROUP, count):
        assert 0 <= group["count"] <= 24 and 0 <= group["formula"] <= 9
        assert on_device(int(group["coefficients"]), int(group["count"]) * (8 if group["wide"] else 4))
