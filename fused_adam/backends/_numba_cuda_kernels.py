"""The kernel of kernels/step.cu in Numba CUDA: the same chunks, the same accesses, the same instructions.

Numba contracts a * b + c to an FMA and has no switch for it, so a rule is printed as calls of intrinsics, each of which
emits the PTX that step.cuh emits for the operator. The loop around it is printed too: Numba cannot unroll one over a
rule's arrays.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from fused_adam._codegen import OPERATORS, Rule
from fused_adam.backends import _cuda_source
from fused_adam.backends._cuda_source import THREADS, NormSource, Source
from fused_adam.backends._numba_kernels import cached

# Four blocks on a multiprocessor, as in step.cu. They fit because Numba optimizes when it links, where it finds
# nvJitLink: else the slow path of a division is a call, which makes the kernel spill.
OPTIONS: dict[str, Any] = {"launch_bounds": (THREADS, 4)}

# --- What the names in the printed source mean on a device ------------------------------------------------------------

# {t} is f32 or f64. Of two equal numbers an extremum is the second, and a NaN from either side survives.
_OPERATIONS = {
    "add": "add.rn.{t} $0, $1, $2;",
    "subtract": "sub.rn.{t} $0, $1, $2;",
    "multiply": "mul.rn.{t} $0, $1, $2;",
    "divide": "div.rn.{t} $0, $1, $2;",
    "sqrt": "sqrt.rn.{t} $0, $1;",
    "absolute": "abs.{t} $0, $1;",
    "maximum": "{{ .reg .pred q, r; setp.gt.{t} q, $1, $2; setp.neu.{t} r, $1, $1; or.pred q, q, r;"
    " selp.{t} $0, $1, $2, q; }}",
    "minimum": "{{ .reg .pred q, r; setp.gt.{t} q, $2, $1; setp.neu.{t} r, $1, $1; or.pred q, q, r;"
    " selp.{t} $0, $1, $2, q; }}",
    "sign": "{{ .reg .pred q; .reg .{t} x; setp.gt.{t} q, $1, 0.0; selp.{t} x, 1.0, 0.0, q;"
    " setp.gt.{t} q, 0.0, $1; selp.{t} $0, -1.0, x, q; }}",
}


def _flat(t: Any) -> list[Any]:
    """The types of the registers that hold a type."""
    if isinstance(t, types.UniTuple):
        return [t.dtype] * t.count
    return [] if t == types.void else [t]


def asm(text: str, result: Any, *operands: Any, memory: bool = False) -> Any:
    """A function of one or two operands that is inline PTX. memory: it must stay in its place among others of these."""
    letters = {types.float32: "f", types.float64: "d", types.int64: "l"}
    outputs, inputs = _flat(result), [t for operand in operands for t in _flat(operand)]
    constraints = ",".join([f"={letters[t]}" for t in outputs] + [letters[t] for t in inputs])

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values: list[Any] = []
        for operand, value in zip(operands, arguments, strict=True):
            values += cgutils.unpack_tuple(builder, value) if isinstance(operand, types.UniTuple) else [value]
        kinds = [context.get_value_type(t) for t in outputs]
        kind = ir.VoidType() if not kinds else kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
        function = ir.FunctionType(kind, [v.type for v in values])
        out = builder.call(ir.InlineAsm(function, text, constraints, side_effect=memory), values)
        if not kinds:
            return context.get_dummy_value()
        if isinstance(result, types.UniTuple):
            parts = [out] if len(kinds) == 1 else [builder.extract_value(out, k) for k in range(len(kinds))]
            return cgutils.pack_array(builder, parts)
        return out

    signature = result(*operands)
    if len(operands) == 1:
        return intrinsic(lambda _, a: (signature, emit))
    return intrinsic(lambda _, a, b: (signature, emit))


def _registers(first: int, n: int) -> str:
    operands = ", ".join(f"${k}" for k in range(first, first + n))
    return operands if n == 1 else f"{{{operands}}}"


@cache
def on_device(dtype: np.dtype[Any]) -> dict[str, Any]:
    """The names for `define`."""
    number, t = {4: (types.float32, "f32"), 8: (types.float64, "f64")}[dtype.itemsize]
    names = {}
    for name, text in _OPERATIONS.items():
        names[name] = asm(text.format(t=t), number, *[number] * (2 if "$2" in text else 1))
    for n in (1, 16 // dtype.itemsize):
        wide, numbers = f".v{n}.{t}" if n > 1 else f".{t}", types.UniTuple(number, n)
        # What is read or written `once` is not needed before the next step: its cache lines are the first to go.
        for suffix, hint in (("", ""), ("_once", ".cs")):
            load = f"ld.global{hint}{wide} {_registers(0, n)}, [${n}];"
            store = f"st.global{hint}{wide} [$0], {_registers(1, n)};"
            names[f"_load{n}{suffix}"] = asm(load, numbers, types.int64, memory=True)
            names[f"_store{n}{suffix}"] = asm(store, types.void, types.int64, numbers, memory=True)
    names["_number"] = dtype.type
    for t in ("int32", "int64"):
        names[f"_{t}"] = asm(f"ld.global.s{t[3:]} $0, [$1];", types.int64, types.int64, memory=True)
    return names


# --- The printed source -----------------------------------------------------------------------------------------------
#
# A rule's names do not begin with "_": __m is the address of state m, _10_m element 0 of a batch's access 1 to it, and
# what begins with "_" and a letter belongs to the loop.


def printed(node: ast.expr) -> str:
    """An expression as calls, in its own order: add(m, multiply(c1, g))."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp):
        return f"{OPERATORS[type(node.op)]}({printed(node.left)}, {printed(node.right)})"
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return f"{node.func.id}({', '.join(printed(a) for a in node.args)})"


