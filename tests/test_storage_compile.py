"""What NVRTC makes of storage.cuh, without a GPU: for every architecture, and the same with any option."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from storage_cases import Tile, host, kernel, same_tiles
from test_cuda_compile import ARCHITECTURES, OPTIONS, compiled, floating, tool

# The root without its guard, and a fraction that is exact and added: where an approximation or an FMA is as meant.
_MEANT = re.compile(r"\{ \.reg \.f32 y, s, h, e; .*? \}|fma\.rn\.f32 %f\d+, %f\d+, 0f33800000, %f\d+;")
# Exact, or rounded once to nearest; cvt.rn.f32.u32 of 24 bits is exact, and so is what add.rz rounds to an integer.
ALLOWED = {*"add.rn sub.rn mul.rn div.rn sqrt.rn add.rz abs setp.gt ld.global st.global".split()}


def assert_floats(ptx: str, *more: str) -> None:
    """Floats are rounded once to nearest or exact, but where something else is meant; there are none of 64 bits."""
    ptx = _MEANT.sub("", ptx)
    assert not re.findall(r"\bfma\.|\.ftz|\.approx|\bmad\.[a-z.]*f32|\S+\.f64\b", ptx)
    found = {name.removesuffix(".f32") for name in floating(ptx, "f32") if not name.startswith("cvt")}
    assert found <= ALLOWED | set(more)
    assert set(re.findall(r"\bcvt\.\S*f32\S*", ptx)) <= {"cvt.rn.f32.u32"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_on_floats(architecture: int) -> None:
    assert_floats(compiled(kernel(), architecture)[0])


def _roots(sass: str) -> set[str]:
    """What is computed of each MUFU.RSQ, as formulas of its operand x; a clamp of that is left out."""
    formulas: set[str] = set()
    known: dict[str, str] = {}
    for opcode, rest in re.findall(r"\*/ +(MUFU\.RSQ|FMUL\.FTZ|FFMA|FMNMX)(?:\.FTZ)? ([^;]*);", sass):
        target, *operands = [o.strip().replace(".reuse", "") for o in rest.split(",")]
        if opcode == "FMNMX":
            known[target] = known.get(operands[0], "x")
        elif opcode == "MUFU.RSQ":
            known |= {operands[0]: "x", target: "rsqrt(x)"}
        else:
            a, b, *c = [
                o[: o.startswith("-")] + known.get(o.strip("-"), o if o[0].isdigit() else "x") for o in operands
            ]
            known[target] = f"{opcode}({', '.join([*sorted((a, b)), *c])})"
            formulas.add(known[target])
    return formulas


ONE = """
extern "C" __global__ void one(float* a) { a[threadIdx.x] = %s(f32{a[threadIdx.x]}).x; }
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_root_is_that_of_the_instruction(architecture: int, tmp_path: Path) -> None:
    """From 2**-101 on: the very operations that sqrt.rn.f32 consists of behind its guard, on the same operands."""
    found = {}
    for name in ("root", "sqrt"):
        path = tmp_path / name
        path.write_bytes(compiled(kernel().split("// What the tests launch")[0] + ONE % name, architecture)[1])
        found[name] = _roots(tool("nvdisasm", path, "-c", "-ndf"))
    s, h = "FMUL.FTZ(rsqrt(x), x)", "FMUL.FTZ(0.5, rsqrt(x))"
    e = f"FFMA(-{s}, {s}, x)"
    assert found["root"] == {s, h, e, f"FFMA({', '.join(sorted((e, h)))}, {s})"} <= found["sqrt"]


def test_a_root_that_is_tiny_shows_in_no_code() -> None:
    """So it may be anything from 0 to 2**-50 where that of 0 is 0."""
    exact = "    return sqrt(x);\n#endif"
    assert kernel().count(exact) == 1
    wrong = exact.replace("sqrt(x)", "bits_of(x) && bits_of(x) < 0x0d000000 ? float_of(0x26800000) : sqrt(x)")
    for seed in range(20):
        tiles = [Tile.random(64 * 100, seed) for _ in range(2)]
        for tile, text in zip(tiles, (kernel(), kernel().replace(exact, wrong)), strict=True):
            tile.y = abs(tile.y)
            host("encode_int8", tile, text)
        assert same_tiles(*tiles) == ""


@pytest.mark.parametrize("architecture", [90, 100])  # NVRTC 13.0 optimizes differently from sm_100 on
def test_no_option_changes_a_byte(architecture: int) -> None:
    first, *rest = [compiled(kernel(), architecture, options) for options in OPTIONS]
    assert all(result == first for result in rest)
