"""Every class against torch.optim, in float64, to 1e-10 of the way it has moved, over 50 steps and on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import missing, require

import fused_adam

torch = require("torch")
if tuple(torch.__version__.split("+")[0].split(".")[:2]) != ("2", "13"):
    missing(f"torch {torch.__version__} is installed; the formulas here are those of 2.13")

STEPS = 50
SHAPES = [(3, 5), (17,), (), (2, 3, 4)]
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-3}),
    ("Adagrad", {"lr_decay": 0.01, "weight_decay": 0.1, "maximize": True}),
    *(
        ("RMSprop", {"lr": 1e-2, "momentum": momentum, "centered": centered, **more})
        for momentum in (0.0, 0.9)
        for centered in (False, True)
        for more in ({}, {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}, {"maximize": True})
    ),
    *(
        (name, {"amsgrad": amsgrad, **more})
        for name in ("Adam", "AdamW")
        for amsgrad in (False, True)
        for more in (
            {},
            {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
            {"maximize": True, "weight_decay": 0.0},
            {"maximize": True, "weight_decay": 0.1},
        )
    ),
]


class TorchLion(torch.optim.Optimizer):
    """torch has no Lion: algorithm 2 of Chen et al. 2023 in a few lines."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p -= group["lr"] * (direction + group["weight_decay"] * p)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


LION_ROWS = [
    ("Lion", {}),
    ("Lion", {"lr": 0.1, "betas": (0.5, 0.8)}),
    ("Lion", {"lr": 0.1, "weight_decay": 0.1}),
]


def assert_equals_torch(name: str, ours: dict[str, Any], theirs: dict[str, Any], backend: str) -> None:
    """Both step over the same parameters with the same gradients; p must agree after each of 50 steps."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in SHAPES]
    start = [p.copy() for p in params]
    tensors = [torch.tensor(p, requires_grad=True) for p in params]
    optimizer = getattr(fused_adam, name)(params, **ours, backend=backend)
    torch_class: Callable[..., Any] = TorchLion if name == "Lion" else getattr(torch.optim, name)
    torch_optimizer = torch_class(tensors, **theirs)
    for t in range(1, STEPS + 1):
        grads = [rng.normal(size=shape) + 0.3 for shape in SHAPES]
        if t % 7 == 0:
            grads[0][0] = 0  # as from a dead ReLU
        optimizer.step(grads)
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(g)
        torch_optimizer.step()
        for p, tensor, p0 in zip(params, tensors, start, strict=True):
            theirs_p = tensor.detach().numpy()
            error, moved = np.max(np.abs(p - theirs_p)), np.max(np.abs(theirs_p - p0))
            assert error <= 1e-10 * moved, f"{name} {ours} t={t}: {error} off after moving by {moved}"


def _id(row: Any) -> str:
    return f"{row[0]}({','.join(f'{k}={v}' for k, v in row[1].items())})".replace(" ", "")


@pytest.mark.parametrize("row", [*ROWS, *LION_ROWS], ids=_id)
def test_equals_torch(row: tuple[str, dict[str, Any]], backend: str) -> None:
    assert_equals_torch(*row, row[1], backend)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Lion"])
def test_one_percent_of_lr_is_caught(name: str, backend: str) -> None:
    with pytest.raises(AssertionError, match="off after moving"):
        assert_equals_torch(name, {"lr": 1.01e-2}, {"lr": 1e-2}, backend)


def test_adam_step_equals_torch(backend: str) -> None:
    """The function, for arrays and a step count kept elsewhere."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=1000)
    m, v, max_v = np.zeros((3, *p.shape))
    start, tensor = p.copy(), torch.tensor(p, requires_grad=True)
    torch_optimizer = torch.optim.AdamW([tensor], lr=1e-2, weight_decay=0.1, amsgrad=True)
    for t in range(1, STEPS + 1):
        g = rng.normal(size=p.shape)
        fused_adam.adamw_step(p, g, m, v, max_v=max_v, step=t, lr=1e-2, weight_decay=0.1, backend=backend)
        tensor.grad = torch.tensor(g)
        torch_optimizer.step()
        theirs = tensor.detach().numpy()
        assert np.max(np.abs(p - theirs)) <= 1e-10 * np.max(np.abs(theirs - start))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_defaults_are_torchs(name: str) -> None:
    """Every hyperparameter that both have defaults to the same number."""
    ours = getattr(fused_adam, name)(np.ones(1)).param_groups[0]
    theirs = getattr(torch.optim, name)([torch.ones(1)]).param_groups[0]
    shared = ours.keys() & theirs.keys() - {"params"}
    assert len(shared) >= 6
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
