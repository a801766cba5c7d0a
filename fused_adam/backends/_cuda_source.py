"""The CUDA C++ of a rule's kernels, each as one string without #include, and the NumPy types of its arguments."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _rules
from fused_adam._codegen import Rule, cuda

THREADS = 256  # of a block
MAX_GROUPS = 64
# What a Gathered of rows.cu points to in the memory that the step uploads.
ROW_TABLES = ("rows", "starts", "order", "met", "variant", "coefficients")
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


class RowsSource(NamedTuple):
    """As `Source`, of the kernel of rows.cu."""

    text: str
    name: str
    gathered: np.dtype[Any]
    arguments: np.dtype[Any]


def folder() -> Path:
    """Where the kernels are: beside the modules of an installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(f for f in (package / "kernels", package.parent / "kernels") if (f / "step.cu").is_file())


@cache
def _text(name: str) -> str:
    return (folder() / name).read_text()


def _unit(rule: Rule, dtype: np.dtype[Any], name: str, constants: str, shell: str, sizes: str) -> str:
    """What a kernel is made of stands in kernels/, but for a rule of the user's own."""
    number, compute = _NUMBERS[dtype]
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
        f"constexpr int STATES = {len(rule.states)}, COEFFICIENTS = {coefficients_of(rule)}{constants};",
        f"#define NAME {name}",
        "",
        "__device__ __forceinline__ void update(T& p, T g, T* states, const T* c) {",
        *calls,
        "}",
        "",
    ]
    asserted = f'static_assert({sizes}, "the host lays the arguments out differently");\n'
    return "\n".join([_text("step.cuh"), rules, *glue, _text(shell), asserted])


def coefficients_of(rule: Rule) -> int:
    """How many a kernel has room for; C++ has no empty arrays."""
    return max(1, len(rule.coefficients))


def _states(rule: Rule) -> tuple[str, str, tuple[int]]:
    return "states", "i8", (max(1, len(rule.states)),)


@cache
def source(rule: Rule, dtype: np.dtype[Any]) -> Source:
    """One kernel for one rule and type."""
    name = f"{rule.name}_{_NUMBERS[dtype][1]}"
    coefficients = coefficients_of(rule)
    segment = np.dtype([("n", "i8"), ("first", "i8"), ("group", "i8"), ("p", "i8"), _states(rule)])
    head: list[tuple[Any, ...]] = [("segments", "i8"), ("gradients", "i8"), ("segment_of_chunk", "i8"), ("chunk", "i8")]
    head += [("segment", segment), ("gradient", "i8")]
    room = _ARGUMENT_BYTES - np.dtype(head).itemsize
    groups = min(MAX_GROUPS, room // (coefficients * dtype.itemsize))
    if groups < 1:
        raise ValueError(f"rule {rule.name!r} has {coefficients} coefficients, more than a CUDA kernel takes")
    arguments = np.dtype([*head, ("coefficients", dtype, (groups, coefficients))], align=True)
    sizes = f"sizeof(Segment) == {segment.itemsize} && sizeof(Arguments) == {arguments.itemsize}"
    text = _unit(rule, dtype, name, f", GROUPS = {groups}", "step.cu", sizes)
    return Source(text, name, segment, arguments, groups)


@cache
def rows_source(rule: Rule, dtype: np.dtype[Any]) -> RowsSource:
    """The kernel that steps over rows."""
    name = f"{rule.name}_rows_{_NUMBERS[dtype][1]}"
    integers = [(field, "i8") for field in ("first", "count", "width", "each", "pieces", "p")]
    pointers = [(field, "i8") for field in ("values", *ROW_TABLES)]
    gathered = np.dtype([*integers, _states(rule), *pointers])
    arguments = np.dtype([("table", "i8"), ("of_block", "i8"), ("chunk", "i8")])
    sizes = f"sizeof(Gathered) == {gathered.itemsize} && sizeof(Arguments) == {arguments.itemsize}"
    return RowsSource(_unit(rule, dtype, name, "", "rows.cu", sizes), name, gathered, arguments)
