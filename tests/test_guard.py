"""A guarded step has the bytes of the unfused sequence: every class, dtype, layout and combination of options."""

# Rules are source text: the intrinsics in them are names of the grammar, not of this module.
# ruff: noqa: F821

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import exact
import numpy as np
import pytest
from bits import DTYPES
from conftest import BACKENDS, assert_same_bits, require
from guard_cases import Groups, Unfused, assert_same_stats, gradients
from watch import misaligned

import fused_adam

ALL = {"skip_nonfinite": True, "max_grad_norm": 3.0, "zero_grads": True, "count_unmoved": True, "device_scalars": True}
# Of each step: what `step` is given beside the gradients, and whether one of these is not finite.
CALLS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"grad_scale": 3.0}, False),
    ({"grad_scale": 1024}, True),
    ({"found_inf": True}, False),
    ({"grad_scale": np.array([65536.0], np.float32), "found_inf": 0}, False),
    ({}, True),
    ({"grad_scale": np.array(np.nan)}, False),
    ({"grad_scale": np.array([[7.0]]), "found_inf": np.zeros(1, np.float32)}, False),
    ({"found_inf": np.array([np.nan])}, True),
    ({}, False),
]


def normal(rng: np.random.Generator, shapes: Any, dtype: Any) -> list[Any]:
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_like_unfused(
    make: Any, backend: str, groups: Groups, calls: Any = CALLS, *, hyper: Any = None, place: Any = None, **options: Any
) -> None:
    """A step for each of the calls; place: makes (what is passed, arrays to look at) of a group's arrays."""
    rng = np.random.default_rng(1)
    hyper = hyper or [{} for _ in groups]
    place = place or (lambda arrays: (arrays, arrays))
    plain = Unfused(make, groups, hyper, **options)
    placed = [place([np.array(p, order="K") for p in ps]) for ps in groups]
    given = [{"params": params, **h} for (params, _), h in zip(placed, hyper, strict=True)]
    ours = make(given, backend=backend, **options)
    for k, (call, bad) in enumerate(calls):
        what = f"{backend} {options} step {k} {call}"
        grads = gradients(rng, groups, bad)
        there = [place([np.array(g, order="K") for g in gs]) for gs in grads]
        ours.step([passed for passed, _ in there], **call)
        expected = plain.step(grads, **call)
        assert_same_stats(ours.last_stats(), expected, what)
        plain.assert_equals(ours, [arrays for _, arrays in placed], what)
        for (_, arrays), gs in zip(there, grads, strict=True):
            zeroed = [np.zeros_like(g) for g in gs] if options.get("zero_grads") else gs
            assert_same_bits(map(str, range(len(gs))), arrays, zeroed, f"{what} g")


def flat(arrays: list[Any]) -> tuple[Any, list[Any]]:
    buffer = fused_adam.flatten(arrays)
    return buffer, list(buffer.tree)


def odd_places(arrays: list[Any]) -> tuple[Any, list[Any]]:
    moved = [misaligned(a, 1 + 2 * k) for k, a in enumerate(arrays)]
    return moved, moved


@pytest.mark.parametrize("k", range(len(exact.CASES)), ids=lambda k: str(exact.CASES[k]))
def test_every_class(k: int) -> None:
    """Mixed dtypes and two groups; on Numba, whose kernels take long to compile, one dtype for each case in turn."""
    require("numba")
    case = exact.CASES[k]
    for backend in BACKENDS:
        dtypes = DTYPES if backend == "numpy" else (DTYPES[k % 2],)
        rng = np.random.default_rng(k)
        groups = [
            [a for dtype in dtypes for a in normal(rng, [(33, 5), (), (0, 4), (129,)], dtype)],
            normal(rng, [(7,), (1, 130)], dtypes[-1]),
        ]

        def make(params: Any, **options: Any) -> Any:
            return case.optimizer(params, **case.arguments, **options)

        assert_like_unfused(make, backend, groups, CALLS[:4] + CALLS[-2:], hyper=[{}, {"lr": 0.3}], **ALL)


COMBINATIONS = [
    {name: ALL[name] for name, chosen in zip(ALL, choice, strict=True) if chosen}
    for choice in product([False, True], repeat=len(ALL))
    if choice[-1] == (sum(choice[:-1]) == 1)  # device_scalars changes nothing here
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "+".join(options) or "none")
def test_combinations(options: dict[str, Any], backend: str) -> None:
    rng = np.random.default_rng(2)
    groups = [normal(rng, [(300,), (40, 3)], np.float32), normal(rng, [(5,)], np.float32)]
    assert_like_unfused(fused_adam.AdamW, backend, groups, hyper=[{}, {"lr": 0.1}], **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: Any, backend: str) -> None:
    """Around blocks and chunks; the last is large enough for Numba's threads, which take all of them then."""
    rng = np.random.default_rng(3)
    sizes = (0, 1, 127, 128, 129, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1)
    assert_like_unfused(fused_adam.AdamW, backend, [normal(rng, sizes, dtype)], CALLS[:3], **ALL)
    for size in sizes:
        assert_like_unfused(fused_adam.AdamW, backend, [normal(rng, [size], dtype)], CALLS[1:3], **ALL)
    assert_like_unfused(fused_adam.AdamW, backend, [normal(rng, (5, 2**18 + 3, 1), dtype)], CALLS[1:4], **ALL)


