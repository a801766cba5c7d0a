"""Adam in the form of other libraries: against the packages, or their sources where those want a GPU."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import same_bits
from peers import PEERS, arrays

import fused_adam
from fused_adam._numbers import NUMERICS

FACTS = json.loads((Path(__file__).parent / "golden" / "facts.json").read_text())
STEPS = 50
SHAPES = {"dense": {"kernel": (3, 5), "bias": (5,)}, "scale": (), "a": {"b": (2, 3, 4)}}
LR = 2.0**-7  # MLX keeps it in float32
EACH: list[dict[str, Any]] = [
    {"lr": LR},
    {"lr": LR, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
]
AMSGRAD = [row | {"amsgrad": True} for row in EACH]
ROOT = [row | {"eps_root": 1e-2} for row in (*EACH, *AMSGRAD)]
MORE = {"torch": AMSGRAD, "keras": AMSGRAD, "optax": [*AMSGRAD, *ROOT]}
ROWS = [
    (numerics, name, row)
    for numerics in NUMERICS
    for name in ("Adam", "AdamW")
    for row in (*EACH, *MORE.get(numerics, []))
    # these packages have no L2 penalty: their losses would
    if name == "AdamW" or numerics not in ("keras", "mlx") or "weight_decay" not in row
]


def tree(make: Any, shapes: Any = SHAPES) -> Any:
    return {key: tree(make, s) for key, s in shapes.items()} if isinstance(shapes, dict) else make(shapes)


def gradients(rng: np.random.Generator, t: int) -> Any:
    grads = tree(lambda shape: np.asarray(rng.normal(size=shape) * (1 + 5 * (t < 10)) + 0.3))
    if t % 7 == 0:
        grads["dense"]["kernel"][0] = 0  # as from a dead ReLU
    return grads


def assert_equals_peer(numerics: str, name: str, ours: dict[str, Any], theirs: dict[str, Any], backend: str) -> None:
    """p agrees to 1e-10 of the way it has moved, after each of 50 steps; early gradients are large, for AMSGrad."""
    rng = np.random.default_rng(0)
    params = tree(lambda shape: np.asarray(rng.normal(size=shape)))
    start = [p.copy() for p in arrays(params)]
    arguments = {"weight_decay": 0.0, "numerics": numerics} | ours
    optimizer = getattr(fused_adam, name)(params, **arguments, backend=backend)
    peer = PEERS[numerics](name, params, theirs)
    for t in range(1, STEPS + 1):
        grads = gradients(rng, t)
        optimizer.step(grads)
        peer.step(grads)
        for p, other, p0 in zip(arrays(params), peer.params(), start, strict=True):
            assert other.dtype == np.float64
            error, moved = np.max(np.abs(p - other)), np.max(np.abs(other - p0))
            assert error <= 1e-10 * moved, f"{numerics} {name} {ours} t={t}: {error} off after moving by {moved}"


def _id(row: Any) -> str:
    return f"{row[0]}-{row[1]}({','.join(f'{k}={v}' for k, v in row[2].items() if k != 'lr')})".replace(" ", "")


@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_equals_the_library(row: tuple[str, str, dict[str, Any]], backend: str) -> None:
    assert_equals_peer(*row, row[2], backend)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("wrong", [{"lr": 1.01 * LR}, {"eps": 1.1e-3}, {"weight_decay": 0.101}], ids=str)
def test_a_little_off_is_caught(numerics: str, wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="off after moving"):
        assert_equals_peer(numerics, "AdamW", EACH[1] | wrong, EACH[1], "numpy")


@pytest.mark.parametrize("numerics", [n for n in NUMERICS if n not in ("torch", "apex")])
def test_it_matters_which(numerics: str) -> None:
    """PyTorch's formula in the place of each that is another; optax differs in AMSGrad."""
    row = EACH[1] | {"amsgrad": numerics == "optax"}
    with pytest.raises(AssertionError, match="off after moving"):
        assert_equals_peer(numerics, "AdamW", row | {"numerics": "torch"}, row, "numpy")


# --- published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "right"), [(1, True), (1.01, False)])
def test_golden_tensorflow(lr: float, right: bool, backend: str) -> None:
    """Its numbers are of eps outside, which at this size is 1e-4 of the way from its own; its own test allows 3e-4."""
    facts = FACTS["tensorflow"]
    start, g = np.array(facts["p"]), np.array(facts["g"])
    p = start.copy()
    optimizer = fused_adam.Adam(p, lr=lr * facts["lr"], numerics="tf", backend=backend)
    for _ in range(facts["steps"]):
        optimizer.step(g)
    golden = np.array(facts["after"]["p"])
    assert np.all(np.abs(p - golden) <= 1e-4 * np.abs(golden - start)) == right


