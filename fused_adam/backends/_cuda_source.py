"""The CUDA C++ of a rule's kernels, each as one string without #include, and the NumPy types of its arguments."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _coefficients, _rules
from fused_adam._codegen import Rule, cuda
from fused_adam._storage import Format

THREADS = 256  # of a block
MAX_GROUPS = 64
# What a Gathered of rows.cu points to in the memory that the step uploads.
ROW_TABLES = ("rows", "starts", "order", "met", "variant", "coefficients")
_ARGUMENT_BYTES = 4096  # what every device and driver passes to a kernel by value

_NUMBERS = {np.dtype(np.float32): ("float", "f32"), np.dtype(np.float64): ("double", "f64")}


# The structs of control.cuh and prologue.cu, and how many numbers these have room for.
FORMULAS = ("", *_coefficients.FORMULAS)  # in the order of coefficients.cuh; the first has constants only
MOST_ARGUMENTS, MOST_RESULTS, MOST_COEFFICIENTS = 6, 7, 24
UNSCALING, CLIPPING = -1, -2  # sources of a coefficient
COEFFICIENT_BYTES = 8 * MOST_COEFFICIENTS
CONTROL = np.dtype(
    [("t", "i8"), ("skipped", "i8"), ("skips", "i8"), ("norm", "f8"), ("factor", "f8"), ("unmoved", "i8")]
)
SCALAR = np.dtype([("kind", "i8"), ("at", "i8"), ("value", "f8")])
KINDS = {np.dtype(np.float32): 1, np.dtype(np.float64): 2, np.dtype(np.bool_): 3, np.dtype(np.uint8): 3}
GROUP = np.dtype(
    [
        ("formula", "i8"),
        ("arguments", "f8", (MOST_ARGUMENTS,)),
        ("wide", "i8"),
        ("count", "i8"),
        ("coefficients", "i8"),
        ("source", "i8", (MOST_COEFFICIENTS,)),
        ("constants", "f8", (MOST_COEFFICIENTS,)),
    ]
)
SUMS = 64 * 72  # int64 that norm.cu adds to


class Source(NamedTuple):
    """text: of the translation unit. name: of its kernel. segment, arguments: the structs of step.cu as NumPy types.

    groups: how many groups' coefficients the arguments hold, or may point to.
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


class NormSource(NamedTuple):
    """As `Source`, of the kernel of norm.cu."""

    text: str
    name: str
    segment: np.dtype[Any]
    arguments: np.dtype[Any]


class PrologueSource(NamedTuple):
    """As `Source`, of the kernel of prologue.cu."""

    text: str
    name: str
    arguments: np.dtype[Any]


Made = Source | RowsSource | NormSource | PrologueSource


def folder() -> Path:
    """Where the kernels are: beside the modules of an installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(f for f in (package / "kernels", package.parent / "kernels") if (f / "step.cu").is_file())


@cache
def _text(name: str) -> str:
    return (folder() / name).read_text()


def _unit(
    rule: Rule,
    dtype: np.dtype[Any],
    name: str,
    constants: str,
    shell: str,
    sizes: str,
    head: str = "",
    compute: str = "",
) -> str:
    """What a kernel is made of stands in kernels/, but for a rule of the user's own."""
    where = {"p": "p", "g": "g"}
    where |= {n: f"states[{k}]" for k, n in enumerate(rule.states)}
    where |= {n: f"c[{k}]" for k, n in enumerate(rule.coefficients)}
    rules, calls = [], []
    if any(part.file == _rules.__file__ for part in rule.parts):
        rules.append(_text("rules.cuh"))
    for part in rule.parts:
        built_in = part.file == _rules.__file__
        if not built_in:
            rules.append(f"namespace own {{  // may be called like anything here\n{cuda(part)}}}\n")
        arguments = ", ".join(where[n] for n in part.arguments)
        calls.append(f"    {'' if built_in else 'own::'}{part.name}({arguments});")
    flags = f"constexpr bool ZEROES = {str(rule.zeroes).lower()}, COUNTS = {str(rule.counts).lower()};"
    glue = [
        *_types(dtype, name, compute),
        f"constexpr int STATES = {len(rule.states)}, COEFFICIENTS = {coefficients_of(rule)}{constants};",
        *([flags] if shell == "step.cu" else []),
        "",
        "__device__ __forceinline__ void update(T& p, T g, T* states, const T* c) {",
        *calls,
        "}",
        "",
    ]
    return "\n".join([_text("step.cuh"), head, *rules, *glue, _text(shell), _asserted(sizes)])