LAYOUTS = {
    "list": None,
    "flat": flat,
    "misaligned": odd_places,
    "fortran": lambda arrays: ([np.asfortranarray(a) for a in arrays],) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout: str, dtype: Any, backend: str) -> None:
    rng = np.random.default_rng(4)
    shapes = [(1,), (), (130, 3), (0, 2), (2**15 + 1,), (128,), (64, 2, 3), (3,)]
    groups = [normal(rng, shapes, dtype), normal(rng, [(2, 70)], dtype)]
    if layout == "fortran":
        groups = [[np.asfortranarray(p) for p in ps] for ps in groups]
    for options in (ALL, {"skip_nonfinite": True, "max_grad_norm": 0.5}):
        assert_like_unfused(fused_adam.AdamW, backend, groups, CALLS[:4], place=LAYOUTS[layout], **options)


def test_layouts_that_differ(backend: str) -> None:
    """Flat parameters with loose gradients and the other way round; C gradients of a parameter in Fortran order."""
    rng = np.random.default_rng(5)
    arrays = normal(rng, [(130, 3), (), (5,)], np.float32)
    grads = gradients(rng, [arrays])[0]
    plain = Unfused(fused_adam.AdamW, [arrays], [{}], **ALL)
    expected = plain.step([grads], 3.0)
    for params, gs in ((flat(arrays)[0], [g.copy() for g in grads]), ([a.copy() for a in arrays], flat(grads)[0])):
        ours = fused_adam.AdamW(params, backend=backend, **ALL)
        ours.step(gs, grad_scale=3.0)
        assert_same_stats(ours.last_stats(), expected, "")
        plain.assert_equals(ours, [list(getattr(params, "tree", params))], "")
        assert not any(g.any() for g in getattr(gs, "tree", gs))
    options = {"skip_nonfinite": True, "max_grad_norm": 3.0}
    p, g = np.asfortranarray(arrays[0]), grads[0]
    plain = Unfused(fused_adam.AdamW, [[p]], [{}], **options)
    ours = fused_adam.AdamW(p, backend=backend, **options)
    ours.step(g)
    assert_same_stats(ours.last_stats(), plain.step([[g]]), "")
    plain.assert_equals(ours, [[p]], "")


@fused_adam.rule
def own(p, g, m, c, lr):
    """Assigns g, as no built-in rule does, and has names that a loop might take for its own."""
    g = g + c * p
    m = maximum(m - c * m, absolute(g))
    unmoved = lr * g
    p = p - unmoved / m
    return p, m


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_users_rule(dtype: Any, backend: str) -> None:
    rng = np.random.default_rng(6)

    def make(params: Any, **options: Any) -> Any:
        return own(params, c=0.1, lr=0.01, **options)

    groups = [normal(rng, [(2**15 + 1,), (3, 50), ()], dtype)]
    for options in (ALL, {"count_unmoved": True}, {"zero_grads": True}):
        assert_like_unfused(make, backend, groups, **options)


def test_a_schedule_is_asked_once_a_step(backend: str) -> None:
    asked = []

    def coefficients(t: int, lr: float = 1.0) -> dict[str, float]:
        asked.append(t)
        return {"lr": lr / len(asked)}

    def descent(p, g, lr):
        p = p - lr * g
        return p

    p = np.zeros(3)
    opt = fused_adam.rule(descent, coefficients)(p, backend=backend, skip_nonfinite=True)
    del asked[:]
    for found in (0, 1, 0):
        opt.step(np.ones(3), found_inf=found)
    assert asked == [1, 2, 2]
    assert p.tolist() == [-1 - 1 / 3] * 3


def test_apply_gradients_and_copies(backend: str) -> None:
    """The constructor's options hold for TensorFlow's form, and survive pickle, deepcopy and state dicts."""
    rng = np.random.default_rng(7)
    arrays = normal(rng, [(200,), (3, 3)], np.float32)
    plain = Unfused(fused_adam.Adam, [arrays], [{}], **ALL)
    params = [a.copy() for a in arrays]
    ours = fused_adam.Adam(params, backend=backend, **ALL)
    for k, bad in enumerate((False, True, False, True, False)):
        if k == 3:
            fresh = fused_adam.Adam([p.copy() for p in params], lr=1.0, backend=backend, **ALL)
            fresh.load_state_dict(copy.deepcopy(ours.state_dict()))
            others = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), fresh]
            assert all(other.settings == ours.settings for other in others)
        grads = gradients(rng, [arrays], bad)[0]
        for other in [ours] if k < 3 else [ours, *others]:
            gs = [g.copy() for g in grads]
            mine = other.param_groups[0]["params"]
            other.apply_gradients(list(zip(gs, mine, strict=True))[::-1])
            assert not any(g.any() for g in gs)
        expected = plain.step([grads])
        assert_same_stats(ours.last_stats(), expected, f"step {k}")
        for other in [ours] if k < 3 else [ours, *others]:
            plain.assert_equals(other, [other.param_groups[0]["params"]], f"step {k}")
            assert other.last_stats()[:2] == expected[:2] or bad
