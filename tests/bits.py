"""What the tests of bits share: each rule behind each prelude that a class uses, its coefficients and inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import assert_same_bits

from fused_adam._codegen import Rule
from fused_adam._rules import RULES
from fused_adam.backends import load

DTYPES = (np.float32, np.float64)
Variant = tuple[str, tuple[str, ...]]  # a rule and the preludes before it
# no class puts the L2 prelude before these
WITHOUT_L2 = ("adamw", "amsgradw", "adamw_root", "adamw_after", "amsgradw_hat", "lion", "lionw")
VARIANTS: list[Variant] = [
    (name, maximize + l2)
    for name in RULES
    for maximize in ((), ("maximize",))
    for l2 in ([()] if name in WITHOUT_L2 else [(), ("l2",)])
]
LARGEST: Variant = ("amsgradw_hat", ("maximize",))  # with the most arrays and coefficients

# Of each coefficient an ordinary value, which float32 does not hold; one at the end of its range; and one that float32
# holds as a subnormal, or not at all.
COEFFICIENTS = {
    "c": (0.01, 1.0, 1e-8),
    "c1": (0.1, 1.0, 1e-4),
    "c2": (0.001, 1.0, 1e-8),
    "mu": (0.9, 0.0, 1e-41),
    "correction": (33.3, 1.0, 1e8),
    "root": (1e-7, 0.0, 1e-41),
    "rate": (0.7, 1.0, -0.3),
    "lr": (0.01, 0.0, 1e30),
    "step": (0.0031, 0.0, 1e-42),
    "eps": (1e-8, 0.0, 1e-41),
    "decay": (1e-5, 1.0, 1e-50),
    "wd": (0.01, 1.0, 1e20),
    "ascent": (-1.0, -1.0, -1.0),
    "unscaling": (1 / 3, 1.0, 1e-41),
    "clipping": (0.37, 1.0, 0.0),
    "zero": (0.0, 0.0, 0.0),
}


def variant_id(variant: Variant) -> str:
    return "_".join([*variant[1], variant[0]])


def coefficients(rule: Rule, k: int = 0) -> list[float]:
    return [COEFFICIENTS[name][k] for name in rule.coefficients]


def specials(dtype: Any) -> Any:
    """Zeros, infinities, NaNs of either sign and of another payload, subnormals and the ends of the range."""
    info = np.finfo(dtype)
    some = [0.0, info.smallest_subnormal, info.tiny / 3, info.tiny, info.eps, 1.0, info.max, np.inf, np.nan]
    positive = np.array(some, dtype)
    payload = positive[-1:].view(f"u{positive.itemsize}") + 12345
    return np.concatenate([positive, -positive, payload.astype(f"u{positive.itemsize}").view(dtype)])


def inputs(rule: Rule, dtype: Any, n: int, share: float) -> list[Any]:
    """p, g and the states: numbers of every magnitude, and among them, in every combination, a share of `specials`."""
    rng = np.random.default_rng(n)
    arrays = []
    for name in ("p", "g", *rule.states):
        x = rng.normal(size=n) * 10 ** rng.uniform(-12, 6, n)
        x = np.where(rng.random(n) < 0.1, x * 10 ** rng.uniform(-50, 50, n), x)
        with np.errstate(over="ignore"):
            x = (np.abs(x) if name in ("v", "max_v") else x).astype(dtype)
        special = rng.random(n) < share
        x[special] = rng.choice(specials(dtype), special.sum())
        arrays.append(x)
    return arrays


def copies(arrays: list[Any]) -> list[Any]:
    return [a.copy() for a in arrays]


def run(backend: str, rule: Rule, values: list[float], arrays: list[Any]) -> None:
    """One step of a backend over p, g and the states, 1-D, in place."""
    p, g, *states = arrays
    load(backend).run(rule, values, p, g, states)


def standard(rule: Rule, given: list[Any], k: int = 0) -> list[Any]:
    """What everything must equal: NumPy's result in one call over whole arrays; g is as it was."""
    arrays = copies(given)
    run("numpy", rule, coefficients(rule, k), arrays)
    return arrays


def assert_arrays(rule: Rule, ours: list[Any], expected: list[Any], what: str = "") -> None:
    assert_same_bits(("p", "g", *rule.states), ours, expected, f"{rule.name} {what}")
