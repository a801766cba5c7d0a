"""What NVRTC makes of norm.cu, prologue.cu and the step that reads what these leave: see test_cuda_compile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, LARGEST, variant_id
from host_kernel import FEW
from test_cuda_compile import (
    ARCHITECTURES,
    OPTIONS,
    assert_ptx,
    assert_sass,
    compiled,
    everything,
    floating,
    memory_opcodes,
    resources,
    tool,
)
from test_cuda_on_device import BOTH, MOST

from fused_adam._codegen import behind, bind, parse
from fused_adam.backends._cuda_source import norm_source, prologue_source, source

# Every rule for one architecture, and the largest for the others.
STEPS = [(v, a) for a in ARCHITECTURES for v in (MOST if a == 90 else [LARGEST])]
EXACT = re.compile(
    r"((add|sub|mul|div|sqrt)\.rn|setp\.(gt|neu)|(ld|st)(\.global|\.shared|\.local)?)\.f(32|64)"
    r"|cvt\.f64\.f32|cvt\.rn\.f32\.f64|cvt\.rn\.f64"  # the last is from s64
)


def name_and_path(made: Any, cubin: bytes, folder: Path) -> tuple[str, Path]:
    path = folder / "cubin"
    path.write_bytes(cubin)
    return made.name, path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "architecture"), STEPS, ids=[f"{variant_id(v)}-{a}" for v, a in STEPS])
def test_steps(variant: Any, architecture: int, dtype: Any, tmp_path: Path) -> None:
    """As without scalars in memory, but of float64 three blocks fit and not four."""
    rule = behind(bind(*variant), BOTH, zeroes=True, counts=True)
    made = source(rule, np.dtype(dtype), on_device=True)
    assert "#include" not in made.text
    ptx, cubin = compiled(made.text, architecture)
    assert_ptx(rule, dtype, ptx, on_device=True)
    name, path = name_and_path(made, cubin, tmp_path)
    used = resources(name, path)
    assert used.pop("REG") <= (64 if dtype == np.float32 else 80)
    assert used == {"STACK": 0, "SHARED": 0, "LOCAL": 0}
    if architecture == 90:
        assert_sass(rule, dtype, tool("nvdisasm", path, "-c", "-ndf"), on_device=True)


@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_own_rule(zeroes: bool, counts: bool) -> None:
    for preludes, dtype in (((), np.float32), (BOTH, np.float64)):
        rule = behind(parse(everything), preludes, zeroes, counts)
        text = source(rule, np.dtype(dtype), on_device=True).text
        assert_ptx(rule, dtype, compiled(text, 90)[0], on_device=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: Any, architecture: int, tmp_path: Path) -> None:
    """Every instruction on floats is one that is written; 128 bits an access; nothing is spilled."""
    made = norm_source(np.dtype(dtype))
    ptx, cubin = compiled(made.text, architecture)
    own, vector, accesses = ("f32", "v4", 1) if dtype == np.float32 else ("f64", "v2", 2)
    # The scale, and what is positive: it and its inverse.
    wanted = Counter({"ld.global.f32": 1, "ld.global.f64": 1, "cvt.f64.f32": 1, "div.rn.f64": 1, "setp.gt.f64": 4})
    # Four elements, with and without a tail; their squares, and the sums in a lane and over lanes.
    wanted += Counter({f"ld.global.{vector}.{own}": accesses, f"ld.global.{own}": 4, f"mul.rn.{own}": 4})
    wanted += Counter({"mul.rn.f64": 4, "add.rn.f64": 3 + 5, "setp.neu.f64": 1})
    if dtype == np.float32:  # the inverse and NaN made narrow, the inverse and the elements made wide
        wanted += Counter({"cvt.rn.f32.f64": 2, "cvt.f64.f32": 1 + 4})
    found = floating(ptx, "f32", "f64")
    for k in ("abs.f64", "setp.equ.f64"):  # from sm_100 on whether a number is finite, which these do not flush
        del found[k]
    assert found == wanted
    name, path = name_and_path(made, cubin, tmp_path)
    used = resources(name, path)
    digits = 8 * 68 * 8  # of eight warps; from sm_90 on 1 KiB of each block's shared memory is the system's
    assert used.pop("REG") <= 64 and used.pop("SHARED") == digits + 1024 * (architecture >= 90)
    assert used == {"STACK": 0, "LOCAL": 0}
    if architecture == 90:
        opcodes = memory_opcodes(tool("nvdisasm", path, "-c", "-ndf"))
        assert opcodes["LDG.E.128"] == accesses
        assert {k.split(".")[0] for k in opcodes} == {"LDC", "LDG", "LDS", "STS", "REDG"}, opcodes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prologue(architecture: int, tmp_path: Path) -> None:
    """Nothing is contracted, approximate or flushes; a block of its threads fits, whose stack is small."""
    made = prologue_source()
    ptx, cubin = compiled(made.text, architecture)
    found = floating(ptx, "f32", "f64")
    wrong = [k for k in found if not EXACT.fullmatch(k)]
    assert wrong == []
    assert found["sqrt.rn.f64"] == 2  # of the norm, and of a bias correction
    used = resources(*name_and_path(made, cubin, tmp_path))
    assert used["REG"] <= 128 and used["STACK"] <= 128 and used["LOCAL"] == 0


ALL = {
    **{f"norm-{np.dtype(d).name}": norm_source(np.dtype(d)).text for d in DTYPES},
    "prologue": prologue_source().text,
    **{
        f"{variant_id(v)}-{np.dtype(d).name}": source(
            behind(bind(*v), BOTH, zeroes=True, counts=True), np.dtype(d), on_device=True
        ).text
        for v in FEW[1:2]
        for d in DTYPES
    },
}


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_no_option_changes_a_byte(text: str) -> None:
    first, *rest = [compiled(text, 90, options) for options in OPTIONS]
    assert all(result == first for result in rest)


LAYOUTS = [
    ("prologue", "int64 skips;", "int64 skips, more;"),
    ("prologue", "int64 wide;  ", "int64 wide, more;  "),
    ("prologue", "double max_norm;", "double max_norm, more;"),
    ("norm-float32", "int64 chunk;", "int64 chunk, more;"),
    ("norm-float32", "int64 n;", "int64 n, more;"),
    ("norm-float32", "COPIES = 64", "COPIES = 32"),
    ("adamw-float32", "Control* control;", "Control *control, *more;"),
]


@pytest.mark.parametrize(("kernel", "right", "wrong"), LAYOUTS)
def test_the_structs_are_those_of_the_host(kernel: str, right: str, wrong: str) -> None:
    assert ALL[kernel].count(right) == 1
    with pytest.raises(ValueError, match="the host lays the arguments out differently"):
        compiled(ALL[kernel].replace(right, wrong), 90)
