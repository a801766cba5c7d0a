"""Hypothesis over the arguments: a call works as the plain one does, or refuses and writes nothing; nothing else.

At least 2,000 examples, the same in every run: a failure that only some runs see helps nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
from fuzz_cases import (
    BACKENDS,
    DTYPES,
    HYPERPARAMETERS,
    JUNK,
    REFUSALS,
    SHAPES,
    SMALL,
    SPECIAL,
    arrays,
    examples,
    mostly,
    outcome,
    plain,
    same,
)
from hypothesis import given
from hypothesis import strategies as st
from watch import adam_arrays

import fused_adam
from fused_adam._codegen import parse
from fused_adam._numbers import NUMERICS

# --- adam_step -------------------------------------------------------------------------------------------------------


@st.composite
def adam_calls(draw):
    shape, dtype = draw(SHAPES), draw(mostly(st.sampled_from([np.float32, np.float64]), DTYPES, 20))
    buffer = np.ones(100, np.float32)
    given = {}
    for name in ("p", "g", "m", "v", "max_v"):
        s = draw(mostly(st.just(shape), SHAPES, 20))
        d = draw(mostly(st.just(dtype), DTYPES, 20))
        given[name] = draw(mostly(arrays(s, d, buffer), JUNK, 100))
    if draw(st.booleans()):
        given["max_v"] = None
    numbers = {"step": draw(mostly(st.integers(1, 2**63 - 1)))}
    for name, good in (HYPERPARAMETERS | {"decoupled_weight_decay": st.booleans()}).items():
        if draw(st.booleans()):
            numbers[name] = draw(mostly(good, odds=20))
    if draw(st.integers(0, 30)) == 0:
        numbers[draw(st.text(max_size=8))] = draw(JUNK)
    return given, numbers, draw(mostly(st.sampled_from(BACKENDS), odds=30))


@given(adam_calls())
@examples(900)
def test_adam_step(example):
    arrays, numbers, backend = example
    copies = {k: plain(a) if isinstance(a, np.ndarray) else a for k, a in arrays.items()}
    if outcome(lambda: fused_adam.adam_step(**arrays, **numbers, backend=backend), arrays):
        fused_adam.adam_step(**copies, **numbers, backend="numpy")
        for name, a in arrays.items():
            assert a is None or same(np.asarray(a), copies[name]), name


def test_adam_step_examples_are_neither_all_right_nor_all_wrong():
    answers = []

    @given(adam_calls())
    @examples(100)
    def count(example):
        arrays, numbers, backend = example
        answers.append(outcome(lambda: fused_adam.adam_step(**arrays, **numbers, backend=backend), arrays))

    count()
    assert 0.1 < np.mean(answers) < 0.9


# --- optimizers ------------------------------------------------------------------------------------------------------

KEYS = st.one_of(st.text(max_size=3), st.integers(-1, 1), st.booleans(), st.none(), st.sampled_from(["params", (1, 2)]))


def trees(leaf):
    extend = lambda child: st.one_of(  # noqa: E731
        st.lists(child, max_size=3), st.dictionaries(KEYS, child, max_size=3), st.tuples(child, child)
    )
    return st.recursive(leaf, extend, max_leaves=5)


@st.composite
def leaf(draw):
    return draw(
        mostly(arrays(draw(SHAPES), draw(mostly(st.just(np.float32), DTYPES)), np.ones(100, np.float32)), odds=30)
    )


def like(tree, draw):
    """Gradients of the tree's structure, mostly."""
    if draw(st.integers(0, 40)) == 0:
        return draw(trees(leaf()))
    if isinstance(tree, fused_adam._layout.FlatBuffer):
        grads = tree.zeros_like()
        grads.data[:] = 0.5
        return draw(st.sampled_from([grads, grads.tree, tree]))
    if isinstance(tree, dict):
        return {k: like(v, draw) for k, v in tree.items() if draw(st.integers(0, 60))}
    if isinstance(tree, list | tuple):
        return [like(child, draw) for child in tree]
    if isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        g = draw(arrays(tree.shape, tree.dtype, np.ones(100, np.float32)))
        return tree if draw(st.integers(0, 60)) == 0 else g
    return draw(JUNK)


