"""The kernel over rows of the numba-cuda backend without a GPU: see test_numba_cuda."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from ptx import thread
from rows_cases import RULES, Host, Launch, check_few
from test_numba_cuda import THREADS, operations, process

from fused_adam._codegen import Rule


def assert_ptx(rule: Rule, dtype: np.dtype[Any], ptx: str) -> None:
    """Each instruction on floats is one of the rule's, of the sum, a load or a store; indices have 64 bits."""
    number = "f32" if dtype == np.float32 else "f64"
    states = len(rule.states)
    instructions = re.findall(r"\b([a-z][a-z0-9]*(?:\.[a-z0-9]+)*)\.([a-z]+\d+)\b", ptx)
    found = Counter(name for name, kind in instructions if kind == number and name not in ("mov", "selp"))
    # The loop over the gradients of a row is unrolled: of each but the first there is a load and an addition.
    more = found["ld.global.cs"] - 1 - states
    assert more >= 1
    expected = Counter(operations(rule)) + Counter({"add.rn": more, "ld.global.cs": 1 + states + more})
    expected += Counter({"ld.global": 1 + 2 * len(rule.coefficients), "st.global": 1, "st.global.cs": states})
    assert found == expected, rule.name
    kinds = {kind for _, kind in instructions}
    assert kinds <= {number, "s32", "u32", "s64", "u64", "b64"}, rule.name
    narrow = {f"{name}.{kind}" for name, kind in instructions if kind in ("s32", "u32")}
    divided = {"cvt.u64.u32", "div.u32"}  # the number of an element in its block, by that of its row's
    assert narrow <= {"mov.u32", "cvt.s64.s32", "mul.wide.s32", "ld.global.s32", *divided}, rule.name
    blocks = 4 if dtype == np.float32 else 3
    assert f".maxntid 256, 1, 1\n.minnctapersm {blocks}\n" in ptx and not re.search(r"\.local\b|\bcall\b", ptx), (
        rule.name
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_simulator(dtype: Any) -> None:
    lines = process("cuda_simulator.py", np.dtype(dtype), "rows", NUMBA_ENABLE_CUDASIM="1")
    assert lines == [rule.name for rule in RULES]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and NaN
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx(dtype: Any) -> None:
    dtype = np.dtype(dtype)
    lines = [json.loads(line) for line in process("numba_ptx.py", dtype, "rows")]
    for rule, (name, ptx) in zip(RULES, lines, strict=True):
        assert rule.name == name
        assert_ptx(rule, dtype, ptx)
        run = thread(ptx)

        def rows(made: Any, rule: Rule, dtype: Any, run: Any = run) -> Launch:
            def launch(blocks: int, arguments: Any) -> None:
                for block in range(blocks):
                    for k in range(THREADS):
                        run(arguments.ctypes.data, block, k, THREADS)

            return launch

        check_few(Host(rows), rule, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registers(dtype: Any) -> None:
    lines = [json.loads(line) for line in process("numba_ptx.py", np.dtype(dtype), "rows", "link")]
    assert len(lines) == 3
    for name, log in lines:
        (registers,) = re.findall(r"Used (\d+) registers", log)
        (stack,) = re.findall(r"(\d+) bytes stack frame", log)
        assert int(registers) <= (64 if dtype == np.float32 else 80) and stack == "0", name