def fields(struct: np.dtype[Any], at: str) -> dict[str, str]:
    """Where the members of a struct are, as expressions."""
    return {name: f"{at} + {field[1]}" for name, field in struct.fields.items()}  # type: ignore[union-attr]


def find(made: Source | NormSource) -> list[str]:
    """Sets _segment, the address of that of this block of threads, and _gradient, where that of its gradient is."""
    a = fields(made.arguments, "_a")
    return [
        f"    _segment, _gradient = {a['segment']}, {a['gradient']}",
        f"    if _int64({a['segments']}) != 0:",
        f"        _k = _int32(_int64({a['segment_of_chunk']}) + 4 * _cuda.blockIdx.x)",
        f"        _segment = _int64({a['segments']}) + {made.segment.itemsize} * _k",
        f"        _gradient = _int64({a['gradients']}) + 8 * _k",
    ]


def _pass(rule: Rule, size: int, n: int, unroll: int, end: str, before: list[str]) -> Iterator[str]:
    """Up to the address `end` of p, `unroll` accesses of n elements at a time; `before` stands before each element.

    All loads of a batch stand before its first store.
    """
    arrays = ("p", "g", *rule.states)

    def access(what: str, u: int, name: str) -> str:
        return f"{what}{n}{'' if name == 'p' else '_once'}(__{name}{f' + {u} * _stride' if u else ''}"

    def held(u: int, name: str) -> str:
        return "".join(f"_{u}{j}_{name}, " for j in range(n))

    def indented(u: int, lines: list[str]) -> list[str]:
        if not u:
            return [f"        {line}" for line in lines]
        return [f"        if __p + {u} * _stride < {end}:", *(f"            {line}" for line in lines)]

    yield f"    _stride = {n * size} * _cuda.blockDim.x"
    yield f"    while __p < {end}:"
    for u in range(unroll):
        yield from indented(u, [f"{held(u, a)}= {access('_load', u, a)})" for a in arrays])
    for u in range(unroll):
        lines = []
        for j in range(n):
            lines += [f"{a} = _{u}{j}_{a}" for a in arrays]
            lines += [*before, *(f"{a.target} = {printed(a.value)}" for a in rule.assignments)]
            lines += [f"_{u}{j}_{a} = {a}" for a in rule.outputs]
        stores = [f"{access('_store', u, a)}, ({held(u, a)}))" for a in rule.outputs]
        if rule.zeroes:
            stores.insert(1, f"{access('_store', u, 'g')}, ({'_zero, ' * n}))")
        yield from indented(u, [*lines, *stores])
    yield from (f"        __{a} += {unroll} * _stride" for a in arrays)


