"""What launches of kernels/stored.cu are held to on a GPU that is not there, by what that file says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import fake_guard
import numpy as np

_I64 = np.int64
_BYTES = {"FLOAT32": 4, "FLOAT16": 2, "BFLOAT16": 2, "SPLIT16": 2, "SPLIT8": 1, "INT8": 1, "NONE": 0}


def layout(text: str) -> Any:
    """The arguments of a kernel, by what its text says of itself."""
    states, coefficients, *groups = map(int, re.findall(r"(?:STATES|COEFFICIENTS|GROUPS) = (\d+)", text))
    segment = [(name, _I64) for name in ("n", "first", "group", "index", "p", "master", "scales")]
    segment.append(("states", _I64, (states,)))  # type: ignore[arg-type]
    tables = [(name, _I64) for name in ("segments", "gradients", "segment_of_chunk", "chunk")]
    rest: list[Any] = [("segment", segment), ("gradient", _I64), ("seed", _I64)]
    if groups:
        rest += [("t", _I64), ("coefficients", np.float32, (groups[0], coefficients))]
    else:
        rest += [("control", _I64), ("coefficients", _I64)]
    return np.dtype([*tables, *rest], align=True)


def checker(text: str) -> Callable[[Any, int], None]:
    """A check of its arguments and the number of blocks: everything the kernel will touch is the device's."""
    size = {name: _BYTES[kind] for name, kind in re.findall(r"\b(P|G|STATE|MASTER) = ([A-Z]+\d*)\b", text)}

    def check(a: Any, blocks: int) -> None:
        from fake_cupy import _read, on_device

        assert a["chunk"] > 0 and a["chunk"] % 128 == 0 and a["seed"] >= 0
        if "control" in a.dtype.names:
            assert on_device(int(a["control"]), fake_guard.CONTROL) and on_device(int(a["coefficients"]))
        else:
            assert a["t"] >= 1
        rows, gradients = [a["segment"]], [a["gradient"]]
        if a["segments"]:
            chunks = _read(a["segment_of_chunk"], np.int32, blocks)
            n = int(chunks[-1]) + 1
            assert on_device(int(a["segments"]), n * a["segment"].dtype.itemsize)
            rows, gradients = _read(a["segments"], a["segment"].dtype, n), _read(a["gradients"], _I64, n)
            assert (np.diff(chunks) >= 0).all()
        for row, g in zip(rows, gradients, strict=True):
            n = int(row["n"])
            assert n > 0 and row["index"] % 128 == 0
            held = [("P", row["p"]), ("G", g), ("MASTER", row["master"]), *(("STATE", s) for s in row["states"])]
            for name, pointer in held:
                assert on_device(int(pointer), n * size[name]) if size[name] else pointer == 0
            if size["STATE"] == 1:
                assert row["scales"] % 4 == 0 and on_device(int(row["scales"]), -(-n // 64) * 4)
            else:
                assert row["scales"] == 0

    return check
