"""Read a rule's source once; print it as CUDA C++, as a Numba loop and as NumPy ufunc calls.

The grammar is the intersection of Python and C++ (see `_rules`): whatever stands outside it is refused with the line
that is wrong. Every backend runs each assignment's own text in its own order, which is why the bits agree.

`main` prints kernels/rules.cuh anew, or with ``--check`` only says whether it is stale.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from fused_adam import _rules

INTRINSICS = {"sqrt": 1, "absolute": 1, "sign": 1, "maximum": 2, "minimum": 2}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}
# Names that mean something else in the printed C++ or in a NumPy kernel.
_RESERVED = frozenset(
    """
    T add subtract multiply divide equal greater less copyto putmask range alignas alignof and_eq asm auto bitand
    bitor bool case catch char char8_t char16_t char32_t co_await co_return co_yield compl concept const
    const_cast consteval constexpr constinit decltype default delete do double dynamic_cast enum explicit
    export extern false float friend goto inline int long mutable namespace new noexcept not_eq nullptr
    operator or_eq private protected public register reinterpret_cast requires short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true typedef typeid typename
    union unsigned using virtual void volatile wchar_t xor xor_eq
    """.split()
)


@dataclass(frozen=True, eq=False)
class Assignment:
    target: str
    value: ast.expr
    text: str


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `bind` gives one object for one rule
class Rule:
    """A rule, or preludes followed by a rule, taken apart. outputs: the returned names, in order."""

    name: str
    doc: str
    file: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    assignments: tuple[Assignment, ...]
    preludes: tuple[Rule, ...] = ()
    base: Rule | None = None  # the rule behind the preludes
    zeroes: bool = False  # whether the gradient is zeroed in the same pass
    counts: bool = False  # whether elements of p that a gradient other than 0 leaves as they are are counted

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The functions of rules.cuh that make it up, in order."""
        return (*self.preludes, self.base or self)

    @cached_property
    def states(self) -> tuple[str, ...]:
        return tuple(n for n in self.outputs if n not in ("p", "g"))

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        return tuple(n for n in self.arguments if n not in ("p", "g", *self.states))


def parse(f: Callable[..., Any]) -> Rule:
    """Take a rule apart. Raises ValueError, with the offending text, for anything outside the grammar."""
    name = getattr(f, "__name__", repr(f))
    if not inspect.isfunction(f):
        raise TypeError(f"a rule is a plain function, got {f!r}")
    try:
        source = textwrap.dedent(inspect.getsource(f))
        definition = ast.parse(source).body[0]
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"rule {name!r}: its source cannot be read; define it with def in a file or notebook"
        ) from error
    if name in _RESERVED or name in INTRINSICS:
        raise ValueError(f"a rule cannot be called {name!r}; choose another name")
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"rule {name!r}: write it with def, not as a lambda")

    def refuse(node: ast.AST, why: str) -> ValueError:
        return ValueError(f"rule {name!r}: {why}: {ast.get_source_segment(source, node)}")

    arguments = definition.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
        raise ValueError(f"rule {name!r}: only plain arguments without defaults are allowed")
    names = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args))
    for n in names:
        if n.startswith("_") or n in _RESERVED or n in INTRINSICS:
            raise ValueError(f"rule {name!r}: an argument cannot be called {n!r}; choose another name")

    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    if not body or not isinstance(body[-1], ast.Return) or body[-1].value is None:
        raise ValueError(f"rule {name!r}: the last line should return p and the states, as in: return p, m, v")
    result = body[-1].value
    elements = result.elts if isinstance(result, ast.Tuple) else [result]
    returned = tuple(e.id for e in elements if isinstance(e, ast.Name))
    if len(returned) != len(elements) or len(set(returned)) != len(returned) or not set(returned) <= set(names):
        raise refuse(result, "only arguments may be returned, each once and by name")

    known = set(names)
    assignments = []
    for statement in body[:-1]:
        if (
            not isinstance(statement, ast.Assign)
            or len(statement.targets) != 1
            or not isinstance(statement.targets[0], ast.Name)
        ):
            raise refuse(statement, "only assignments to one name are allowed")
        target = statement.targets[0].id
        if target.startswith("_") or target in _RESERVED or target in INTRINSICS:
            raise refuse(statement, f"a name cannot be called {target!r}")
        if isinstance(statement.value, ast.Name):
            raise refuse(statement, "a bare copy is not allowed")
        for node in _nodes(statement.value):
            if isinstance(node, ast.Name):
                if node.id not in known:
                    raise refuse(statement, f"{node.id!r} is not an argument and was not assigned before")
            elif isinstance(node, ast.Call):
                intrinsic = node.func.id if isinstance(node.func, ast.Name) else ""
                if INTRINSICS.get(intrinsic) != len(node.args) or node.keywords:
                    raise refuse(node, f"only {', '.join(INTRINSICS)} may be called")
            elif isinstance(node, ast.Constant):
                raise refuse(statement, "a literal is not allowed; make it a coefficient, whose type is then right")
            elif not (isinstance(node, ast.BinOp) and type(node.op) in OPERATORS):
                raise refuse(node, "only names, + - * / and intrinsics are allowed")
        known.add(target)
        text = ast.get_source_segment(source, statement) or ""
        if "#" in text or "\\" in text:  # a comment or continued line would swallow what follows once on one line
            text = ast.unparse(statement)
        text = " ".join(text.split())
        assignments.append(Assignment(target, statement.value, text))

    return Rule(
        name=name,
        doc=(ast.get_docstring(definition) or "").split("\n\n")[0],
        file=inspect.getsourcefile(f) or "",
        arguments=names,
        outputs=returned,
        assignments=tuple(assignments),
    )