def source(rule: Rule, dtype: np.dtype[Any]) -> str:
    """kernel(_a) for the address of the arguments of `_cuda_source`. Lengths are in bytes, all integers of 64 bits."""
    assert not rule.counts, "whoever wants to count takes another backend"
    size = dtype.itemsize
    wide, unroll = 16 // size, 8 // size  # float64 would spill with 2 accesses a batch
    arrays = ("p", "g", *rule.states)
    made = _cuda_source.source(rule, dtype)
    a, s = fields(made.arguments, "_a"), fields(made.segment, "_segment")
    row = made.arguments["coefficients"].shape[1] * size
    coefficients = [f"{name}, = _load1(_c + {k * size})" for k, name in enumerate(rule.coefficients)]
    # Doubles would hold so many registers through the loop that it would spill: each element reads them from the cache.
    once, each = (coefficients, []) if size == 4 else ([], coefficients)
    lines = [
        "def kernel(_a):",
        *find(made),
        f"    __p, __g = _int64({s['p']}), _int64(_gradient)",
        *(f"    __{name} = _int64({s['states']} + {8 * k})" for k, name in enumerate(rule.states)),
        f"    _c = {a['coefficients']} + {row} * _int64({s['group']})",
        *(f"    {line}" for line in once),
        *["    _zero = _number(0)"] * rule.zeroes,
        f"    _chunk = {size} * _int64({a['chunk']})",
        f"    _lo = (_cuda.blockIdx.x - _int64({s['first']})) * _chunk",
        f"    _hi = {size} * _int64({s['n']})",
        "    if _hi > _lo + _chunk:",
        "        _hi = _lo + _chunk",
        "    _middle = _lo",
        f"    if ({' | '.join(f'__{name}' for name in arrays)}) & 15 == 0:",
        "        _middle = _hi & -16",
        "    _end, _middle = __p + _hi, __p + _middle",
        *(f"    __{name} += _lo + 16 * _cuda.threadIdx.x" for name in arrays),
        *_pass(rule, size, wide, unroll, "_middle", each),
        f"    _on = _middle + {size} * _cuda.threadIdx.x - __p",
        *(f"    __{name} += _on" for name in arrays),
        *_pass(rule, size, 1, 2 * unroll, "_end", each),
    ]
    return "\n".join(lines) + "\n"


# --- The kernel -------------------------------------------------------------------------------------------------------

_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def define(text: str, file: str, name: str, names: dict[str, Any]) -> Callable[[int], None]:
    """A printed kernel over `names`: `on_device`, or the tests' stand-ins for Numba's simulator.

    file: of what it is printed from. name: its own.
    """
    scope = {"__name__": __name__, "_cuda": cuda, **names}  # Numba imports a cached function's module
    # Under a file's name, or Numba would find no place for its disk cache; the hash in the function's name keeps a
    # changed rule, loop or dtype from finding an old entry.
    exec(compile(text, file, "exec"), scope)
    function: Callable[[int], None] = scope["kernel"]
    digest = hashlib.sha256(f"{text}{name}{_HASH}".encode()).hexdigest()[:12]
    function.__name__ = function.__qualname__ = f"{name}_{digest}"
    return function


@cache
def kernel(rule: Rule, dtype: np.dtype[Any]) -> Any:
    """Launched as ``kernel(rule, dtype)[blocks, THREADS, stream](address)``; compiled on first use, or found on disk.

    address: of the arguments (see `_cuda_source.source`) in device memory.
    """
    function = define(source(rule, dtype), rule.file, f"{rule.name}_{dtype}", on_device(dtype))
    return cached(lambda cache, **_: cuda.jit(cache=cache, **OPTIONS)(function))
