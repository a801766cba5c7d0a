"""What NVRTC makes of storage.cuh, without a GPU: for every architecture, and the same with any option."""

from __future__ import annotations

import re

import pytest
from storage_cases import kernel
from test_cuda_compile import ARCHITECTURES, OPTIONS, compiled, floating

# Exact, or rounded once to nearest; cvt.rn.f32.u32 of 24 bits is exact, and so is what add.rz rounds to an integer.
ALLOWED = {*"add.rn sub.rn mul.rn div.rn sqrt.rn add.rz abs setp.gt ld.global st.global".split()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_on_floats(architecture: int) -> None:
    ptx, _ = compiled(kernel(), architecture)
    assert not re.findall(r"\bfma\.|\.ftz|\.approx|\bmad\.[a-z.]*f32", ptx)
    assert {name.removesuffix(".f32") for name in floating(ptx, "f32") if not name.startswith("cvt")} <= ALLOWED
    assert set(re.findall(r"\bcvt\.\S*f32\S*", ptx)) == {"cvt.rn.f32.u32"}
    assert not re.findall(r"\S+\.f64\b", ptx)


@pytest.mark.parametrize("architecture", [90, 100])  # NVRTC 13.0 optimizes differently from sm_100 on
def test_no_option_changes_a_byte(architecture: int) -> None:
    first, *rest = [compiled(kernel(), architecture, options) for options in OPTIONS]
    assert all(result == first for result in rest)
