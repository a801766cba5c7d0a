"""What a guarded step refuses, and when it is skipped."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from watch import memory, random, refused

import fused_adam

ONE = np.ones(1, np.float32)
BY_ROW = {
    "SparseGrad": (fused_adam.SparseGrad([1], np.ones((1, 4), np.float32)), {}),
    "mask": (np.ones((3, 4), np.float32), {"mask": np.array([True, False, True])}),
}
OPTIONS: list[dict[str, Any]] = [
    {"skip_nonfinite": True},
    {"max_grad_norm": 1.0},
    {"zero_grads": True},
    {"count_unmoved": True},
    {"device_scalars": True},
]


# --- grad_scale and found_inf -----------------------------------------------------------------------------------------

# no number by which gradients can be divided, in float32
SENSELESS = [0, 0.0, -0.0, -2.0, math.nan, math.inf, -math.inf, 1e-40, 5e-324, 1e50, np.float32(1e-45), np.int64(-1)]
WRONG: list[tuple[str, Any, str]] = [
    *(("grad_scale", x, "grad_scale") for x in SENSELESS),
    ("grad_scale", True, "grad_scale should be a number, got True"),
    ("grad_scale", "2", "grad_scale should be a number or an array of one, got a str"),
    ("grad_scale", None, "grad_scale should be a number or an array of one, got None"),
    ("grad_scale", [2.0], "grad_scale .* got a list"),
    ("grad_scale", 2j, "grad_scale .* got a complex"),
    ("grad_scale", np.complex64(2), "grad_scale"),
    ("grad_scale", 10**400, "grad_scale should be finite"),
    ("grad_scale", np.ones(2), r"grad_scale .* of shape \(2,\)"),
    ("grad_scale", np.ones(0), r"grad_scale .* of shape \(0,\)"),
    ("grad_scale", np.array(["2"]), "grad_scale should hold a number"),
    ("grad_scale", np.array([True]), "grad_scale should hold a number"),
    ("grad_scale", np.array([2j]), "grad_scale should hold a number"),
    ("grad_scale", np.array([None]), "grad_scale should hold a number"),
    ("grad_scale", np.ma.masked_array([2.0], [True]), "grad_scale"),
    ("found_inf", "1", "found_inf should be a number or an array of one, got a str"),
    ("found_inf", [0], "found_inf .* got a list"),
    ("found_inf", 1j, "found_inf"),
    ("found_inf", np.zeros((2, 1)), r"found_inf .* of shape \(2, 1\)"),
    ("found_inf", np.array(["0"]), "found_inf should hold a number"),
    ("found_inf", np.array([0j]), "found_inf should hold a number"),
    ("found_inf", np.ma.masked_array([0.0], [True]), "found_inf"),
]


@pytest.mark.parametrize(("name", "value", "match"), WRONG, ids=lambda x: repr(x)[:30])
def test_wrong_arguments_of_step(name: str, value: Any, match: str, backend: str) -> None:
    for options in ({}, {"skip_nonfinite": True, "zero_grads": True}):
        p, g = random(0, 5, 5)
        opt = fused_adam.Adam(p, backend=backend, **options)
        before = opt.last_stats()
        with refused(match, p, g, opt):
            opt.step(g, **{name: value})
        assert opt.last_stats() == before


@pytest.mark.parametrize("held", SENSELESS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"max_grad_norm": 1.0}], ids=str)
def test_a_senseless_scale_in_an_array_skips(held: Any, options: dict[str, Any], backend: str) -> None:
    p, g = random(0, 300, 300)
    opt = fused_adam.Adam(p, backend=backend, **options)
    opt.step(g)
    before = memory([p, g, opt])
    opt.step(g, grad_scale=np.array([held], np.float64))
    assert memory([p, g, opt]) == before and opt.last_stats().skipped == 1
    opt.step(g, grad_scale=np.array(2.0))
    assert opt.t == 2 and opt.last_stats().skipped == 1


def test_a_scale_for_one_dtype_of_two(backend: str) -> None:
    """1e50 has an inverse in float64 only: all or nothing."""
    params = [np.ones(3, np.float32), np.ones(3)]
    grads = [np.ones(3, np.float32), np.ones(3)]
    opt = fused_adam.SGD(params, backend=backend)
    with refused("grad_scale is 1e\\+50", params, opt):
        opt.step(grads, grad_scale=1e50)
    opt.step(grads, grad_scale=np.array(1e50))
    assert opt.last_stats().skipped == 1 and all((p == 1).all() for p in params)
    wide = fused_adam.SGD(params[1], lr=1e50, backend=backend)
    wide.step(grads[1], grad_scale=1e50)
    assert abs(params[1]).max() < 1e-15


FOUND: list[tuple[Any, bool]] = [
    *((x, False) for x in (None, 0, 0.0, -0.0, False, np.False_, np.float32(0), np.zeros(1), np.zeros((1, 1)))),
    *((x, True) for x in (1, 0.5, -1, math.nan, math.inf, True, np.True_, np.float16(1), np.ones(1), np.array([True]))),
    *((np.array(x, dtype), bool(x)) for x in (0, 1) for dtype in ("u1", "i8", "f2", ">f4", bool)),
]  # fmt: skip


@pytest.mark.parametrize(("found", "skips"), FOUND, ids=repr)
def test_found_inf(found: Any, skips: bool, backend: str) -> None:
    p, g = random(0, 5, 5)
    opt = fused_adam.Adam(p, backend=backend)
    before = p.copy()
    opt.step(g, found_inf=found)
    assert (opt.t, opt.last_stats().skipped) == ((0, 1) if skips else (1, 0))
    assert (p == before).all() == skips


# --- constructors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, -math.inf, np.float32("nan"), "1", True, [1.0], 2j, 10**400])
def test_wrong_max_grad_norm(value: Any, backend: str) -> None:
    with pytest.raises((TypeError, ValueError), match="max_grad_norm"):
        fused_adam.SGD(ONE.copy(), max_grad_norm=value, backend=backend)


@pytest.mark.parametrize(
    "value", [1, 1e-320, np.float32(2), np.int64(3), math.inf, np.float32("inf"), np.float64("inf")][:]
)
def test_right_max_grad_norm(value: Any, backend: str) -> None:
    p = np.zeros(2)
    opt = fused_adam.SGD(p, lr=1.0, max_grad_norm=value, backend=backend)
    opt.step(np.array([3.0, 4.0]))
    expected = min(float(value), 5.0)
    assert np.max(np.abs(p - expected * np.array([-0.6, -0.8]))) <= 1e-15 * expected + 5e-324


@pytest.mark.parametrize("name", ["skip_nonfinite", "zero_grads", "count_unmoved", "device_scalars"])
def test_flags_are_flags(name: str) -> None:
    for value in (1, 0, None, "yes", np.ones(1)):
        with pytest.raises(TypeError, match=f"{name} should be True or False"):
            fused_adam.Adam(ONE.copy(), **{name: value})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_do_not_go_with_options(options: dict[str, Any], backend: str) -> None:
    (name,) = options
    p = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=f"per_row_step does not go with {name}"):
        fused_adam.Adam(p, per_row_step=True, backend=backend, **options)
    for g, arguments in BY_ROW.values():
        opt = fused_adam.Adam(p, backend=backend, **options)
        with refused(f"{name} does not go with .*SparseGrad, mask", p, opt, errors=ValueError):
            opt.step(g, **arguments)


@pytest.mark.parametrize("call", [{"grad_scale": 2.0}, {"found_inf": 0}, {"grad_scale": np.ones(1)}], ids=str)
def test_rows_do_not_go_with_scales(call: dict[str, Any], backend: str) -> None:
    (name,) = call
    p = np.ones((3, 4), np.float32)
    for g, arguments in BY_ROW.values():
        opt = fused_adam.Adam(p, backend=backend)
        with refused(f"{name} does not go with .*SparseGrad, mask", p, opt, errors=ValueError):
            opt.step(g, **arguments, **call)
    opt = fused_adam.Adam(p, per_row_step=True, backend=backend)
    with refused(f"{name} does not go with .*per_row_step", p, opt, errors=ValueError):
        opt.step(np.ones_like(p), **call)


def test_signatures() -> None:
    for cls in (
        fused_adam.SGD,
        fused_adam.Adagrad,
        fused_adam.RMSprop,
        fused_adam.Adam,
        fused_adam.AdamW,
        fused_adam.Lion,
    ):
        arguments = inspect.signature(cls).parameters
        assert list(arguments)[:2] == ["params", "lr"]
        assert arguments["options"].kind is inspect.Parameter.VAR_KEYWORD
        with pytest.raises(TypeError, match="skip_nonfinit'"):
            cls(ONE.copy(), skip_nonfinit=True)
        with pytest.raises(TypeError):
            cls(ONE.copy(), *[0.1] * len(arguments))  # options go by name
