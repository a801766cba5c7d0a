"""A test of the tests: each wrong rule runs on the real backends and is caught by what judges the right ones.

A row names a class, and what to break in the package before it steps: the rule's text, a coefficient, or a prelude.
"""

# Rules are source text; sqrt and the like are names of their own grammar.
# ruff: noqa: F821

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import exact
import numpy as np
import pytest

import fused_adam
from fused_adam import _codegen, _coefficients, _optimizer, _rules

Break = Callable[[pytest.MonkeyPatch], None]
RIGHT_ADAMW = _coefficients.adamw
RIGHT_MOMENTUM = _coefficients.momentum
RIGHT_ADAM_UPDATE = _optimizer.adam

SGD = exact.Case(fused_adam.SGD, "sgd", {"lr": 0.1})
MOMENTUM = exact.Case(fused_adam.SGD, "momentum", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3})
NESTEROV = exact.Case(fused_adam.SGD, "nesterov", {"lr": 0.1, "momentum": 0.9, "nesterov": True})
ADAGRAD = exact.Case(fused_adam.Adagrad, "adagrad", {"lr_decay": 1e-3})
RMSPROP = exact.Case(fused_adam.RMSprop, "rmsprop")
CENTERED = exact.Case(fused_adam.RMSprop, "rmsprop_centered", {"centered": True})
RMSPROP_MOMENTUM = exact.Case(fused_adam.RMSprop, "rmsprop_momentum", {"momentum": 0.8})
ADAM = exact.Case(fused_adam.Adam, "adam")
ADAM_L2 = exact.Case(fused_adam.Adam, "adam", {"weight_decay": 0.01})
ADAM_ASCENT = exact.Case(fused_adam.Adam, "adam", {"weight_decay": 0.01, "maximize": True})
ADAM_SLOW = exact.Case(fused_adam.Adam, "adam", {"betas": (1 - 1e-4, 1 - 1e-8)})
ADAMW = exact.Case(fused_adam.AdamW, "adamw", {"weight_decay": 0.01})
AMSGRAD = exact.Case(fused_adam.Adam, "amsgrad", {"amsgrad": True})
LION = exact.Case(fused_adam.Lion, "lion")
KERAS = exact.Case(fused_adam.Adam, "adam", {"numerics": "keras"})
MLX = exact.Case(fused_adam.Adam, "adam", {"numerics": "mlx"})
BITSANDBYTES = exact.Case(fused_adam.AdamW, "adamw", {"numerics": "bitsandbytes", "weight_decay": 0.01})
OPTAX = exact.Case(fused_adam.Adam, "adam", {"numerics": "optax", "eps_root": 1e-6})
OPTAX_AMSGRAD = exact.Case(fused_adam.Adam, "amsgrad", {"numerics": "optax", "amsgrad": True})


def rule(name: str, f: Callable[..., Any]) -> Break:
    """Replace the text of a rule or prelude."""
    texts = _rules.PRELUDES if name in _rules.PRELUDES else _rules.RULES
    return lambda monkeypatch: monkeypatch.setitem(texts, name, f)


def coefficients(name: str, f: Callable[..., Any]) -> Break:
    return lambda monkeypatch: monkeypatch.setattr(_coefficients, name, f)


def adamw(f: Callable[..., Any]) -> Break:
    """Adam's and AdamW's coefficients, by name, from (the right ones, t, lr, beta1, beta2, eps, weight_decay)."""

    def wrong(t: int, *hyper: float) -> tuple[float, ...]:
        right = dict(zip(("c1", "c2", "step", "eps", "decay"), RIGHT_ADAMW(t, *hyper), strict=True))
        return tuple((right | f(right, t, *hyper)).values())

    return coefficients("adamw", wrong)


def momentum(f: Callable[..., Any]) -> Break:
    """SGD's (mu, rate, lr) from the right ones, t, lr, mu and dampening."""
    return coefficients("momentum", lambda t, *hyper: f(RIGHT_MOMENTUM(t, *hyper), t, *hyper))


def decoupled(value: bool) -> Break:
    return lambda monkeypatch: monkeypatch.setattr(fused_adam.Adam if value else fused_adam.AdamW, "_decoupled", value)


