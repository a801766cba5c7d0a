"""The two trainings: their data, their networks, and a learning rate for each rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fused_adam
from fused_adam.cli import network
from fused_adam.cli.exit_codes import CommandError, Exit

RULES: dict[str, Callable[..., Any]] = {
    "sgd": fused_adam.SGD,
    "momentum": partial(fused_adam.SGD, momentum=0.9),
    "nesterov": partial(fused_adam.SGD, momentum=0.9, nesterov=True),
    "adagrad": fused_adam.Adagrad,
    "rmsprop": fused_adam.RMSprop,
    "adam": fused_adam.Adam,
    "adamw": fused_adam.AdamW,
    "amsgrad": partial(fused_adam.Adam, amsgrad=True),
    "lion": fused_adam.Lion,
}


@dataclass(frozen=True)
class Data:
    """Inputs and targets, one row a sample; `x_test` is empty where there is nothing to classify."""

    x: Any
    y: Any
    x_test: Any
    y_test: Any


def _regression(rng: np.random.Generator) -> Data:
    """1,000 uniform samples of a random network of the same shape: its loss can fall towards zero."""
    x = rng.uniform(-1, 1, (1000, 10))
    _, y = network.forward(network.initial((10, 10, 1), rng, np.float64), x)
    return Data(x, y, x[:0], y[:0])


def _digits(rng: np.random.Generator) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin & Kaynak 1998), a fifth of them held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fix = "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        raise CommandError(fix, Exit.FAILED) from None
    pixels, labels = load_digits(return_X_y=True)
    x, y = pixels / 16, np.eye(10)[labels]
    order = rng.permutation(len(x))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Data(x[train], y[train], x[test], y[test])


@dataclass(frozen=True)
class Task:
    """`batch` None means all samples at once; `lr` is where the learning rate starts, for each rule."""

    name: str
    about: str
    sizes: tuple[int, int, int]
    load: Callable[[np.random.Generator], Data]
    loss: network.Loss
    loss_name: str
    rule: str
    epochs: int
    batch: int | None
    lr: dict[str, float]


TASKS = {
    "regression": Task(
        name="regression",
        about="10-10-1 ReLU network on 1,000 uniform samples",
        sizes=(10, 10, 1),
        load=_regression,
        loss=network.squared_error,
        loss_name="mean squared error",
        rule="adam",
        epochs=1000,
        batch=None,
        lr={
            "sgd": 0.2, "momentum": 0.03, "nesterov": 0.03, "adagrad": 0.1, "rmsprop": 2e-3,
            "adam": 1e-2, "adamw": 1e-2, "amsgrad": 1e-2, "lion": 2e-3,
        },
    ),
    "digits": Task(
        name="digits",
        about="64-128-10 ReLU network on 1,797 handwritten digits",
        sizes=(64, 128, 10),
        load=_digits,
        loss=network.cross_entropy,
        loss_name="cross-entropy, smoothed labels",
        rule="adamw",
        epochs=30,
        batch=32,
        lr={
            "sgd": 1.0, "momentum": 0.1, "nesterov": 0.1, "adagrad": 0.05, "rmsprop": 3e-3,
            "adam": 1e-2, "adamw": 1e-2, "amsgrad": 1e-2, "lion": 1e-3,
        },
    ),
}  # fmt: skip