def _types(dtype: np.dtype[Any], name: str, compute: str = "") -> list[str]:
    number, plain = _NUMBERS[dtype]
    return [f"typedef {number} Number;", f"typedef {compute or plain} T;", f"#define NAME {name}"]


def _asserted(sizes: str) -> str:
    return f'static_assert({sizes}, "the host lays the arguments out differently");\n'


def coefficients_of(rule: Rule) -> int:
    """How many a kernel has room for; C++ has no empty arrays."""
    return max(1, len(rule.coefficients))


def _states(rule: Rule) -> tuple[str, str, tuple[int]]:
    return "states", "i8", (max(1, len(rule.states)),)


@cache
def source(rule: Rule, dtype: np.dtype[Any], on_device: bool = False) -> Source:
    """One kernel for one rule and type. on_device: its coefficients are those that prologue.cu leaves in memory."""
    name = f"{rule.name}{'_on_device' * on_device}_{_NUMBERS[dtype][1]}"
    coefficients = coefficients_of(rule)
    segment = np.dtype([("n", "i8"), ("first", "i8"), ("group", "i8"), ("p", "i8"), _states(rule)])
    head: list[tuple[Any, ...]] = [("segments", "i8"), ("gradients", "i8"), ("segment_of_chunk", "i8"), ("chunk", "i8")]
    head += [("segment", segment), ("gradient", "i8")]
    groups = _groups(rule, np.dtype(head).itemsize, dtype)
    if on_device:
        groups = 2**31  # any number
        arguments = np.dtype([*head, ("control", "i8"), ("coefficients", "i8")])
        more = "#define ON_DEVICE\n" + _text("control.cuh")
    else:
        arguments = np.dtype([*head, ("coefficients", dtype, (groups, coefficients))], align=True)
        more = ""
    sizes = _sizes(segment, arguments, on_device)
    constants = "" if on_device else f", GROUPS = {groups}"
    text = _unit(rule, dtype, name, constants, "step.cu", sizes, more)
    return Source(text, name, segment, arguments, groups)


_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def stored_name(rule: Rule, form: Format, on_device: bool = False) -> str:
    """What the kernel of a rule and format is called."""
    kinds = [_SHORT.get(kind, kind) for kind in (form.p, form.g, form.states, form.master) if kind]
    flags = ["stochastic"] * form.stochastic_rounding + ["on_device"] * on_device
    return "_".join([rule.name, *kinds, *flags])


