"""Every update rule, written once.

A rule is written in the intersection of Python and C++: assignments over names with ``+ - * /`` and the intrinsics
``sqrt``, ``maximum``, ``minimum``, ``absolute`` and ``sign``; no literals and no branches. `_codegen` reads its source,
so the text below is what every backend runs. The order of operations is part of the contract: it fixes the bits.

``p`` is the parameter and ``g`` its gradient; what a rule returns beside ``p`` are its states; the remaining arguments
are coefficients, computed by the functions of the same name in `_coefficients`.

Where u has a name of its own, the compiler for CUDA would else not find registers for all of a float64 step.

Moving averages are written ``(m - c1 * m) + c1 * g`` with c1 = 1 - beta1: beta is never rounded apart from 1 - beta, so
float32 drifts twenty times less than with ``beta1 * m + (1 - beta1) * g``, and beta = 0 is exact.
"""

# The rules are source text for `_codegen`; they are compiled or printed, never called as they stand.
# ruff: noqa: F821
# mypy: disable-error-code="no-untyped-def, name-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def sgd(p, g, lr):
    """Gradient descent (Cauchy 1847; Robbins & Monro 1951)."""
    p = p - lr * g
    return p


def momentum(p, g, m, mu, rate, lr):
    """Heavy ball (Polyak 1964). `rate` is 1 - dampening, and 1 at the first step, as in PyTorch."""
    m = mu * m + rate * g
    p = p - lr * m
    return p, m


def nesterov(p, g, m, mu, lr):
    """Nesterov 1983 in the form of Sutskever et al. 2013, as in PyTorch: the step looks ahead along m."""
    m = mu * m + g
    p = p - lr * (g + mu * m)
    return p, m


def adagrad(p, g, v, lr, eps):
    """Duchi, Hazan & Singer 2011. `lr` already holds the learning rate decay."""
    v = v + g * g
    p = p - lr * (g / (sqrt(v) + eps))
    return p, v


def rmsprop(p, g, v, c, lr, eps):
    """Tieleman & Hinton 2012, lecture 6.5; eps outside the root, as in PyTorch."""
    v = (v - c * v) + (c * g) * g
    p = p - lr * (g / (sqrt(v) + eps))
    return p, v


def rmsprop_momentum(p, g, v, m, c, mu, lr, eps):
    """RMSProp with a heavy ball over the scaled gradient, as in PyTorch."""
    v = (v - c * v) + (c * g) * g
    m = mu * m + g / (sqrt(v) + eps)
    p = p - lr * m
    return p, v, m


def rmsprop_centered(p, g, v, a, c, lr, eps, zero):
    """Graves 2013, eq. 38 to 45: the variance, not the second moment, scales the step.

    Rounding can take v - a * a below zero; the maximum keeps its root real.
    """
    v = (v - c * v) + (c * g) * g
    a = (a - c * a) + c * g
    p = p - lr * (g / (sqrt(maximum(v - a * a, zero)) + eps))
    return p, v, a


def rmsprop_centered_momentum(p, g, v, a, m, c, mu, lr, eps, zero):
    """Graves 2013, eq. 38 to 45, with its momentum."""
    v = (v - c * v) + (c * g) * g
    a = (a - c * a) + c * g
    m = mu * m + g / (sqrt(maximum(v - a * a, zero)) + eps)
    p = p - lr * m
    return p, v, a, m


def adam(p, g, m, v, c1, c2, step, eps):
    """Kingma & Ba 2015, algorithm 1; the bias correction is folded into `step` and `eps`."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(v) + eps))
    return p, m, v


def adamw(p, g, m, v, c1, c2, step, eps, decay):
    """Loshchilov & Hutter 2019, algorithm 2; bias correction folded into `step` and `eps`."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - (decay * p + step * (m / (sqrt(v) + eps)))
    return p, m, v


def amsgrad(p, g, m, v, max_v, c1, c2, step, eps):
    """Reddi, Kale & Kumar 2018; the maximum is over the raw v, as in PyTorch."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, v)
    p = p - step * (m / (sqrt(max_v) + eps))
    return p, m, v, max_v


def amsgradw(p, g, m, v, max_v, c1, c2, step, eps, decay):
    """AMSGrad with the decoupled decay of Loshchilov & Hutter 2019."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, v)
    u = m / (sqrt(max_v) + eps)
    p = p - (decay * p + step * u)
    return p, m, v, max_v


def adam_root(p, g, m, v, c1, c2, step, eps, root):
    """Adam with a second eps, `root`, inside the root, as in optax: the step can be differentiated at v = 0."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    p = p - step * (m / (sqrt(v + root) + eps))
    return p, m, v


def adamw_root(p, g, m, v, c1, c2, step, eps, root, decay):
    """`adam_root` with the decoupled decay of Loshchilov & Hutter 2019."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    u = m / (sqrt(v + root) + eps)
    p = p - (decay * p + step * u)
    return p, m, v


def adamw_after(p, g, m, v, c1, c2, step, eps, decay):
    """Adam whose decoupled decay takes the p that the step has left, as bitsandbytes has it in CUDA.

    ``p = p - u`` and then ``p = p - decay * p``, written so that p is rounded once.
    """
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    u = step * (m / (sqrt(v) + eps))
    p = p - (u + decay * (p - u))
    return p, m, v


def amsgrad_hat(p, g, m, v, max_v, c1, c2, correction, step, eps, root):
    """AMSGrad over the corrected v (`correction` is 1 / (1 - beta2**t)), with eps_root, as in optax."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, correction * v)
    u = m / (sqrt(max_v + root) + eps)
    p = p - step * u
    return p, m, v, max_v


def amsgradw_hat(p, g, m, v, max_v, c1, c2, correction, step, eps, root, decay):
    """`amsgrad_hat` with the decoupled decay of Loshchilov & Hutter 2019."""
    m = (m - c1 * m) + c1 * g
    v = (v - c2 * v) + (c2 * g) * g
    max_v = maximum(max_v, correction * v)
    u = m / (sqrt(max_v + root) + eps)
    p = p - (decay * p + step * u)
    return p, m, v, max_v


def lion(p, g, m, c1, c2, lr):
    """Chen et al. 2023, algorithm 2."""
    p = p - lr * sign((m - c1 * m) + c1 * g)
    m = (m - c2 * m) + c2 * g
    return p, m


def lionw(p, g, m, c1, c2, lr, decay):
    """Chen et al. 2023, algorithm 2, with its decoupled decay."""
    p = p - (decay * p + lr * sign((m - c1 * m) + c1 * g))
    m = (m - c2 * m) + c2 * g
    return p, m


def unscale(g, unscaling):
    """Prelude: the gradient of a loss that was multiplied by a scale; `unscaling` is 1 / scale."""
    g = unscaling * g
    return g


def clip(g, clipping):
    """Prelude: a gradient whose global norm was too large; after `unscale`."""
    g = clipping * g
    return g


def maximize(g, ascent):
    """Prelude: ascend instead of descend (`ascent` is -1)."""
    g = ascent * g
    return g


def l2(p, g, wd):
    """Prelude: the gradient of an L2 penalty; after `maximize`, as in PyTorch."""
    g = g + wd * p
    return g


RULES: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        sgd, momentum, nesterov, adagrad,
        rmsprop, rmsprop_momentum, rmsprop_centered, rmsprop_centered_momentum,
        adam, adamw, amsgrad, amsgradw,
        adam_root, adamw_root, adamw_after, amsgrad_hat, amsgradw_hat,
        lion, lionw,
    )
}  # fmt: skip
PRELUDES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (unscale, clip, maximize, l2)}