@pytest.mark.parametrize(("lr", "right"), [(1, True), (1.01, False)])
@pytest.mark.parametrize("decay", [0.0, 0.004])
def test_golden_keras(decay: float, lr: float, right: bool, backend: str) -> None:
    """It prints 4 digits, and eps-hat shortens this first step by 4e-6 of itself at most."""
    facts = FACTS["keras"]
    start, g = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 6.0, 7.0, 2.0])
    golden = np.array(facts["the same, weight_decay=.004" if decay else "single step p=[1,2,3,4] g=[1,6,7,2] lr=.5"])
    p = start.copy()
    fused_adam.AdamW(p, 0.5 * lr, eps=1e-7, weight_decay=decay, numerics="keras", backend=backend).step(g)
    assert np.all(np.abs(p - golden) <= 4e-6 * np.abs(golden - start)) == right


def test_golden_keras_decay_alone(backend: str) -> None:
    p = np.array([2.0])
    optimizer = fused_adam.AdamW(p, lr=1.0, eps=1e-7, weight_decay=0.004, numerics="keras", backend=backend)
    for _ in range(3):
        optimizer.step(np.zeros(1))
    assert round(float(p[0]), 7) == FACTS["keras"]["p=2 g=0 lr=1 wd=.004, three steps"]


# --- the argument -----------------------------------------------------------------------------------------------------


def _steps(cls: Any, steps: int = 5, **arguments: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    p = rng.normal(size=100).astype(np.float32)
    optimizer = cls(p, **arguments)
    for _ in range(steps):
        optimizer.step(rng.normal(size=100).astype(np.float32))
    return p, optimizer


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [fused_adam.Adam, fused_adam.AdamW])
def test_the_same_mathematics_is_the_same_bits(cls: Any, decay: float, backend: str) -> None:
    default, optimizer = _steps(cls, weight_decay=decay, backend=backend)
    assert optimizer.param_groups[0]["numerics"] == "torch" and optimizer.param_groups[0]["eps_root"] == 0
    for numerics in ("torch", "apex", "optax"):
        assert same_bits(_steps(cls, weight_decay=decay, numerics=numerics, backend=backend)[0], default)
    for numerics in ("tf", "keras", "mlx"):
        assert not same_bits(_steps(cls, weight_decay=decay, numerics=numerics, backend=backend)[0], default)


def test_bitsandbytes_decays_alike_in_both_classes(backend: str) -> None:
    adam, adamw = (
        _steps(cls, weight_decay=0.1, numerics="bitsandbytes", backend=backend)[0]
        for cls in (fused_adam.Adam, fused_adam.AdamW)
    )
    assert same_bits(adam, adamw)
    assert not same_bits(adam, _steps(fused_adam.AdamW, weight_decay=0.1, backend=backend)[0])


@pytest.mark.parametrize("cls", [fused_adam.Adam, fused_adam.AdamW])
def test_what_a_library_has_not_is_refused(cls: Any) -> None:
    p = np.ones(3)
    for numerics in NUMERICS:
        if numerics in ("torch", "keras", "optax"):
            cls(p, amsgrad=True, numerics=numerics)
        else:
            with pytest.raises(ValueError, match=f'numerics="{numerics}" has no amsgrad; torch, keras, optax have it'):
                cls(p, amsgrad=True, numerics=numerics)
        if numerics == "optax":
            cls(p, eps_root=0.1, numerics=numerics)
        else:
            with pytest.raises(ValueError, match=f'eps_root is for numerics="optax", not "{numerics}"'):
                cls(p, eps_root=0.1, numerics=numerics)


def test_groups_have_their_own_and_may_change_it(backend: str) -> None:
    g = np.full(3, 0.1)
    alone = {}
    for numerics in ("torch", "keras", "mlx"):
        p = np.ones(3)
        fused_adam.Adam(p, eps=0.1, numerics=numerics, backend=backend).step(g)
        alone[numerics] = p
    first, second = np.ones(3), np.ones(3)
    groups = [{"params": first, "numerics": "mlx"}, {"params": second}]
    optimizer = fused_adam.Adam(groups, eps=0.1, numerics="keras", backend=backend)
    optimizer.step([g, g])
    assert same_bits(first, alone["mlx"]) and same_bits(second, alone["keras"])
    optimizer = fused_adam.Adam(third := np.ones(3), lr=0.0, eps=0.1, backend=backend)
    optimizer.step(g)
    optimizer.param_groups[0] |= {"lr": 1e-3, "numerics": "mlx"}
    optimizer.load_state_dict(optimizer.state_dict() | {"t": 0, "state": [{"m": 0 * g, "v": 0 * g}]})
    optimizer.step(g)
    assert same_bits(third, alone["mlx"])


def test_it_is_saved_and_older_state_dicts_are_torchs(backend: str) -> None:
    _, optimizer = _steps(fused_adam.Adam, numerics="optax", eps_root=0.1, backend=backend)
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["numerics"], saved["param_groups"][0]["eps_root"]) == ("optax", 0.1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state_dict()["param_groups"] == saved["param_groups"]
    del saved["param_groups"][0]["numerics"], saved["param_groups"][0]["eps_root"]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["numerics"], group["eps_root"]) == ("torch", 0.0)


def test_adam_step_has_none() -> None:
    arrays = [np.ones(3) for _ in "pgmv"]
    with pytest.raises(TypeError, match="numerics"):
        fused_adam.adam_step(*arrays, step=1, numerics="keras")  # type: ignore[call-arg]