@cache
def stored_source(rule: Rule, form: Format, on_device: bool = False) -> Source:
    """As `source`, of the kernel of stored.cu for one rule and format."""
    dtype = np.dtype(np.float32)
    name, coefficients = stored_name(rule, form, on_device), coefficients_of(rule)
    pointers = [(field, "i8") for field in ("p", "master", "scales")]
    segment = np.dtype([(field, "i8") for field in ("n", "first", "group", "index")] + [*pointers, _states(rule)])
    head: list[tuple[Any, ...]] = [("segments", "i8"), ("gradients", "i8"), ("segment_of_chunk", "i8"), ("chunk", "i8")]
    head += [("segment", segment), ("gradient", "i8"), ("seed", "i8")]
    kinds = {"P": form.p, "G": form.g, "STATE": form.states, "MASTER": form.master or "none"}
    given = ", ".join(f"{what} = {kind.upper()}" for what, kind in kinds.items())
    flag = str(form.stochastic_rounding).lower()
    more = [_text("storage.cuh"), f"constexpr Kind {given};", f"constexpr bool STOCHASTIC = {flag};", ""]
    if on_device:
        groups, constants = 2**31, ""
        arguments = np.dtype([*head, ("control", "i8"), ("coefficients", "i8")])
        more = ["#define ON_DEVICE", _text("control.cuh"), *more]
    else:
        head.append(("t", "i8"))
        groups = _groups(rule, np.dtype(head).itemsize, dtype)
        constants = f", GROUPS = {groups}"
        arguments = np.dtype([*head, ("coefficients", dtype, (groups, coefficients))], align=True)
    sizes = _sizes(segment, arguments, on_device)
    compute = "Traced" if form.states == "int8" else ""  # for the root of v is wanted twice
    text = _unit(rule, dtype, name, constants, "stored.cu", sizes, "\n".join(more), compute)
    return Source(text, name, segment, arguments, groups)


def _groups(rule: Rule, before: int, dtype: np.dtype[Any]) -> int:
    """How many groups' coefficients fit behind so many bytes of arguments. Raises ValueError for none."""
    coefficients = coefficients_of(rule)
    groups = min(MAX_GROUPS, (_ARGUMENT_BYTES - before) // (coefficients * dtype.itemsize))
    if groups < 1:
        raise ValueError(f"rule {rule.name!r} has {coefficients} coefficients, more than a CUDA kernel takes")
    return groups


def _sizes(segment: np.dtype[Any], arguments: np.dtype[Any], on_device: bool) -> str:
    sizes = f"sizeof(Segment) == {segment.itemsize} && sizeof(Arguments) == {arguments.itemsize}"
    return sizes + f" && COEFFICIENT_BYTES == {COEFFICIENT_BYTES}" * on_device


@cache
def norm_source(dtype: np.dtype[Any]) -> NormSource:
    """The kernel that adds up the squares of all gradients of a type."""
    name = f"norm_{_NUMBERS[dtype][1]}"
    segment = np.dtype([("n", "i8"), ("first", "i8")])
    integers = [(field, "i8") for field in ("segments", "gradients", "segment_of_chunk", "chunk")]
    arguments = np.dtype([*integers, ("segment", segment), ("gradient", "i8"), ("scale", SCALAR), ("sums", "i8")])
    sizes = f"sizeof(Segment) == {segment.itemsize} && sizeof(Arguments) == {arguments.itemsize}"
    sizes += f" && COPIES * SET == {SUMS}"
    parts = [*map(_text, ("step.cuh", "control.cuh", "digits.cuh")), *_types(dtype, name), _text("norm.cu")]
    return NormSource("\n".join([*parts, _asserted(sizes)]), name, segment, arguments)


@cache
def prologue_source() -> PrologueSource:
    """The kernel of one block that goes before a step whose scalars are on the device."""
    integers = [(field, "i8") for field in ("control", "groups", "count", "narrow", "wide", "sums")]
    scalars = [("scale", SCALAR), ("found", SCALAR)]
    arguments = np.dtype([*integers, ("max_norm", "f8"), ("skip_nonfinite", "i8"), *scalars])
    sizes = f"sizeof(Control) == {CONTROL.itemsize} && sizeof(Group) == {GROUP.itemsize} && "
    sizes += f"sizeof(Arguments) == {arguments.itemsize} && COPIES * SET == {SUMS}"
    parts = [*map(_text, ("step.cuh", "control.cuh", "digits.cuh", "coefficients.cuh")), "#define NAME prologue"]
    return PrologueSource("\n".join([*parts, _text("prologue.cu"), _asserted(sizes)]), "prologue", arguments)


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
