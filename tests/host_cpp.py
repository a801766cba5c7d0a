"""The printed CUDA C++ of the rules, built for the host: the header's own text with a loop around it, under g++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bits import Variant
from conftest import missing

import fused_adam
from fused_adam._codegen import Rule, bind, cuda, parse
from fused_adam._rules import PRELUDES, RULES

NUMBERS = {np.dtype(np.float32): ("f32", "float"), np.dtype(np.float64): ("f64", "double")}
# No -ffast-math, and nothing contracted to an FMA: what the PTX operators of step.cuh do on a device.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused", "-Wno-unused-parameter")  # a rule may leave a name unused


def kernel_path(name: str) -> Path:
    """A file of kernels/, from inside the installed package or from the checkout."""
    package = Path(fused_adam.__file__).parent
    folders = (package / "kernels", package.parent / "kernels")
    return next(folder / name for folder in folders if (folder / name).is_file())


def _loop(rule: Rule, calls: Iterable[Rule], number: str, real: str) -> str:
    """extern "C" void <number>_<rule>(n, coefficients, p, g, states...), element after element."""
    arrays = ("p", "g", *rule.states)
    parameters = ", ".join(f"{real}* _{a}" for a in arrays)
    lines = [
        f'extern "C" void {number}_{rule.name}(long n, const double* _values, {parameters}) {{',
        "    for (long i = 0; i < n; ++i) {",
        *(f"        {number} {a} = {{_{a}[i]}};" for a in arrays),
        *(f"        const {number} {c} = {{({real})_values[{k}]}};" for k, c in enumerate(rule.coefficients)),
        *(f"        {f.name}({', '.join(f.arguments)});" for f in calls),
        *(f"        _{a}[i] = {a}.x;" for a in ("p", *rule.states)),
        "    }",
        "}",
    ]
    return "\n".join(lines)


def build(folder: Path, variants: Sequence[Variant] = (), own: Sequence[Rule] = ()) -> ctypes.CDLL:
    """One library of built-in rules behind preludes, from rules.cuh, and of own rules; float32 and float64."""
    compiler = shutil.which("g++")
    if compiler is None:
        missing("g++ is not installed")
    text = [f'#include "{kernel_path(name)}"' for name in ("step.cuh", "rules.cuh")]
    text += [cuda(rule) for rule in own]
    functions = {name: parse(f) for name, f in {**RULES, **PRELUDES}.items()}
    loops = [(bind(name, preludes), [functions[f] for f in (*preludes, name)]) for name, preludes in variants]
    loops += [(rule, [rule]) for rule in own]
    text += [_loop(*loop, *numbers) for loop in loops for numbers in NUMBERS.values()]
    source, library = folder / "rules.cpp", folder / "rules.so"
    source.write_text("\n".join([*text, ""]))
    subprocess.run([str(compiler), *FLAGS, *WARNINGS, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, rule: Rule, coefficients: list[float], arrays: list[Any]) -> None:
    """Step over 1-D arrays p, g and states, in place."""
    number, _ = NUMBERS[arrays[0].dtype]
    assert len(coefficients) == len(rule.coefficients) and len(arrays) == 2 + len(rule.states)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    c = (ctypes.c_double * len(coefficients))(*coefficients)
    getattr(library, f"{number}_{rule.name}")(ctypes.c_long(arrays[0].size), c, *pointers)
