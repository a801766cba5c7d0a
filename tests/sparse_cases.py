"""What the tests of sparse gradients share: dense gradients of the same meaning, and all bytes of an optimizer."""

from __future__ import annotations

import pickle

import numpy as np

import fused_adam

CLASSES = [
    (fused_adam.SGD, {}),
    (fused_adam.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (fused_adam.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    (fused_adam.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    (fused_adam.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (fused_adam.AdamW, {"maximize": True}),
    (fused_adam.Lion, {"weight_decay": 0.1}),
]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def summed(shape, indices, values, dtype):
    """A dense gradient: duplicates added one after the other, as they come."""
    dense = np.zeros(shape, dtype)
    for row, value in zip(indices, values, strict=True):
        dense[row] += value
    return dense


def everything(opt):
    """The bytes of parameters and states, and t."""
    params = [p.tobytes() for part in opt._parts for p in part.given]
    return params, pickle.dumps(opt.state_dict())
