"""The CUDA C++ of a rule's kernel, as one string without #include, and the NumPy type of its arguments."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _rules
from fused_adam._codegen import Rule, cuda

THREADS = 256  # of a block
MAX_GROUPS = 64
_ARGUMENT_BYTES = 4096  # what every device and driver passes to a kernel by value

_NUMBERS = {np.dtype(np.float32): ("float", "f32"), np.dtype(np.float64): ("double", "f64")}


class Source(NamedTuple):
    """text: of the translation unit. name: of its kernel. segment, arguments: the structs of step.cu as NumPy types.

    groups: how many groups' coefficients the arguments hold.
    """

    text: str
    name: str
    segment: np.dtype[Any]
    arguments: np.dtype[Any]
    groups: int


def folder() -> Path:
    """Where the kernels are: beside the modules of an installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(f for f in (package / "kernels", package.parent / "kernels") if (f / "step.cu").is_file())


@cache
def _text(name: str) -> str:
    return (folder() / name).read_text()


@cache
def source(rule: Rule, dtype: np.dtype[Any]) -> Source:
    """One kernel for one rule and type: what it is made of stands in kernels/, but for a rule of the user's own."""
    number, compute = _NUMBERS[dtype]
    name = f"{rule.name}_{compute}"
    coefficients = max(1, len(rule.coefficients))
    segment = np.dtype(
        [("n", "i8"), ("first", "i8"), ("group", "i8"), ("p", "i8"), ("states", "i8", (max(1, len(rule.states)),))]
    )
    head: list[tuple[Any, ...]] = [("segments", "i8"), ("gradients", "i8"), ("segment_of_chunk", "i8"), ("chunk", "i8")]
    head += [("segment", segment), ("gradient", "i8")]
    room = _ARGUMENT_BYTES - np.dtype(head).itemsize
    groups = min(MAX_GROUPS, room // (coefficients * dtype.itemsize))
    if groups < 1:
        raise ValueError(f"rule {rule.name!r} has {coefficients} coefficients, more than a CUDA kernel takes")
    arguments = np.dtype([*head, ("coefficients", dtype, (groups, coefficients))], align=True)

    where = {"p": "p", "g": "g"}
    where |= {n: f"states[{k}]" for k, n in enumerate(rule.states)}
    where |= {n: f"c[{k}]" for k, n in enumerate(rule.coefficients)}
    built_in = rule.file == _rules.__file__
    rules = (
        _text("rules.cuh") if built_in else f"namespace own {{  // may be called like anything here\n{cuda(rule)}}}\n"
    )
    scope = "" if built_in else "own::"
    calls = [f"    {scope}{part.name}({', '.join(where[n] for n in part.arguments)});" for part in rule.parts]
    glue = [
        f"typedef {number} Number;",
        f"typedef {compute} T;",
        f"constexpr int STATES = {len(rule.states)}, COEFFICIENTS = {coefficients}, GROUPS = {groups};",
        f"#define NAME {name}",
        "",
        "__device__ __forceinline__ void update(T& p, T g, T* states, const T* c) {",
        *calls,
        "}",
        "",
    ]
    sizes = f"sizeof(Segment) == {segment.itemsize} && sizeof(Arguments) == {arguments.itemsize}"
    asserted = f'static_assert({sizes}, "the host lays the arguments out differently");\n'
    text = "\n".join([_text("step.cuh"), rules, *glue, _text("step.cu"), asserted])
    return Source(text, name, segment, arguments, groups)
