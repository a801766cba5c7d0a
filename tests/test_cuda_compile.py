"""What NVRTC makes of the CUDA kernel, without a GPU: every rule, type and architecture, down to the instructions."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, VARIANTS, Variant, variant_id
from conftest import missing, require
from host_kernel import FEW

from fused_adam._codegen import OPERATORS, Rule, bind, parse
from fused_adam.backends._cuda_source import source

ARCHITECTURES = (75, 80, 90, 100, 120)
OURS = ("-std=c++17",)
CUPY = (*OURS, "-ftz=true", "--device-as-default-execution-space")  # what CuPy 14 makes of ours
OPTIONS = [OURS, CUPY, (*OURS, "--fmad=true"), (*OURS, "--use_fast_math")]


@cache
def nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        missing(f"NVRTC does not load, which cuda-bindings and nvidia-cuda-nvrtc provide: {error}")
    return nvrtc


def call(name: str, *arguments: Any) -> Any:
    error, *result = getattr(nvrtc(), name)(*arguments)
    assert not int(error), f"{name}: {error}"
    return result[0] if result else None


def compiled(text: str, architecture: int, options: tuple[str, ...] = CUPY) -> tuple[str, bytes]:
    """PTX and cubin. Raises ValueError with the compiler's words where there is any, be it a warning."""
    program = call("nvrtcCreateProgram", text.encode(), b"", 0, [], [])
    try:
        arguments = [o.encode() for o in (*options, f"-arch=sm_{architecture}")]
        (error,) = nvrtc().nvrtcCompileProgram(program, len(arguments), arguments)
        results = []
        for name in ("ProgramLog", "PTX", "CUBIN")[: 1 if int(error) else 3]:
            results.append(bytearray(call(f"nvrtcGet{name}Size", program)))
            call(f"nvrtcGet{name}", program, results[-1])
        log = results[0].rstrip(b"\0").decode()
        if int(error) or log:
            raise ValueError(log)
        return results[1].rstrip(b"\0").decode(), bytes(results[2])
    finally:
        call("nvrtcDestroyProgram", program)


def tool(name: str, path: Path, *arguments: str) -> str:
    """What a program of the CUDA toolkit says about a file."""
    try:
        program = distribution(f"nvidia-cuda-{name}").locate_file(f"nvidia/cu13/bin/{name}")
    except PackageNotFoundError:
        missing(f"nvidia-cuda-{name} is not installed")
    return subprocess.run([str(program), *arguments, str(path)], check=True, capture_output=True, text=True).stdout


# --- what an instantiation should consist of --------------------------------------------------------------------------

PTX = {"add": "add.rn", "subtract": "sub.rn", "multiply": "mul.rn", "divide": "div.rn", "sqrt": "sqrt.rn"}
PTX |= {"moved": "setp.neu", "given": "setp.neu"}  # of what is counted
PTX |= {"absolute": "abs", "maximum": "setp.gt setp.neu", "minimum": "setp.gt setp.neu", "sign": "setp.gt setp.gt"}


def operations(rule: Rule, merged: bool) -> Counter[str]:
    """The instructions that one element takes, as the rule is written or with equal subexpressions computed once."""
    values: dict[str, Any] = {}  # of a name, as nested tuples
    found = []

    def visit(node: Any) -> Any:
        if isinstance(node, ast.Name):
            return values.get(node.id, node.id)
        if isinstance(node, ast.BinOp):
            value = OPERATORS[type(node.op)], visit(node.left), visit(node.right)
        else:
            value = node.func.id, *map(visit, node.args)
        found.append(value)
        return value

    for a in rule.assignments:
        values[a.target] = visit(a.value)
    found += [("moved", "p"), ("given", "g")] if rule.counts else []
    return Counter(" ".join(PTX[function] for function, *_ in (set(found) if merged else found)).split())


def accesses(rule: Rule, dtype: Any, on_device: bool = False) -> tuple[Counter[str], Counter[str], int]:
    """Loads and stores of a kernel, of 16 bytes and of one element, and how many elements' arithmetic it holds."""
    unroll, wide = (2, 4) if dtype == np.float32 else (1, 2)
    states = len(rule.states)
    each = Counter({"ld.global": 1, "ld.global.cs": 1 + states, "st.global": 1, "st.global.cs": states + rule.zeroes})
    batches = [Counter({k: n * accesses for k, n in each.items()}) for accesses in (unroll, 2 * unroll)]
    if on_device:  # a step that is skipped zeroes too
        batches = [b + Counter({"st.global.cs": int(rule.zeroes)}) for b in batches]
        batches[1]["ld.global.nc"] = len(rule.coefficients)
    return batches[0], batches[1], unroll * wide + 2 * unroll


def floating(ptx: str, *numbers: str) -> Counter[str]:
    """The instructions on floats, but for moves, which are all of these types."""
    found = Counter(re.findall(r"\b[a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.b?f(?:16|16x2|32|64)\b", ptx))
    moves = {k for k in found if k.startswith(("mov.", "selp.", "ld.param."))}
    assert all(k.endswith(numbers) for k in moves)
    return Counter({k: n for k, n in found.items() if k not in moves})