def _nodes(expression: ast.expr) -> Iterator[ast.expr]:
    """The expression and all below it, without the names of the intrinsics called."""
    yield expression
    if isinstance(expression, ast.BinOp):
        yield from _nodes(expression.left)
        yield from _nodes(expression.right)
    elif isinstance(expression, ast.Call):
        for argument in expression.args:
            yield from _nodes(argument)


@cache
def bind(name: str, preludes: tuple[str, ...] = ()) -> Rule:
    """A built-in rule behind its preludes: ``bind("adam", ("maximize", "l2"))``."""
    return behind(parse(_rules.RULES[name]), preludes)


@cache
def behind(rule: Rule, preludes: tuple[str, ...], zeroes: bool = False, counts: bool = False) -> Rule:
    """Any rule behind preludes, which run in this order and before those that it has."""
    for prelude in (parse(_rules.PRELUDES[n]) for n in reversed(preludes)):
        rule = replace(
            rule,
            name=f"{prelude.name}_{rule.name}",
            arguments=rule.arguments + prelude.coefficients,
            assignments=prelude.assignments + rule.assignments,
            preludes=(prelude, *rule.preludes),
            base=rule.base or rule,
        )
    if zeroes or counts:
        name = f"{'zeroing_' * zeroes}{'counting_' * counts}{rule.name}"
        rule = replace(rule, name=name, base=rule.base or rule, zeroes=zeroes, counts=counts)
    return rule


# --- CUDA C++ ---------------------------------------------------------------------------------------------------------


def cuda(rule: str | Rule) -> str:
    """A rule (or prelude) as a CUDA C++ device function. Raises KeyError for an unknown name."""
    if isinstance(rule, str):
        rule = parse({**_rules.RULES, **_rules.PRELUDES}[rule])
    written = {a.target for a in rule.assignments}
    arguments = ", ".join(f"T& {n}" if n in written else f"T {n}" for n in rule.arguments)
    lines = []
    known = set(rule.arguments)
    for a in rule.assignments:
        lines.append(f"    {'' if a.target in known else 'T '}{a.text};")
        known.add(a.target)
    comment = "\n".join(f"// {line}" for line in rule.doc.splitlines())
    head = f"template <class T>\n__device__ __forceinline__ void {rule.name}({arguments}) {{"
    return "\n".join(filter(None, [comment, head, *lines, "}"])) + "\n"


def rules_header() -> str:
    """The text of kernels/rules.cuh."""
    head = """\
// Generated from fused_adam/_rules.py by `make kernels`: edit the rules there.
//
// One device function per update rule, over the number type T of step.cuh, whose operators and intrinsics round as IEEE
// asks for whatever the compiler's options are. The preludes change g and stand before a rule.
"""
    return "\n".join([head, *(cuda(n) for n in (*_rules.PRELUDES, *_rules.RULES))])


# --- Numba ------------------------------------------------------------------------------------------------------------


def numba_source(rule: Rule) -> str:
    """A loop over n elements; row holds the addresses of p, g and the states, c the coefficients as float64.

    A rule that counts finds behind them that of an int64 for each chunk. A rule's names do not begin with "_", so that
    __n is state n's array and _n the loop's own.
    """
    arrays = ("p", "g", *rule.states)
    lines = ["def kernel(_row, _lo, _n, _c):"]
    lines += [f"    __{a} = _view(_row[{k}], _lo, _n, _T)" for k, a in enumerate(arrays)]
    lines += [f"    {c} = _T(_c[{k}])" for k, c in enumerate(rule.coefficients)]
    lines += ["    _unmoved = 0"] * rule.counts
    lines += ["    for _i in range(_n):"]
    lines += [f"        {a} = __{a}[_i]" for a in arrays]
    lines += ["        _p, _g = p, g"] * rule.counts
    lines += [f"        {a.text}" for a in rule.assignments]
    lines += [f"        __{a}[_i] = {a}" for a in rule.outputs]
    lines += ["        __g[_i] = _T(0)"] * rule.zeroes
    lines += ["        _unmoved += (p == _p) & (_g != 0)"] * rule.counts
    lines += [f"    _view(_row[{len(arrays)}], _lo // _CHUNK, 1, _I64)[0] = _unmoved"] * rule.counts
    return "\n".join(lines) + "\n"


