"""TensorFlow 1's formula in float64, and variables and gradients for its tests."""

from __future__ import annotations

import numpy as np

from fused_adam import SparseGrad
from fused_adam.tf import AdamOptimizer

LR, BETA1, BETA2, EPSILON = 0.01, 0.9, 0.99, 0.05  # so large an epsilon that its place matters
SHAPES = {"a": (4, 3), "b": (5,), "c": (), "d": (2, 3, 2), "e": (6, 2)}
# The variables of each call: all, subsets, such as come late, and such as miss steps.
CALLS = ["ab", "a", "bc", "abcde", "e", "dca", "abcde"]


class Reference:
    """`_apply_dense` and `_apply_sparse` of TensorFlow 1 in float64, with its two running powers of the betas."""

    def __init__(self, variables):
        self.p = {name: np.array(v, np.float64) for name, v in variables.items()}
        self.m, self.v = {}, {}
        self.beta1_power, self.beta2_power = BETA1, BETA2

    def apply(self, grads):
        alpha = LR * np.sqrt(1 - self.beta2_power) / (1 - self.beta1_power)
        for name, g in grads.items():
            if g is None:
                continue
            m = self.m.setdefault(name, np.zeros_like(self.p[name]))
            v = self.v.setdefault(name, np.zeros_like(self.p[name]))
            m *= BETA1
            v *= BETA2
            if isinstance(g, SparseGrad):
                for row in set(np.asarray(g.indices).tolist()):
                    total = sum(x.astype(np.float64) for i, x in zip(g.indices, g.values, strict=True) if i == row)
                    m[row] += (1 - BETA1) * total
                    v[row] += (1 - BETA2) * total**2
            else:
                m += (1 - BETA1) * g
                v += (1 - BETA2) * np.square(g, dtype=np.float64)
            self.p[name] = self.p[name] - alpha * m / (np.sqrt(v) + EPSILON)
        self.beta1_power *= BETA1
        self.beta2_power *= BETA2


def make(seed, dtype=np.float64, names="abcde", order="C"):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(SHAPES[name]), dtype, order=order) for name in names}


def optimizer(backend="numpy", **changed):
    return AdamOptimizer(**{"learning_rate": LR, "beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON} | changed,
                         backend=backend)  # fmt: skip


def pairs(grads, variables):
    return [(g, variables[name]) for name, g in grads.items()]


def assert_close(opt, variables, reference, start, dtype=np.float64):
    """To rounding, in units of how far each variable has moved."""
    ulps = 200 * np.finfo(dtype).eps
    for name, p in variables.items():
        moved = np.abs(reference.p[name] - start[name]).max()
        assert np.abs(p - reference.p[name]).max() <= ulps * (moved + np.abs(p).max())
        for slot, expected in (("m", reference.m), ("v", reference.v)):
            if name in expected:
                wrong = np.abs(opt.get_slot(p, slot) - expected[name]).max()
                assert wrong <= ulps * np.abs(expected[name]).max()
            else:
                assert opt.get_slot(p, slot) is None
