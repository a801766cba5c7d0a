"""(hyperparameters, t) -> float64 coefficients of a rule, each rounded once to the compute type by the backend.

Only ``+ - * /`` and ``sqrt`` in a fixed order, so that compiled code, on a CPU or a device, computes the same bits.
Each function but `bias_correction` takes t, then the learning rate, and is in FORMULAS with the names of its results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import sqrt


@lru_cache(maxsize=1024)  # of two steps one after the other, one at least starts from what the other has found
def bias_correction(c: float, t: int) -> float:
    """``1 - (1 - c)**t`` without cancellation, for c in (0, 1] and t >= 0.

    Doubling from the most significant bit of t: q(2n) = q(n) (2 - q(n)), q(n + 1) = q(n) + c (1 - q(n)).
    """
    if t == 0:
        return 0.0
    q = bias_correction(c, t >> 1)
    q = q * (2.0 - q)
    if t & 1:
        q = q + c * (1.0 - q)
    return q


def adamw(
    t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, float, float, float, float]:
    """c1, c2, step, eps, decay: PyTorch's mathematics, with the root of the bias correction moved into eps."""
    c1 = 1.0 - beta1
    c2 = 1.0 - beta2
    root = sqrt(bias_correction(c2, t))
    return c1, c2, lr * root / bias_correction(c1, t), eps * root, lr * weight_decay


def eps_hat(
    t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, float, float, float, float]:
    """As `adamw`, but eps, as it is given, stands beside the raw v: "epsilon hat" of Kingma & Ba 2015, section 2."""
    c1, c2, step, _, decay = adamw(t, lr, beta1, beta2, eps, weight_decay)
    return c1, c2, step, eps, decay


def uncorrected(
    t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, float, float, float, float]:
    """As `adamw`, without bias correction."""
    return 1.0 - beta1, 1.0 - beta2, lr, eps, lr * weight_decay


def adamw_root(
    t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, eps_root: float
) -> tuple[float, float, float, float, float, float]:
    """c1, c2, step, eps, root, decay: the bias correction moved into both eps."""
    c1, c2, step, eps, decay = adamw(t, lr, beta1, beta2, eps, weight_decay)
    return c1, c2, step, eps, eps_root * bias_correction(c2, t), decay


def amsgradw_hat(
    t: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, eps_root: float
) -> tuple[float, float, float, float, float, float, float]:
    """c1, c2, correction, step, eps, root, decay: v is corrected by itself, before its maximum is taken."""
    c1 = 1.0 - beta1
    c2 = 1.0 - beta2
    correction = 1.0 / bias_correction(c2, t)
    return c1, c2, correction, lr / bias_correction(c1, t), eps, eps_root, lr * weight_decay


def momentum(t: int, lr: float, mu: float, dampening: float) -> tuple[float, float, float]:
    """mu, rate, lr: the first gradient enters the momentum whole, as in PyTorch."""
    return mu, 1.0 if t == 1 else 1.0 - dampening, lr


def adagrad(t: int, lr: float, lr_decay: float, eps: float) -> tuple[float, float]:
    """lr, eps."""
    return lr / (1.0 + (t - 1) * lr_decay), eps


def rmsprop(t: int, lr: float, alpha: float, mu: float, eps: float) -> tuple[float, float, float, float]:
    """c, mu, lr, eps."""
    return 1.0 - alpha, mu, lr, eps


def lion(t: int, lr: float, beta1: float, beta2: float, weight_decay: float) -> tuple[float, float, float, float]:
    """c1, c2, lr, decay."""
    return 1.0 - beta1, 1.0 - beta2, lr, lr * weight_decay


Formula = Callable[..., tuple[float, ...]]
FORMULAS: dict[str, tuple[str, ...]] = {
    "adamw": ("c1", "c2", "step", "eps", "decay"),
    "eps_hat": ("c1", "c2", "step", "eps", "decay"),
    "uncorrected": ("c1", "c2", "step", "eps", "decay"),
    "adamw_root": ("c1", "c2", "step", "eps", "root", "decay"),
    "amsgradw_hat": ("c1", "c2", "correction", "step", "eps", "root", "decay"),
    "momentum": ("mu", "rate", "lr"),
    "adagrad": ("lr", "eps"),
    "rmsprop": ("c", "mu", "lr", "eps"),
    "lion": ("c1", "c2", "lr", "decay"),
}