# --- NumPy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumpyKernel:
    """source defines kernel(p, g, *states, *coefficients, *rows, mask, zero): scratch rows, a boolean row, a 0-d 0."""

    source: str
    rows: int


def numpy_kernel(rule: Rule) -> NumpyKernel:
    """Straight-line ufunc calls with ``out=``: no temporaries are made, and only outputs are written."""
    lowering = _Lowering(rule)
    rows = [f"_r{k}" for k in range(lowering.rows)]
    arguments = ["p", "g", *rule.states, *rule.coefficients, *rows, "_mask", "_zero"]
    lines = [f"def kernel({', '.join(arguments)}):", *(f"    {line}" for line in lowering.lines)]
    return NumpyKernel("\n".join(lines) + "\n", lowering.rows)


class _Lowering:
    """Assigns scratch rows to the inner nodes of each expression; a row is reused as soon as its value is consumed."""

    def __init__(self, rule: Rule) -> None:
        self.lines: list[str] = []
        self.rows = 0
        self._free: list[str] = []
        self._where = {n: n for n in rule.arguments}  # where the current value of a name lives
        for a in rule.assignments:
            if a.target in rule.outputs:
                self._emit(a.value, a.target)
            else:  # a local, or g behind a prelude: the caller's array must not be written
                before = self._where.get(a.target, "")
                self._where[a.target] = self._emit(a.value, self._row())
                self._release(before)

    def _row(self) -> str:
        if not self._free:
            self._free.append(f"_r{self.rows}")
            self.rows += 1
        return self._free.pop()

    def _release(self, operand: str) -> None:
        if operand.startswith("_r") and operand not in self._where.values():
            self._free.append(operand)

    def _emit(self, node: ast.expr, out: str | None = None) -> str:
        """Append the calls that compute `node`, into `out` if given; returns where the value is."""
        if isinstance(node, ast.Name):
            return self._where[node.id]
        if isinstance(node, ast.BinOp):
            function = OPERATORS[type(node.op)]
            operands = [self._emit(node.left), self._emit(node.right)]
        else:
            assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            function = node.func.id
            operands = [self._emit(a) for a in node.args]
        if function in ("maximum", "minimum"):
            return self._extremum(function, operands, out)
        if function == "sign":
            return self._sign(operands[0], out)
        for operand in operands:
            self._release(operand)
        result = out or self._row()
        self.lines.append(f"{function}({', '.join(operands)}, {result})")
        return result

    # copyto with where= and any reduction allocate, which could fail in mid-step: plain ufuncs and putmask do not.

    def _sign(self, operand: str, out: str | None) -> str:
        """As in Numba, (x > 0) - (x < 0): NumPy's own sign(NaN) is NaN where ours is 0, and it is slower."""
        positive, result = self._row(), out if out is not None and out != operand else self._row()
        self.lines += [
            f"greater({operand}, _zero, _mask)",
            f"copyto({positive}, _mask)",
            f"less({operand}, _zero, _mask)",
            f"copyto({result}, _mask)",
            f"subtract({positive}, {result}, {out or result})",
        ]
        self._release(operand)
        self._release(positive)
        if out is not None and out != result:
            self._release(result)
        return out or result

    def _extremum(self, function: str, operands: list[str], out: str | None) -> str:
        """NumPy's result for -0 against +0 depends on the position; ours is b whenever a == b."""
        a, b = operands
        result = out if out is not None and out != b else self._row()
        self.lines += [
            f"{function}({a}, {b}, out={result})",
            f"equal({result}, {b}, _mask)",
            f"putmask({result}, _mask, {b})",
        ]
        self._release(a)
        self._release(b)
        if out is not None and out != result:
            self.lines.append(f"copyto({out}, {result})")
            self._release(result)
            return out
        return result


def main(argv: list[str]) -> int:
    from pathlib import Path

    path = Path(__file__).parents[1] / "kernels" / "rules.cuh"
    text = rules_header()
    if argv == ["--check"]:
        if path.read_text() != text:
            print(f"{path.name} is stale: run `make kernels`", file=sys.stderr)
            return 1
        return 0
    if argv:
        print("usage: [--check]", file=sys.stderr)
        return 2
    path.write_text(text)
    return 0
