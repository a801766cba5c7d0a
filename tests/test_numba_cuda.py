"""The kernel of the numba-cuda backend without a GPU: in Numba's simulator, and its PTX, read and run on the host.

Each in a process of its own: Numba chooses the simulator when it is imported, and does not always have a compiler.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, assert_arrays, inputs
from conftest import missing, require
from host_kernel import HostKernel
from numba_cuda_cases import FEWER, GUARDED, RULES, check, stepped, values
from ptx import thread

from fused_adam._codegen import OPERATORS, Rule
from fused_adam.backends._cuda_source import source

THREADS = 3  # of a block that runs PTX
LAST = 2**31 - 2  # the last block of the largest grid


def process(script: str, *arguments: Any, **environment: str) -> list[str]:
    """The lines that a script of this folder prints."""
    require("numba_cuda")
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        missing(f"Numba cannot compile for CUDA here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class PtxKernel(HostKernel):
    def __init__(self, rule: Rule, dtype: np.dtype[Any], ptx: str) -> None:
        self.source = source(rule, dtype)
        run = thread(ptx)

        def launch(blocks: int | range, arguments: Any) -> None:
            for block in range(blocks) if isinstance(blocks, int) else blocks:
                for k in range(THREADS):
                    run(arguments.ctypes.data, block, k, THREADS)

        self.launch = launch


PTX = {"add": "add.rn", "subtract": "sub.rn", "multiply": "mul.rn", "divide": "div.rn", "sqrt": "sqrt.rn"}
PTX |= {"absolute": "abs", "maximum": "setp.gt setp.neu", "minimum": "setp.gt setp.neu", "sign": "setp.gt setp.gt"}


def operations(rule: Rule) -> list[str]:
    """The instructions that one element takes, as the rule is written: the compiler looks into none of them."""
    nodes = [node for a in rule.assignments for node in ast.walk(a.value)]
    functions = [OPERATORS[type(node.op)] for node in nodes if isinstance(node, ast.BinOp)]
    functions += [node.func.id for node in nodes if isinstance(node, ast.Call)]  # type: ignore[attr-defined]
    return " ".join(PTX[function] for function in functions).split()


def assert_ptx(rule: Rule, dtype: np.dtype[Any], ptx: str) -> None:
    """Each instruction on floats is one of the rule's, a load or a store; integers have 64 bits; registers hold all."""
    number, vector, unroll = ("f32", "v4", 2) if dtype == np.float32 else ("f64", "v2", 1)
    elements = unroll * int(vector[1]) + 2 * unroll
    accesses = ["ld.global", "st.global"] + ["ld.global.cs"] * (1 + len(rule.states))
    accesses += ["st.global.cs"] * (len(rule.states) + rule.zeroes)
    expected = Counter(f"{access}.{vector}" for access in accesses * unroll)
    expected += Counter(accesses * 2 * unroll)
    expected += Counter(operations(rule) * elements)
    expected["ld.global"] += len(rule.coefficients) * (1 if dtype == np.float32 else elements)
    instructions = re.findall(r"\b([a-z][a-z0-9]*(?:\.[a-z0-9]+)*)\.([a-z]+\d+)\b", ptx)
    found = Counter(name for name, kind in instructions if kind == number and name not in ("mov", "selp"))
    assert found == expected, rule.name
    kinds = {kind for _, kind in instructions}
    assert kinds <= {number, "s32", "u32", "s64", "u64", "b64"}, rule.name
    narrow = {f"{name}.{kind}" for name, kind in instructions if kind in ("s32", "u32")}
    assert narrow <= {"mov.u32", "cvt.s64.s32", "mul.wide.s32", "ld.global.s32"}, rule.name
    assert ".maxntid 256, 1, 1\n.minnctapersm 4\n" in ptx and not re.search(r"\.local\b|\bcall\b", ptx), rule.name
    # The loads of a batch stand before its first store, in the loop of wide accesses and in that of single ones.
    evicted = re.findall(r"\b(ld|st)\.global\.cs\.(v?)", ptx)
    order = "".join(kind[0].upper() if wide else kind[0] for kind, wide in evicted)
    assert re.fullmatch(r"L+S*l+s*", order), rule.name
    # Of each access p is stored first, and then what is not needed soon: zeros to g, and the states.
    stores = "".join("s" if once else "p" for once in re.findall(r"\bst\.global(\.cs)?\b", ptx))
    assert stores == ("p" + "s" * (rule.zeroes + len(rule.states))) * 3 * unroll, rule.name


def assert_far_block(kernel: HostKernel, rule: Rule, dtype: np.dtype[Any]) -> None:
    """The last block of the largest grid, over the last elements of arrays of which nothing else is there."""
    given = inputs(rule, dtype, 5, share=0)
    expected = stepped(rule, 0, given)
    chunk = 4096
    arguments = kernel.arguments([values(rule, 0)], chunk)
    n, first, group, p, states = kernel.segment(0, 0, given)
    before = LAST * chunk * dtype.itemsize
    arguments["segment"] = (LAST * chunk + n, first, group, p - before, tuple(s - before for s in states))
    arguments["gradient"] = given[1].ctypes.data - before
    kernel.launch(range(LAST, LAST + 1), arguments)
    assert_arrays(rule, given, expected, "far")


@pytest.mark.parametrize("dtype", DTYPES)
def test_simulator(dtype: Any) -> None:
    lines = process("cuda_simulator.py", np.dtype(dtype), NUMBA_ENABLE_CUDASIM="1")
    assert lines == [rule.name for rule in (*RULES, *GUARDED)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and NaN
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx(dtype: Any) -> None:
    dtype = np.dtype(dtype)
    lines = [json.loads(line) for line in process("numba_ptx.py", dtype)]
    for rule, (name, ptx) in zip((*FEWER, *GUARDED), lines, strict=True):
        assert rule.name == name
        assert_ptx(rule, dtype, ptx)
        kernel = PtxKernel(rule, dtype, ptx)
        check(kernel, rule, dtype, 128, [300], off=False)
        check(kernel, rule, dtype, 128, (0, 1, 3, 4, 127, 128, 129), off=True)
        assert_far_block(kernel, rule, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registers(dtype: Any) -> None:
    """Four blocks of 256 threads fit on a multiprocessor, and nothing is spilled."""
    lines = [json.loads(line) for line in process("numba_ptx.py", np.dtype(dtype), "link")]
    assert len(lines) == 5
    for name, log in lines:
        (registers,) = re.findall(r"Used (\d+) registers", log)
        (stack,) = re.findall(r"(\d+) bytes stack frame", log)
        assert int(registers) <= 64 and stack == "0", name
