"""Right rules against the exact result: one step, ten thousand steps, published numbers, and the bias correction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest

import fused_adam
from fused_adam._coefficients import bias_correction

GOLDEN = Path(__file__).parent / "golden"
TORCH = json.loads((GOLDEN / "adam_torch_cpp.json").read_text())
FACTS = json.loads((GOLDEN / "facts.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", exact.CASES, ids=str)
def test_one_step(case: exact.Case, dtype: Any, backend: str) -> None:
    worst = exact.assert_steps_match(case, dtype, backend)
    print({name: round(ulps, 2) for name, ulps in worst.items()})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-8])
def test_second_moment_at_any_beta2(beta2: float, dtype: Any, backend: str) -> None:
    """v has the tightest bound; more elements than `test_one_step` has."""
    case = exact.Case(fused_adam.Adam, "adam", {"betas": (0.9, beta2)})
    before = exact.arbitrary(case, dtype, n=20_000)
    worst = exact.assert_matches_oracle(case, 7, before, exact.one_step(case, 7, before, backend))
    print(f"v {worst['v']:.2f} ulp, update {worst['update']:.2f} ulp")


# --- ten thousand steps -----------------------------------------------------------------------------------------------


def _training(n: int, steps: int) -> tuple[Any, Iterator[Any]]:
    """Parameters of order 1 and gradients as a training gives them: of any scale, noisy, with a slowly turning mean."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=n).astype(np.float32)
    scale, phase = 10 ** rng.uniform(-4, 0, n), rng.uniform(0, 2 * math.pi, n)
    noisy = (scale * (0.3 * np.cos(phase + 1e-3 * t) + rng.normal(size=n)) for t in range(steps))
    return start, (g.astype(np.float32) for g in noisy)


def test_drift_after_ten_thousand_steps() -> None:
    """float32 stays within 5e-5 of float64, and the order of PyTorch, beside it, does not: the bound means something.

    One backend is enough: test_bits shows that they agree.
    """
    start, gradients = _training(512, 10_000)
    p, p64, textbook = start.copy(), start.astype(np.float64), start.copy()
    optimizer, optimizer64 = (fused_adam.AdamW(x, lr=1e-3, weight_decay=1e-2, backend="numpy") for x in (p, p64))
    m, v = np.zeros_like(p), np.zeros_like(p)
    f = np.float32
    drift = drift_textbook = 0.0
    for t, g in enumerate(gradients, 1):
        optimizer.step(g)
        optimizer64.step(g.astype(np.float64))
        m = f(0.9) * m + f(1 - 0.9) * g
        v = f(0.999) * v + f(1 - 0.999) * g * g
        root = f(math.sqrt(1 - 0.999**t))
        textbook = f(1 - 1e-3 * 1e-2) * textbook - f(1e-3 / (1 - 0.9**t)) * (m / (np.sqrt(v) / root + f(1e-8)))
        drift = max(drift, float(np.abs(p - p64).max()))
        drift_textbook = max(drift_textbook, float(np.abs(textbook - p64).max()))
    print(f"after 10,000 steps float32 is at most {drift:.2e} from float64, PyTorch's order {drift_textbook:.2e}")
    assert np.abs(p64 - start).max() > 0.5  # it did move
    assert drift < 5e-5 < drift_textbook


# --- published numbers ------------------------------------------------------------------------------------------------


def assert_golden(ours: Any, golden: Any, start: Any) -> None:
    """Equal to 1e-12 of the way from the start."""
    ours, golden, start = np.asarray(ours), np.asarray(golden), np.asarray(start)
    assert np.all(np.abs(ours - golden) <= 1e-12 * np.abs(golden - start)), f"{ours} should be {golden}"


def _network_gradients(w1: Any, b1: Any, w2: Any, b2: Any) -> list[Any]:
    """Of the summed output of a 2-3-sigmoid-1-sigmoid network."""
    x = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    hidden = 1 / (1 + np.exp(-(x @ w1.reshape(3, 2).T + b1)))
    out = 1 / (1 + np.exp(-(hidden @ w2.reshape(1, 3).T + b2)))
    d_out = out * (1 - out)
    d_hidden = d_out @ w2.reshape(1, 3) * hidden * (1 - hidden)
    return [(d_hidden.T @ x).ravel(), d_hidden.sum(0), (d_out.T @ hidden).ravel(), d_out.sum(0)]


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("G", {"weight_decay": 1e-6}),
        ("G_wd0", {}),
        ("G_wd6", {"weight_decay": 1e-6}),
        ("G_wd2", {"weight_decay": 1e-2}),
        ("G_ams6", {"weight_decay": 1e-6, "amsgrad": True}),
    ],
)
def test_golden_torch(key: str, arguments: dict[str, Any], backend: str) -> None:
    """PyTorch's C++ baselines; they are in the eps-hat form, which a new eps before each step turns into the modern."""
    rows = TORCH[key]
    golden = rows if isinstance(rows, dict) else {100 * k: row for k, row in enumerate(rows)}
    golden = {int(index): row for index, row in golden.items()}
    params = [np.array(p) for p in TORCH["start"]]
    optimizer = fused_adam.Adam(params, lr=1.0, **arguments, backend=backend)
    compared = 0
    for index in range(max(golden) + 1):
        optimizer.param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999 ** (index + 1))
        optimizer.step(_network_gradients(*params))
        if index in golden:
            assert_golden(np.concatenate(params), np.concatenate(golden[index]), np.concatenate(TORCH["start"]))
            compared += 1
    assert compared == len(golden) >= 3


