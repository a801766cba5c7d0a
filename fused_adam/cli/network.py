"""A two-layer ReLU network in plain array code, which NumPy runs on the CPU and CuPy on a GPU.

Parameters and gradients live in flat buffers, so one fused step updates all four arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

# outputs, targets -> mean loss over the batch, its gradient with respect to the outputs
Loss = Callable[[Any, Any], tuple[Any, Any]]

LABEL_SMOOTHING = 0.1


def namespace(a: Any) -> Any:
    """The module that array `a` belongs to: numpy or cupy."""
    return import_module(type(a).__module__.partition(".")[0])


def initial(sizes: tuple[int, int, int], rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    """Weights for ReLU (He et al. 2015) and zero biases."""
    inputs, hidden, outputs = sizes
    return {
        "W1": (rng.standard_normal((inputs, hidden)) * (2 / inputs) ** 0.5).astype(dtype),
        "b1": np.zeros(hidden, dtype),
        "W2": (rng.standard_normal((hidden, outputs)) * (2 / hidden) ** 0.5).astype(dtype),
        "b2": np.zeros(outputs, dtype),
    }


def forward(params: Any, x: Any) -> tuple[Any, Any]:
    """Hidden activations and outputs."""
    hidden = namespace(x).maximum(x @ params["W1"] + params["b1"], 0)
    return hidden, hidden @ params["W2"] + params["b2"]


def backward(params: Any, grads: Any, x: Any, y: Any, loss: Loss) -> Any:
    """Write the gradients of the mean loss into the views of `grads`; returns the loss, which is left on the device."""
    hidden, outputs = forward(params, x)
    value, d_outputs = loss(outputs, y)
    d_hidden = (d_outputs @ params["W2"].T) * (hidden > 0)
    grads["W2"] = hidden.T @ d_outputs
    grads["b2"] = d_outputs.sum(axis=0)
    grads["W1"] = x.T @ d_hidden
    grads["b1"] = d_hidden.sum(axis=0)
    return value


def squared_error(outputs: Any, y: Any) -> tuple[Any, Any]:
    error = outputs - y
    return (error * error).mean(), error * (2 / error.size)


def cross_entropy(outputs: Any, y: Any) -> tuple[Any, Any]:
    """Of the softmax against one-hot rows `y`, smoothed (Szegedy et al. 2016)."""
    xp = namespace(outputs)
    y = y * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / y.shape[1]
    z = outputs - outputs.max(axis=1, keepdims=True)
    log_softmax = z - xp.log(xp.exp(z).sum(axis=1, keepdims=True))
    return -(y * log_softmax).sum(axis=1).mean(), (xp.exp(log_softmax) - y) / len(y)
