"""The kernel of the norm of the numba-cuda backend without a GPU: see test_numba_cuda."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from norm_cases import LAST, Case, cases, check
from ptx import block
from test_numba_cuda import THREADS, process


def assert_ptx(dtype: np.dtype[Any], ptx: str) -> None:
    """Each instruction on floats is one of `_norm`'s, or reads the scale; nothing is contracted, flushed or spilled."""
    narrow = dtype == np.float32
    # Of four elements, and lanes: 4 of 32, and 8 of the 8 that these leave.
    expected = Counter({"mul.rn.f64": 4, "add.rn.f64": 3 + 3 + 7, "ld.shared.f64": 4 + 8, "st.shared.f64": 2})
    expected += Counter({"ld.global.v4.f32": 1, "ld.global.f32": 4} if narrow else {"ld.global.v2.f64": 2})
    expected += Counter({"mul.rn.f32": 4, "cvt.f64.f32": 4} if narrow else {"mul.rn.f64": 4, "ld.global.f64": 4})
    # The scale is one of three kinds, and its inverse is rounded and looked at.
    expected += Counter({"ld.global.f64": 2, "ld.global.f32": 1, "cvt.f64.f32": 1, "div.rn.f64": 1})
    expected += Counter({"cvt.rn.f32.f64": 1, "cvt.f64.f32": 1} if narrow else {})
    instructions = re.findall(r"\b([a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.([a-z]+\d+))\b", ptx)
    found = Counter(name for name, kind in instructions if kind in ("f32", "f64") and not re.match("mov|selp", name))
    assert found == expected
    assert not re.search(r"\bfma\b|\.ftz\b|\.approx\b|\.local\b|\bcall\b", ptx)
    shared = Counter(re.findall(r"\b(?:bar\.sync|red\.\S+|atom\.\S+)", ptx))
    assert shared == {"bar.sync": 3, "red.global.add.u64": 1, "red.global.or.b64": 1}
    assert ".maxntid 256, 1, 1\n.minnctapersm 4\n" in ptx


@pytest.mark.parametrize("dtype", DTYPES)
def test_simulator(dtype: Any) -> None:
    lines = process("cuda_simulator.py", np.dtype(dtype), "norm", NUMBA_ENABLE_CUDASIM="1")
    assert lines == [str(case) for case in cases(np.dtype(dtype))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and NaN
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx(dtype: Any) -> None:
    dtype = np.dtype(dtype)
    ((_, ptx),) = [json.loads(line) for line in process("numba_ptx.py", dtype, "norm")]
    assert_ptx(dtype, ptx)
    run = block(ptx)

    def launch(blocks: range, arguments: Any) -> None:
        for k in blocks:
            run(arguments.ctypes.data, k, THREADS)

    for case in (*cases(dtype), Case(sizes=(500,), before=LAST)):
        check(launch, dtype, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registers(dtype: Any) -> None:
    ((_, log),) = [json.loads(line) for line in process("numba_ptx.py", np.dtype(dtype), "norm", "link")]
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (stack,) = re.findall(r"(\d+) bytes stack frame", log)
    assert int(registers) <= 64 and stack == "0"