def test_golden_tensorflow(backend: str) -> None:
    """Every digit that is printed is exact: m and v are short decimals, and so is p to 1e-17."""
    facts = FACTS["tensorflow"]
    p, g = np.array(facts["p"]), np.array(facts["g"])
    optimizer = fused_adam.Adam(p, lr=facts["lr"], backend=backend)
    for _ in range(facts["steps"]):
        optimizer.step(g)
    state = optimizer.state_dict()["state"][0]
    assert_golden(p, facts["after"]["p"], facts["p"])
    assert_golden(state["m"][0], facts["after"]["m0"], 0)
    assert_golden(state["v"][0], facts["after"]["v0"], 0)


def test_golden_mpmath(backend: str) -> None:
    facts = FACTS["mpmath"]
    for key, optimizer_class, decay in (
        ("adam", fused_adam.Adam, 0.0),
        ("adamw_0.01", fused_adam.AdamW, 0.01),
        ("l2_0.01", fused_adam.Adam, 0.01),
    ):
        p = np.array([facts["p"]])
        optimizer = optimizer_class(p, lr=facts["lr"], weight_decay=decay, backend=backend)
        for g in facts["g"]:
            optimizer.step(np.array([g]))
        assert_golden(p, facts["after"][key], facts["p"])
        if key != "l2_0.01":
            state = optimizer.state_dict()["state"][0]
            assert_golden(state["m"], facts["after"]["m (adam, adamw)"], 0)
            assert_golden(state["v"], facts["after"]["v (adam, adamw)"], 0)


@pytest.mark.parametrize("decay", [0.0, 0.004])
def test_golden_keras(decay: float, backend: str) -> None:
    """Keras prints 4 digits: its first step is lr * sign(g) but for eps, so with eps = 0 they are exact.

    With its own eps-hat of 1e-7, reached by eps / sqrt(1 - beta2**t), the step is shorter by a known part below 2e-6.
    """
    facts = FACTS["keras"]
    start, g = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 6.0, 7.0, 2.0])
    golden = np.array(facts["the same, weight_decay=.004" if decay else "single step p=[1,2,3,4] g=[1,6,7,2] lr=.5"])
    for eps_hat in (0.0, 1e-7):
        p = start.copy()
        eps = eps_hat / math.sqrt(1 - 0.999)
        fused_adam.AdamW(p, lr=0.5, eps=eps, weight_decay=decay, backend=backend).step(g)
        assert_golden(p, golden + 0.5 * (eps / (g + eps)), start)
        assert np.abs(p - golden).max() < 2e-6


def test_golden_keras_decay_alone(backend: str) -> None:
    p = np.array([2.0])
    optimizer = fused_adam.AdamW(p, lr=1.0, eps=1e-7, weight_decay=0.004, backend=backend)
    for _ in range(3):
        optimizer.step(np.zeros(1))
    assert_golden(p, 2 * 0.996**3, 2)
    printed = FACTS["keras"]["p=2 g=0 lr=1 wd=.004, three steps"]
    assert round(float(p[0]), 7) == printed


# --- bias correction --------------------------------------------------------------------------------------------------

_CS = (1.0, 0.9, 0.5, 1 - 0.9, 1 - 0.99, 1 - 0.999, 1 - 0.9999, 1e-6, 1.0 - (1 - 1e-8), 1e-12, 2.0**-53)
_TS = (
    1,
    2,
    3,
    4,
    7,
    10,
    63,
    64,
    65,
    1000,
    4095,
    10**5,
    2**24 - 1,
    2**24,
    2**24 + 1,
    10**9,
    2**40 + 1,
    2**62,
    2**63 - 1,
)


def _exact_gap(c: float, t: int) -> Decimal:
    """1 - (1 - c)**t to 60 digits, from the very float64 c."""
    with localcontext(prec=80):
        return 1 - (1 - Decimal(c)) ** t


def test_bias_correction() -> None:
    """Within 10 ulp of the exact value for every c and t, where 1 - beta**t in float64 loses all digits."""
    worst, worst_naive = 0.0, 0.0
    for c in _CS:
        for t in _TS:
            wanted = _exact_gap(c, t)
            ulp = Decimal(math.ulp(float(wanted)))
            worst = max(worst, float(abs(Decimal(bias_correction(c, t)) - wanted) / ulp))
            worst_naive = max(worst_naive, float(abs(Decimal(1 - (1 - c) ** t) - wanted) / ulp))
    print(f"bias correction: {worst:.2f} ulp; 1 - beta**t: {worst_naive:.2g} ulp")
    assert worst <= 10 < worst_naive


def test_bias_correction_at_its_ends() -> None:
    assert bias_correction(0.1, 0) == 0
    assert all(bias_correction(c, 1) == c for c in _CS)
    assert all(bias_correction(1.0, t) == 1 for t in _TS)
    assert bias_correction(0.001, 2**40) == 1