def assert_ptx(rule: Rule, dtype: Any, ptx: str, on_device: bool = False) -> None:
    """Every instruction on floats is one of the rule's, loads or stores: none is contracted, approximate or flushes."""
    number, vector = ("f32", "v4") if dtype == np.float32 else ("f64", "v2")
    wide, scalar, elements = accesses(rule, dtype, on_device)
    memory = Counter({f"{k}.{vector}.{number}": n for k, n in wide.items()})
    memory += Counter({f"{k}.{number}": n for k, n in scalar.items()})
    found = floating(ptx, number)
    # NVRTC 13.0 merges equal subexpressions, such as c * g in rmsprop_centered, from sm_100 on only.
    least, most = (
        memory + Counter({f"{k}.{number}": n * elements for k, n in operations(rule, merged).items()})
        for merged in (True, False)
    )
    assert least <= found <= most, f"{least - found} too few, {found - most} too many"


def memory_opcodes(sass: str) -> Counter[str]:
    return Counter(re.findall(r"\*/ +(?:@!?U?P\d+ +)?((?:LD|ST|ATOM|RED|SU)[A-Z]*(?:\.[A-Z0-9_]+)*) ", sass))


def resources(name: str, path: Path) -> dict[str, int]:
    """What a kernel takes of a multiprocessor: registers, and bytes of memories."""
    usage = tool("cuobjdump", path, "-res-usage").split(f"Function {name}:")[1]
    return {k: int(n) for k, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def assert_sass(rule: Rule, dtype: Any, sass: str, on_device: bool = False) -> None:
    """128 bits an access; g and the states evict first; nothing goes through local memory or generic addresses."""
    wide, scalar, _ = accesses(rule, dtype, on_device)
    size = "" if dtype == np.float32 else ".64"
    found = memory_opcodes(sass)
    assert not {"LDL", "STL", "ST"} & {k.split(".")[0] for k in found}  # LD may read the arguments
    for ptx, opcode in (("ld.global", "LDG.E"), ("st.global", "STG.E")):
        assert found[f"{opcode}.128"] == wide[ptx]
        assert found[f"{opcode}.EF.128"] == wide[f"{ptx}.cs"]
        assert found[f"{opcode}.EF{size}"] == scalar[f"{ptx}.cs"]
    assert found[f"STG.E{size}"] == scalar["st.global"]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_every_instantiation(variant: Variant, dtype: Any, architecture: int, tmp_path: Path) -> None:
    rule = bind(*variant)
    made = source(rule, np.dtype(dtype))
    assert "#include" not in made.text  # CuPy's cache would not see a change in a header
    ptx, cubin = compiled(made.text, architecture)
    assert_ptx(rule, dtype, ptx)
    path = tmp_path / "cubin"
    path.write_bytes(cubin)
    used = resources(made.name, path)
    assert used.pop("REG") <= 64  # or fewer than four blocks of 256 threads fit
    # Where float64 has a 64th of float32's rate, AMSGrad without decay may spill one number.
    assert used.pop("STACK") <= (8 if "amsgrad" in rule.name and dtype == np.float64 and architecture == 120 else 0)
    assert used == {"SHARED": 0, "LOCAL": 0}
    if architecture == 90:
        assert_sass(rule, dtype, tool("nvdisasm", path, "-c", "-ndf"))


def everything(p, g, m, v, x, c):
    """Each operator and intrinsic, a local, and an expression that occurs twice."""
    a = minimum(c * g, p) - maximum(c * g, m)  # noqa: F821
    m = sign(a) / sqrt(absolute(v))  # noqa: F821
    v = v + a
    p = p - m * x
    return p, m, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rule(dtype: Any) -> None:
    rule = parse(everything)
    assert_ptx(rule, dtype, compiled(source(rule, np.dtype(dtype)).text, 90)[0])


def test_the_structs_are_those_of_the_host() -> None:
    made = source(bind("adamw"), np.dtype(np.float32))
    for right, wrong in (("int64 chunk;", "int64 chunk, more;"), ("Number* p;", "Number *p, *more;")):
        assert made.text.count(right) == 1
        with pytest.raises(ValueError, match="the host lays the arguments out differently"):
            compiled(made.text.replace(right, wrong), 90)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FEW, ids=variant_id)
def test_no_option_changes_a_byte(variant: Variant, dtype: Any) -> None:
    text = source(bind(*variant), np.dtype(dtype)).text
    first, *rest = [compiled(text, 90, options) for options in OPTIONS]
    assert all(result == first for result in rest)


def test_options_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy itself, with a module that only keeps the cubin in the place of the driver's."""
    require("cupy")
    from cupy.cuda import compiler

    loaded: list[bytes] = []
    module = SimpleNamespace(load=loaded.append, _set_mapping=lambda names: None)
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler, "function", SimpleNamespace(Module=lambda: module))
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    text = source(bind("adamw"), np.dtype(np.float32)).text
    compiler._compile_module_with_cache(text, OURS, arch="90")
    assert [cubin.rstrip(b"\0") for cubin in loaded] == [compiled(text, 90)[1].rstrip(b"\0")]
