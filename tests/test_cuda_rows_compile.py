"""What NVRTC makes of kernels/rows.cu, without a GPU: see test_cuda_compile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, VARIANTS, Variant, variant_id
from host_kernel import FEW
from test_cuda_compile import ARCHITECTURES, OPTIONS, compiled, everything, operations, tool

from fused_adam._codegen import Rule, bind, parse
from fused_adam.backends._cuda_source import RowsSource, coefficients_of, rows_source

# Every rule for one architecture, and a few for the others.
INSTANTIATIONS = [(v, a) for a in ARCHITECTURES for v in (VARIANTS if a == 90 else FEW)]


def assert_ptx(rule: Rule, dtype: Any, ptx: str) -> None:
    """Every instruction on floats is one of the rule's, the sum of duplicates, a load or a store."""
    number = "f32" if dtype == np.float32 else "f64"
    states = len(rule.states)
    # Coefficients are read before the loop and where a row has its own; gradients first and in the loop over more.
    memory = {"ld.global.nc": 2 * coefficients_of(rule), "ld.global.cs": 2 + states, "ld.global": 1}
    memory |= {"st.global.cs": states, "st.global": 1}
    found = Counter(re.findall(r"\b[a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.b?f(?:16|16x2|32|64)\b", ptx))
    moves = {k for k in found if k.startswith(("mov.", "selp.", "ld.param."))}
    assert all(k.endswith(number) for k in moves)
    for k in moves:
        del found[k]
    rest = Counter(memory) + Counter({"add.rn": 1})
    least, most = (
        Counter({f"{k}.{number}": n for k, n in (operations(rule, merged) + rest).items()}) for merged in (True, False)
    )
    assert least <= found <= most, f"{least - found} too few, {found - most} too many"


def assert_machine_code(made: RowsSource, path: Path, accesses: bool) -> None:
    """Four blocks of 256 threads fit on a multiprocessor; nothing is spilled. accesses: nor is any memory generic."""
    usage = tool("cuobjdump", path, "-res-usage").split(f"Function {made.name}:")[1]
    used = {k: int(n) for k, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    assert used.pop("REG") <= 64
    assert used == {"STACK": 0, "SHARED": 0, "LOCAL": 0}
    if accesses:
        sass = tool("nvdisasm", path, "-c", "-ndf")
        found = set(re.findall(r"\*/ +(?:@!?U?P\d+ +)?((?:LD|ST|ATOM|RED|SU)[A-Z]*)(?:\.[A-Z0-9_]+)* ", sass))
        assert found <= {"LDG", "STG", "LDC", "LDCU"}, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("variant", "architecture"), INSTANTIATIONS, ids=[f"{variant_id(v)}-{a}" for v, a in INSTANTIATIONS]
)
def test_instantiations(variant: Variant, architecture: int, dtype: Any, tmp_path: Path) -> None:
    rule = bind(*variant)
    made = rows_source(rule, np.dtype(dtype))
    assert "#include" not in made.text
    ptx, cubin = compiled(made.text, architecture)
    assert_ptx(rule, dtype, ptx)
    path = tmp_path / "cubin"
    path.write_bytes(cubin)
    assert_machine_code(made, path, accesses=architecture == 90 and variant in FEW)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rule(dtype: Any) -> None:
    rule = parse(everything)
    assert_ptx(rule, dtype, compiled(rows_source(rule, np.dtype(dtype)).text, 90)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_option_changes_a_byte(dtype: Any) -> None:
    text = rows_source(bind("adamw"), np.dtype(dtype)).text
    first, *rest = [compiled(text, 90, options) for options in OPTIONS]
    assert all(result == first for result in rest)


def test_the_structs_are_those_of_the_host() -> None:
    made = rows_source(bind("adamw"), np.dtype(np.float32))
    for right, wrong in (("int64 chunk;", "int64 chunk, more;"), ("Number* p;", "Number *p, *more;")):
        assert made.text.count(right) == 1
        with pytest.raises(ValueError, match="the host lays the arguments out differently"):
            compiled(made.text.replace(right, wrong), 90)