CLASSES = [fused_adam.SGD, fused_adam.Adagrad, fused_adam.RMSprop, fused_adam.Adam, fused_adam.AdamW, fused_adam.Lion]
OWN = {
    "momentum": SMALL,
    "dampening": SMALL,
    "alpha": SMALL,
    "lr_decay": SMALL,
    "initial_accumulator_value": SMALL,
    "nesterov": st.booleans(),
    "centered": st.booleans(),
    "amsgrad": st.booleans(),
    "numerics": st.sampled_from(NUMERICS),
    "eps_root": st.sampled_from([0.0, 1e-3]),
}


@st.composite
def hyperparameters(draw, cls):
    accepted = cls.__init__.__annotations__
    names = [n for n in {**HYPERPARAMETERS, **OWN} if n in accepted]
    chosen = {n: draw(mostly({**HYPERPARAMETERS, **OWN}[n], odds=30)) for n in names if draw(st.integers(0, 2)) == 0}
    if draw(st.integers(0, 40)) == 0:
        chosen[draw(st.sampled_from(["lr", "params", "foo", "backend", "self", "t"]))] = draw(JUNK)
    return chosen


@st.composite
def optimizers(draw):
    cls = draw(st.sampled_from(CLASSES))
    params = draw(trees(leaf()))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        params = [{"params": params, **draw(hyperparameters(cls))}, {"params": draw(trees(leaf()))}]
    if kind == 1:
        try:
            params = fused_adam.flatten(params)
        except (TypeError, ValueError):
            params = [np.ones(3, np.float32)]
    return cls, params, draw(hyperparameters(cls)), draw(mostly(st.sampled_from(BACKENDS), odds=30))


def contents(params):
    return params.data if isinstance(params, fused_adam._layout.FlatBuffer) else params


@given(optimizers(), st.data())
@examples(700)
def test_constructors_and_step(example, data):
    cls, params, hyper, backend = example
    box = []
    if not outcome(lambda: box.append(cls(params, **{"backend": backend, **hyper})), contents(params)):
        return
    opt = box[0]
    groups = isinstance(params, list) and len(opt.param_groups) > 1
    tree = [group["params"] for group in opt.param_groups] if groups else opt.param_groups[0]["params"]
    twin = copy.deepcopy(opt)
    twin_tree = [group["params"] for group in twin.param_groups]
    for _ in range(2):
        grads = like(tree, data.draw)
        safe = duplicate(grads)
        things = (opt, contents(params), contents(grads))
        if outcome(lambda grads=grads: opt.step(grads), *things) and opt.backend != "numpy":
            # the other backend on a copy of everything, which lies elsewhere in memory
            twin.load_state_dict({**twin.state_dict(), "t": opt.t - 1})
            numpy_twin = cls([{**g} for g in twin.param_groups], backend="numpy")
            numpy_twin.load_state_dict(twin.state_dict())
            numpy_twin.step(safe if groups else [safe])
            assert all(
                same(np.asarray(a), np.asarray(b))
                for ours, theirs in zip(opt.param_groups, twin_tree, strict=True)
                for a, b in zip(leaves(ours["params"]), leaves(theirs), strict=True)
            )
            twin.load_state_dict(numpy_twin.state_dict())
        elif opt.backend == "numpy":
            return


def duplicate(tree):
    if isinstance(tree, Mapping):
        return {key: duplicate(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [duplicate(child) for child in tree]
    return copy.deepcopy(tree) if isinstance(tree, np.ndarray | fused_adam._layout.FlatBuffer) else tree


def leaves(tree):
    return [a for _, a in fused_adam._layout.leaves(tree, "")]


@given(
    trees(leaf()), mostly(st.sampled_from([None, np.float32, "float64", ">f4", np.float16]), st.one_of(JUNK, st.text()))
)
@examples(300)
def test_flatten(tree, dtype):
    box = []
    with np.errstate(all="ignore"):
        if outcome(lambda: box.append(fused_adam.flatten(tree, dtype)), tree):
            flat = box[0]
            for view, a in zip(leaves(flat), leaves(tree), strict=True):
                assert view.shape == a.shape
                assert same(view, np.asarray(a).astype(view.dtype))
                assert view.ctypes.data % 128 == 0 or not view.size


# --- state dicts and rules -------------------------------------------------------------------------------------------


@st.composite
def mutations(draw, d):
    """A state dict with something changed somewhere."""
    d = copy.deepcopy(d)
    for _ in range(draw(st.integers(0, 2))):
        place = d
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], dict | list) or draw(st.integers(0, 4)) == 0:
                action = draw(st.integers(0, 3))
                if action == 0:
                    del place[key]
                elif action == 1 and isinstance(place, dict):
                    place[draw(KEYS)] = place[key]
                elif action == 2 and isinstance(place[key], np.ndarray):
                    place[key] = draw(arrays(place[key].shape, draw(DTYPES), np.ones(100, np.float32)))
                else:
                    place[key] = draw(JUNK)
                break
            place = place[key]
    return d


