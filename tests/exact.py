"""One step through the public API, and the one function that judges it against the float64 oracle.

The tests of the right rules and the tests of wrong ones call the same `assert_steps_match`, so what the first accept is
what the second must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import reference

import fused_adam
from fused_adam._optimizer import Optimizer

STEPS = (1, 2, 3, 10, 1000, 2**24 - 1, 2**24, 2**24 + 1, 2**40)
UPDATE_ULPS = 10
STATE_ULPS = 3


@dataclass(frozen=True)
class Case:
    """A class, its arguments, and what the oracle calls the rule that these make."""

    optimizer: Callable[..., Optimizer]
    rule: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = ",".join(f"{k}={v}" for k, v in self.arguments.items())
        return f"{self.rule}({arguments})".replace(" ", "")

    @property
    def hyper(self) -> dict[str, Any]:
        """The arguments that the oracle takes; the others chose its rule."""
        chosen = {"nesterov", "centered", "amsgrad", "initial_accumulator_value"}
        return {k: v for k, v in self.arguments.items() if k not in chosen}

    @property
    def l2(self) -> float:
        """The weight decay that enters the gradient."""
        return 0.0 if self.rule in reference.DECOUPLED else self.arguments.get("weight_decay", 0.0)


def _cases() -> Iterator[Case]:
    f = fused_adam
    for common in ({}, {"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.01, "maximize": True}):
        yield Case(f.SGD, "sgd", {"lr": 0.1} | common)
        yield Case(f.SGD, "momentum", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3} | common)
        yield Case(f.SGD, "nesterov", {"lr": 0.1, "momentum": 0.9, "nesterov": True} | common)
        yield Case(f.Adagrad, "adagrad", {"lr_decay": 1e-3} | common)
        yield Case(f.RMSprop, "rmsprop", {} | common)
        yield Case(f.RMSprop, "rmsprop_momentum", {"alpha": 0.9, "momentum": 0.8} | common)
        yield Case(f.RMSprop, "rmsprop_centered", {"alpha": 0.999, "centered": True} | common)
        yield Case(f.RMSprop, "rmsprop_centered_momentum", {"centered": True, "momentum": 0.8} | common)
        yield Case(f.Adam, "adam", {} | common)
        yield Case(f.Adam, "amsgrad", {"amsgrad": True} | common)
        yield Case(f.AdamW, "adamw", {"weight_decay": 0.01} | common)
        yield Case(f.AdamW, "amsgradw", {"amsgrad": True, "weight_decay": 0.01} | common)
        yield Case(f.Lion, "lion", {} | common)
    for common in ({}, {"maximize": True}):  # AdamW and AMSGrad without decay are rules of their own
        yield Case(f.AdamW, "adamw", {"weight_decay": 0.0} | common)
    for betas in ((0.0, 0.0), (0.5, 0.5), (0.9, 1 - 1e-6), (1 - 1e-4, 1 - 1e-8)):
        yield Case(f.AdamW, "adamw", {"betas": betas, "weight_decay": 0.01})
        yield Case(f.Adam, "amsgrad", {"betas": betas, "amsgrad": True})
    yield Case(f.Adam, "adam", {"eps": 1e-3, "lr": 1.0})
    for common in ({}, {"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.01, "maximize": True}):
        optax = {"numerics": "optax", "eps_root": 1e-6}
        yield Case(f.Adam, "adam", optax | common)
        yield Case(f.Adam, "amsgrad", optax | {"amsgrad": True} | common)
    for common in ({}, {"maximize": True}):
        optax = {"numerics": "optax", "weight_decay": 0.01}
        yield Case(f.AdamW, "adamw", optax | {"eps_root": 1e-6} | common)
        yield Case(f.AdamW, "amsgradw", optax | {"amsgrad": True} | common)
        yield Case(f.AdamW, "adamw", {"numerics": "bitsandbytes", "weight_decay": 0.01} | common)
    for numerics in ("tf", "keras", "apex", "mlx"):
        yield Case(f.Adam, "adam", {"numerics": numerics})
    yield Case(f.Adam, "amsgrad", {"numerics": "keras", "amsgrad": True})
    yield Case(f.AdamW, "adamw", {"numerics": "mlx", "weight_decay": 0.1})


CASES = list(_cases())


def arbitrary(case: Case, dtype: Any, seed: int = 0, n: int = 1000) -> dict[str, Any]:
    """p, g and states over many orders of magnitude, zeros included, as no training would give them.

    Two sums are kept from cancelling, because a difference without digits cannot be judged by its digits: L2's
    g + wd * p, and v - a * a in centered RMSProp, where a training never comes near a * a > v either.
    """
    rng = np.random.default_rng(seed)

    def spread(low: float, high: float) -> Any:
        x = 10 ** rng.uniform(low, high, n) * rng.choice([-1, 1], n)
        x[rng.random(n) < 0.02] = 0
        return x.astype(dtype)

    p, g = spread(-8, 2), spread(-12, 3)
    if case.l2:
        near = (case.l2 * np.abs(p) > np.abs(g) / 4) & (case.l2 * np.abs(p) < np.abs(g) * 4)
        ascent = -1 if case.arguments.get("maximize") else 1
        p[near] = np.copysign(p, ascent * g)[near]
    arrays = {"p": p, "g": g, "v": np.abs(spread(-25, 6)), "m": spread(-12, 3)}
    arrays["max_v"] = (arrays["v"] * rng.choice([0.5, 1, 2], n)).astype(dtype)
    arrays["a"] = (np.sqrt(arrays["v"]) * rng.uniform(-0.5, 0.5, n)).astype(dtype)
    return {name: arrays[name] for name in ("p", "g", *reference.RULES[case.rule][0])}


def one_step(case: Case, t: int, before: dict[str, Any], backend: str) -> dict[str, Any]:
    """p and the states after step t of the class, from the given arrays."""
    p, g, *_ = arrays = [x.copy() for x in before.values()]
    optimizer = case.optimizer(p, **case.arguments, backend=backend)
    saved = optimizer.state_dict()
    saved["t"], saved["state"] = t - 1, [dict(zip(list(before)[2:], arrays[2:], strict=True))]
    optimizer.load_state_dict(saved)
    optimizer.step(g)
    return {"p": p, **optimizer.state_dict()["state"][0]}


def assert_matches_oracle(case: Case, t: int, before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """One step is within `UPDATE_ULPS` and `STATE_ULPS` of the exact result; returns the errors found, in ulps.

    An ulp is one of the update's uncancelled magnitude: of the largest that the update of this element can be when p, m
    and a may change their signs. Where m and g, or the step and the decay, nearly cancel, their difference inherits the
    rounding of both, and its own ulps would say nothing. The last rounding, half an ulp of the new p, comes on top: no
    float can hold p better.
    """
    dtype = before["p"].dtype
    names = list(before)[2:]

    def exact(signs: tuple[int, int] = (1, 1)) -> tuple[Any, dict[str, Any]]:
        sign = {"p": signs[0], "m": signs[1], "a": signs[1]}
        p, g, *states = (x.astype(np.longdouble) * sign.get(name, 1) for name, x in before.items())
        p_new, new = reference.step(
            case.rule, p, g, dict(zip(names, states, strict=True)), t, dtype=np.longdouble, **case.hyper
        )
        return p_new, {"update": p - p_new, **new}

    def ulp(x: Any) -> Any:
        return np.spacing(x.astype(dtype)).astype(np.longdouble)

    p_new, truth = exact()
    flipped = [exact(signs)[1] for signs in product((1, -1), repeat=2)]
    size = {name: np.max([np.abs(f[name]) for f in flipped], axis=0) for name in truth}

    errors = {"update": np.maximum(np.abs(after["p"] - p_new) - 0.5 * ulp(np.abs(p_new)), 0)}
    errors |= {name: np.abs(after[name] - truth[name]) for name in names}
    worst = {}
    for name, error in errors.items():
        ulps = error / ulp(size[name])
        # The momentum of RMSProp averages scaled gradients: an update by nature.
        is_update = name == "update" or (name == "m" and case.rule.startswith("rmsprop"))
        limit = UPDATE_ULPS if is_update else STATE_ULPS
        if name in ("v", "max_v") and case.l2:
            limit *= 2  # g + wd * p is rounded twice before it is squared
        if name == "max_v" and case.arguments.get("numerics") == "optax":
            limit += 2  # correcting v rounds the correction and the product
        i = int(np.argmax(np.where(np.isnan(ulps), np.inf, ulps)))
        worst[name] = float(ulps[i])
        inputs = {k: x[i] for k, x in before.items()}
        assert worst[name] <= limit, f"{case} t={t}: {name} is {worst[name]:.3g} ulp off at {inputs}"
    return worst


def assert_steps_match(case: Case, dtype: Any, backend: str, steps: Sequence[int] = STEPS) -> dict[str, float]:
    """`assert_matches_oracle` for steps of every age, each from other arrays; returns the largest errors."""
    worst: dict[str, float] = {}
    for t in steps:
        before = arbitrary(case, dtype, seed=t % 1000003)
        found = assert_matches_oracle(case, t, before, one_step(case, t, before, backend))
        worst = {name: max(error, worst.get(name, 0)) for name, error in found.items()}
    return worst