def l2_before_maximize(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _codegen.bind
    monkeypatch.setattr(_optimizer, "bind", lambda name, preludes=(): right(name, preludes[::-1]))


def corrected_amsgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """max_v over v / (1 - beta2**t), as some libraries have it; the rule needs that as a coefficient."""

    def wrong(t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
        c1, c2 = 1.0 - beta1, 1.0 - beta2
        q1, q2 = (_coefficients.bias_correction(c, t) for c in (c1, c2))
        return c1, c2, q2, lr / q1, eps

    def update(group: Any, decoupled: bool) -> Any:
        right = RIGHT_ADAM_UPDATE(group, decoupled)
        return right._replace(rule=_codegen.bind("amsgrad"), formula=wrong, names=("c1", "c2", "q", "lr", "eps"))

    rule("amsgrad", amsgrad_of_corrected_v)(monkeypatch)
    monkeypatch.setattr(_optimizer, "adam", update)


# --- wrong texts ------------------------------------------------------------------------------------------------------


def adam_eps_inside(p, g, m, v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / sqrt(v + eps))
    return p, m, v


def adam_absolute_gradient(p, g, m, v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + c2 * absolute(g)
    p = p - step * (m / (sqrt(v) + eps))
    return p, m, v


def adam_steps_by_old_m(p, g, m, v, c1, c2, step, eps):
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(v) + eps))
    m = (m - c1 * m) + c1 * g
    return p, m, v


def adam_steps_by_old_v(p, g, m, v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    p = p - step * (m / (sqrt(v) + eps))
    v = (v - c2 * v) + (c2 * g) * g
    return p, m, v


def adam_no_root(p, g, m, v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (v + eps))
    return p, m, v


def adamw_decays_after(p, g, m, v, c1, c2, step, eps, decay):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(v) + eps))
    p = p - decay * p
    return p, m, v


def amsgrad_ignored(p, g, m, v, max_v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, v)
    p = p - step * (m / (sqrt(v) + eps))
    return p, m, v, max_v


def amsgrad_of_corrected_v(p, g, m, v, max_v, c1, c2, q, lr, eps):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, v / q)
    p = p - lr * (m / (sqrt(max_v) + eps))
    return p, m, v, max_v


def amsgrad_of_old_v(p, g, m, v, max_v, c1, c2, step, eps):
    m = (m - c1 * m) + c1 * g
    max_v = maximum(max_v, v)
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(max_v) + eps))
    return p, m, v, max_v


def adamw_after_of_the_old_p(p, g, m, v, c1, c2, step, eps, decay):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - (decay * p + step * (m / (sqrt(v) + eps)))
    return p, m, v


def eps_root_outside(p, g, m, v, c1, c2, step, eps, root):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(v) + sqrt(root) + eps))
    return p, m, v


def amsgrad_hat_of_raw_v(p, g, m, v, max_v, c1, c2, correction, step, eps, root):
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, v)
    p = p - step * (m / (sqrt(correction * max_v + root) + eps))
    return p, m, v, max_v


def nesterov_ignored(p, g, m, mu, lr):
    m = mu * m + g
    p = p - lr * m
    return p, m


def adagrad_eps_inside(p, g, v, lr, eps):
    v = v + g * g
    p = p - lr * (g / sqrt(v + eps))
    return p, v


def rmsprop_eps_inside(p, g, v, c, lr, eps):
    v = (v - c * v) + (c * g) * g
    p = p - lr * (g / sqrt(v + eps))
    return p, v


def centered_ignored(p, g, v, a, c, lr, eps, zero):
    v = (v - c * v) + (c * g) * g
    a = (a - c * a) + c * g
    p = p - lr * (g / (sqrt(maximum(v, zero)) + eps))
    return p, v, a


def rmsprop_momentum_of_the_step(p, g, v, m, c, mu, lr, eps):
    v = (v - c * v) + (c * g) * g
    m = mu * m + lr * (g / (sqrt(v) + eps))
    p = p - m
    return p, v, m


def lion_steps_by_new_m(p, g, m, c1, c2, lr):
    m = (m - c2 * m) + c2 * g
    p = p - lr * sign((m - c1 * m) + c1 * g)
    return p, m


def lion_swapped(p, g, m, c1, c2, lr):
    p = p - lr * sign((m - c2 * m) + c2 * g)
    m = (m - c1 * m) + c1 * g
    return p, m


def maximize_ignored(g, ascent):
    g = (ascent * ascent) * g
    return g


# --- rows -------------------------------------------------------------------------------------------------------------


def _root(right: dict[str, float], t: int) -> float:
    return math.sqrt(_coefficients.bias_correction(right["c2"], t))