@given(st.data(), st.sampled_from(["numpy", "numba"]))
@examples(400)
def test_load_state_dict(data, backend):
    params = [np.ones((2, 3), np.float32), {"x": np.ones(4)}]
    opt = fused_adam.Adam([{"params": params[0]}, {"params": params[1], "lr": 0.5}], backend=backend)
    grads = [np.full((2, 3), 0.5, np.float32), {"x": np.full(4, 0.25)}]
    opt.step(grads)
    d = data.draw(mutations(opt.state_dict()))
    opt.step(grads)
    if outcome(lambda: opt.load_state_dict(d), opt, params):
        assert opt.t == d["t"]
        for mine, theirs in zip(opt.state_dict()["state"], d["state"], strict=True):
            assert all(same(mine[k], np.asarray(theirs[k])) for k in mine)
        outcome(lambda: opt.step(grads), opt, params)  # what was loaded must not break a step


RULE_LINES = st.sampled_from(
    [
        "m = (m - c * m) + c * g",
        "m = m - c * g  # decay",
        "x = sqrt(absolute(g))",
        "x = x * m",
        "p = p - lr * m",
        "p = p - (lr  # rate\n        * sign(m))",
        "p = maximum(p, minimum(m, g))",
        "p = minimum(m, p)",
        "x = sign(p)",
        "g = g + c * p",
        "x = m / (c + lr)",
        "m = maximum(m, m)",
        "c = c * c",
        "x = 2.0 * g",
        "p += g",
        "x = -g",
        "x = m",
        "y, z = m, g",
        "x = exp(g)",
        "if p: p = g",
        "x = g ** c",
        "lr = lr / c",
        "p = p if p else g",
        "return p, m",
    ]
)


@given(
    st.lists(RULE_LINES, max_size=5),
    st.sampled_from(
        ["p, g, m, lr, c"] * 6 + ["g, p, m, lr, c", "p, g, m=1, lr=2, c=3", "p, g, m, lr, *c", "p, g, params"]
    ),
    st.sampled_from(["return p, m"] * 6 + ["return p", "return m, p", "return (p, m, g)", "return p, 1", "pass"]),
)
@examples(150)
def test_rule(tmp_path_factory, lines, arguments, last):
    path = tmp_path_factory.mktemp("rule") / "own.py"
    source = "\n".join([f"def own({arguments}):", *(f"    {line}" for line in [*lines, last])])
    path.write_text(source)
    scope = {"__name__": "own"}
    exec(compile(source, str(path), "exec"), scope)
    try:
        cls = fused_adam.rule(scope["own"])
    except REFUSALS:
        return
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 20)).astype(np.float32)
    p[:7], g[3:10] = SPECIAL, SPECIAL
    results = []
    for backend in ("numpy", "numba") if len(lines) < 3 else ("numpy",):  # compiling takes its time
        q = p.copy()
        opt = cls([q], **dict.fromkeys(parse(scope["own"]).coefficients, 0.25), backend=backend)
        opt.step([g])
        opt.step([g])
        results.append((q, *opt.state_dict()["state"][0].values()))
    for a, b in zip(results[0], results[-1], strict=True):
        assert same(a, b), source


@pytest.mark.parametrize("max_v", [False, True])
def test_same_sees_a_wrong_step(max_v):
    """`same` tells apart what differs in one bit or in the sign of a zero."""
    a = adam_arrays(0, 10, max_v=max_v)["v"]
    b = a.copy()
    assert same(a, b)
    b[3] = np.nextafter(b[3], np.float32(9))
    assert not same(a, b)
    zeros = np.zeros(2, np.float32)
    assert not same(zeros, -zeros)
