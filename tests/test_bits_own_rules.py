"""A user's own rules have the same bits everywhere too: NumPy, Numba and the CUDA kernel, as for the built-in ones.

They reach what the built-in rules do not: every intrinsic on every pair of special values, locals, an assigned g, and
expressions that need many scratch rows at once.
"""

# Rules are source text; sqrt and the like are names of their own grammar.
# ruff: noqa: F821

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, assert_arrays, copies, inputs, run, specials
from conftest import require
from host_kernel import HostKernel

import fused_adam
from fused_adam._codegen import Rule, parse


def intrinsics(p, g, a, b, c, d, e):
    a = maximum(p, g)
    b = minimum(p, g)
    c = sign(p)
    d = absolute(p)
    e = sqrt(p)
    p = maximum(g, p) + minimum(g, p)
    return p, a, b, c, d, e


def in_place(p, g, a, b):
    """Intrinsics whose result takes the place of one operand or the other."""
    a = maximum(a, g)
    a = minimum(g, a)
    b = minimum(b, maximum(g, b))
    p = sign(p) * absolute(maximum(p, p))
    return p, a, b


def assert_same_everywhere(rule: Rule, values: list[float], given: list[Any]) -> list[Any]:
    require("numba")
    results = {name: copies(given) for name in ("numpy", "numba", "c++")}
    run("numpy", rule, values, results["numpy"])
    run("numba", rule, values, results["numba"])
    HostKernel(rule, given[0].dtype).alone(values, results["c++"])
    p, _, *states = results["numpy"]
    for name, result in results.items():
        assert_arrays(rule, result, [p, given[1], *states], name)  # g is as it was, for NumPy too
    return results["numpy"]


def _maximum(x: float, y: float) -> float:
    return x if x > y or x != x else y


@pytest.mark.parametrize("dtype", DTYPES)
def test_intrinsics(dtype: Any) -> None:
    """All pairs of special values, in a vector loop's places and its tail's, and what DESIGN.md says they give."""
    rules = [parse(f) for f in (intrinsics, in_place)]
    x, y = (z.ravel() for z in np.meshgrid(specials(dtype), specials(dtype)))
    for rule in rules:
        for shift in range(9):
            given = [np.roll(x, shift), np.roll(y, shift), *(np.roll(x, 7 * k) for k in range(len(rule.states)))]
            result = assert_same_everywhere(rule, [], given)
            if rule.name == "intrinsics":
                _, _, larger, smaller, sign, _, root = result
                pairs = list(zip(given[0].tolist(), given[1].tolist(), strict=True))
                expected = [_maximum(u, v) for u, v in pairs], [-_maximum(-u, -v) for u, v in pairs]
                for ours, theirs in zip((larger, smaller), expected, strict=True):
                    assert np.array_equal(ours, np.array(theirs, dtype), equal_nan=True)
                    zeros = ours == 0
                    assert np.array_equal(np.signbit(ours[zeros]), np.signbit(np.array(theirs)[zeros]))
                assert sign.tolist() == [(u > 0) - (u < 0) for u, _ in pairs] and not np.signbit(sign[sign == 0]).any()
                exact = [math.sqrt(u) if u >= 0 else math.nan for u, _ in pairs]
                assert np.array_equal(root, np.array(exact, dtype), equal_nan=True)


# --- rules at random --------------------------------------------------------------------------------------------------


def _expression(rng: np.random.Generator, names: list[str], depth: int) -> str:
    if depth == 0:
        return str(rng.choice(names))
    kind = rng.choice(["+", "-", "*", "/", "sqrt", "absolute", "sign", "maximum", "minimum"])
    first = _expression(rng, names, depth - 1)
    second = _expression(rng, names, int(rng.integers(0, depth)))
    if kind == "sqrt":
        return f"sqrt(absolute({first}))"
    if kind in ("absolute", "sign"):
        return f"{kind}({first})"
    if kind in ("maximum", "minimum"):
        return f"{kind}({second}, {first})"
    return f"({first} {kind} {second})"


def _text(rng: np.random.Generator, name: str) -> str:
    """A rule that assigns locals, states, p and g in any order, some of them twice."""
    known = ["p", "g", "m", "v", "c1", "c2"]
    lines = []
    for target in rng.permutation(["p", "m", "v", "g", "x", "y", "m", "x", "p"]):
        lines.append(f"    {target} = {_expression(rng, known, int(rng.integers(1, 5)))}")
        known = sorted({*known, target})
    return "\n".join([f"def {name}(p, g, m, v, c1, c2):", *lines, "    return p, m, v\n"])


def test_rules_at_random(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"random_{k}" for k in range(8)]
    source = tmp_path / "random_rules.py"
    source.write_text("\n\n".join(_text(rng, name) for name in names))
    spec = importlib.util.spec_from_file_location("random_rules", source)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    rules = [parse(getattr(module, name)) for name in names]
    for k, rule in enumerate(rules):
        dtype = DTYPES[k % 2]
        given = inputs(rule, dtype, 3001, share=0.05)
        result = assert_same_everywhere(rule, [0.1, 1e-3], given)
        finite = np.mean([np.isfinite(result[j]).mean() for j in (0, 2, 3)])
        assert finite > 0.3, f"{rule.name} tells nothing: {finite:.0%} of its results are finite"


def crowded(p, g, n, i, lo, c, row, view, kernel):
    """Every name is one that the loop around a rule uses too."""
    n = n + c * g
    i = n - row * i
    lo = view * i + kernel * lo
    p = p - c * lo
    return p, n, i, lo


def test_names_of_the_loops_own() -> None:
    rule = parse(crowded)
    assert_same_everywhere(rule, [0.1, 0.2, 0.3, 0.4], inputs(rule, np.float32, 1000, share=0.05))


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_of_own_rule(dtype: Any, backend: str) -> None:
    """`fused_adam.rule` runs the text it was given."""
    signed = fused_adam.rule(in_place)
    p, g = (np.array(x, dtype) for x in ([1.0, -2.0, 0.0, 3.0], [0.5, -1.0, 2.0, -4.0]))
    optimizer = signed(p, backend=backend)
    optimizer.step(g)
    state = optimizer.state_dict()["state"][0]
    assert p.tolist() == [1, -2, 0, 3]
    assert state["a"].tolist() == [0.5, -1, 2, -4]  # min(g, max(0, g))
    assert state["b"].tolist() == [0, 0, 0, 0]  # min(0, max(g, 0))