WRONG: dict[str, tuple[exact.Case, Break]] = {
    "no bias correction": (ADAM, adamw(lambda r, t, lr, b1, b2, eps, wd: {"step": lr, "eps": eps})),
    "no bias correction of m": (ADAM, adamw(lambda r, t, lr, *_: {"step": lr * _root(r, t)})),
    "no bias correction of v": (
        ADAM,
        adamw(lambda r, t, lr, b1, b2, eps, wd: {"step": r["step"] / _root(r, t), "eps": eps}),
    ),
    "eps not scaled (eps-hat)": (ADAM, adamw(lambda r, t, lr, b1, b2, eps, wd: {"eps": eps})),
    "eps ignored": (ADAM, adamw(lambda r, *_: {"eps": 0.0})),
    "eps inside the root": (ADAM, rule("adam", adam_eps_inside)),
    "t one behind": (ADAM, coefficients("adamw", lambda t, *hyper: RIGHT_ADAMW(max(t - 1, 1), *hyper))),
    "t one ahead": (ADAM, coefficients("adamw", lambda t, *hyper: RIGHT_ADAMW(t + 1, *hyper))),
    "t sticks at 2**24": (ADAM_SLOW, coefficients("adamw", lambda t, *h: RIGHT_ADAMW(min(t, 2**24), *h))),
    "1 % more lr": (ADAM, adamw(lambda r, *_: {"step": 1.01 * r["step"]})),
    "betas swapped": (ADAM, coefficients("adamw", lambda t, lr, b1, b2, *h: RIGHT_ADAMW(t, lr, b2, b1, *h))),
    "beta2 rounded to float32": (
        ADAM,
        coefficients("adamw", lambda t, lr, b1, b2, *h: RIGHT_ADAMW(t, lr, b1, float(np.float32(b2)), *h)),
    ),
    "|g| for g * g": (ADAM, rule("adam", adam_absolute_gradient)),
    "no root": (ADAM, rule("adam", adam_no_root)),
    "steps by the old m": (ADAM, rule("adam", adam_steps_by_old_m)),
    "steps by the old v": (ADAM, rule("adam", adam_steps_by_old_v)),
    "decay after the step": (ADAMW, rule("adamw", adamw_decays_after)),
    "decay ignored": (ADAMW, adamw(lambda r, *_: {"decay": 0.0})),
    "decay of wrong sign": (ADAMW, adamw(lambda r, *_: {"decay": -r["decay"]})),
    "decay without lr": (ADAMW, adamw(lambda r, t, lr, b1, b2, eps, wd: {"decay": wd})),
    "L2 for decoupled": (ADAMW, decoupled(False)),
    "decoupled for L2": (ADAM_L2, decoupled(True)),
    "L2 before maximize": (ADAM_ASCENT, l2_before_maximize),
    "maximize ignored": (ADAM_ASCENT, rule("maximize", maximize_ignored)),
    "amsgrad ignored": (AMSGRAD, rule("amsgrad", amsgrad_ignored)),
    "amsgrad of the old v": (AMSGRAD, rule("amsgrad", amsgrad_of_old_v)),
    "amsgrad of the corrected v": (AMSGRAD, corrected_amsgrad),
    "keras with eps scaled": (KERAS, coefficients("eps_hat", RIGHT_ADAMW)),
    "mlx with bias correction": (MLX, coefficients("uncorrected", RIGHT_ADAMW)),
    "bitsandbytes decays first": (BITSANDBYTES, rule("adamw_after", adamw_after_of_the_old_p)),
    "optax's eps_root outside": (OPTAX, rule("adam_root", eps_root_outside)),
    "optax's amsgrad of the raw v": (OPTAX_AMSGRAD, rule("amsgrad_hat", amsgrad_hat_of_raw_v)),
    "sgd with 1 % more lr": (SGD, momentum(lambda r, *_: (r[0], r[1], 1.01 * r[2]))),
    "nesterov ignored": (NESTEROV, rule("nesterov", nesterov_ignored)),
    "dampening at the first step": (MOMENTUM, momentum(lambda r, t, lr, mu, damp: (mu, 1 - damp, lr))),
    "dampening ignored": (MOMENTUM, momentum(lambda r, t, lr, mu, damp: (mu, 1.0, lr))),
    "momentum an average": (MOMENTUM, momentum(lambda r, t, lr, mu, damp: (mu, 1 - mu, lr))),
    "lr_decay one early": (ADAGRAD, coefficients("adagrad", lambda t, lr, d, eps: (lr / (1 + t * d), eps))),
    "adagrad, eps inside": (ADAGRAD, rule("adagrad", adagrad_eps_inside)),
    "rmsprop, eps inside": (RMSPROP, rule("rmsprop", rmsprop_eps_inside)),
    "centered ignored": (CENTERED, rule("rmsprop_centered", centered_ignored)),
    "momentum of the step": (RMSPROP_MOMENTUM, rule("rmsprop_momentum", rmsprop_momentum_of_the_step)),
    "lion steps by the new m": (LION, rule("lion", lion_steps_by_new_m)),
    "lion's betas swapped": (LION, rule("lion", lion_swapped)),
}


@pytest.fixture(autouse=True)
def _unbind() -> Any:
    """Rules are bound once by name; forget what a test has bound under a wrong text."""
    yield
    _codegen.bind.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", WRONG)
def test_is_caught(name: str, dtype: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, break_it = WRONG[name]
    exact.assert_steps_match(case, dtype, backend)
    break_it(monkeypatch)
    _codegen.bind.cache_clear()
    with pytest.raises(AssertionError, match="ulp off") as caught:
        exact.assert_steps_match(case, dtype, backend)
    print(caught.value)
