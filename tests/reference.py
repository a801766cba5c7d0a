"""The rules in textbook form, in float64: what `fused-adam verify` and the tests hold every backend against.

A common source means a common mistake, so this file imports nothing of fused_adam and is written differently: the
averages as beta * m + (1 - beta) * g, the bias correction by explicit m-hat and v-hat, 1 - beta**t from expm1 and
log1p. It follows PyTorch where the papers leave a choice, or, for Adam, the library that `numerics` names. With
dtype=np.longdouble it is accurate enough to count the float64 ulps of a backend.

The states are named m (average of the gradient, or velocity), v (average or sum of its square), max_v (AMSGrad) and a
(centered RMSProp's average of the gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
States = dict[str, Array]
Update = tuple[Array, States]  # what is subtracted from p, and the new states

# The states of each rule and the defaults of its hyperparameters; each also takes weight_decay=0 and maximize=False.
_SGD = {"lr": 1e-3}
_MOMENTUM = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0}
_RMSPROP = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "numerics": "torch", "eps_root": 0.0}
RULES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sgd": ((), _SGD),
    "momentum": (("m",), _MOMENTUM),
    "nesterov": (("m",), _MOMENTUM),
    "adagrad": (("v",), {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10}),
    "rmsprop": (("v",), _RMSPROP),
    "rmsprop_centered": (("v", "a"), _RMSPROP),
    "rmsprop_momentum": (("v", "m"), _RMSPROP | {"momentum": 0.9}),
    "rmsprop_centered_momentum": (("v", "a", "m"), _RMSPROP | {"momentum": 0.9}),
    "adam": (("m", "v"), _ADAM),
    "adamw": (("m", "v"), _ADAM),
    "amsgrad": (("m", "v", "max_v"), _ADAM),
    "amsgradw": (("m", "v", "max_v"), _ADAM),
    "lion": (("m",), {"lr": 1e-4, "betas": (0.9, 0.99)}),
}
DECOUPLED = frozenset({"adamw", "amsgradw", "lion"})  # p shrinks by lr * weight_decay; elsewhere the decay is L2


def step(
    rule: str,
    p: Any,
    g: Any,
    states: Mapping[str, Any],
    t: int,
    *,
    dtype: Any = np.float64,
    weight_decay: float = 0.0,
    maximize: bool = False,
    **hyper: Any,
) -> tuple[Array, States]:
    """The parameter and the states after step `t` (1, 2, ...) of `rule`; the arguments are left as they are.

    An unknown rule is a KeyError, an unknown hyperparameter a TypeError; missing states start at zero.
    """
    names, defaults = RULES[rule]
    if unknown := set(hyper) - set(defaults):
        raise TypeError(f"{rule} takes {sorted(defaults)}, not {sorted(unknown)}")
    real = np.dtype(dtype).type
    chosen = defaults | hyper
    numerics = chosen.pop("numerics", "torch")
    h = {key: np.asarray(value, dtype) for key, value in chosen.items()}
    decay = real(weight_decay)
    p, g = np.asarray(p, dtype), np.asarray(g, dtype)
    old = {name: np.asarray(states.get(name, np.zeros_like(p)), dtype) for name in names}

    with np.errstate(all="ignore"):
        if maximize:
            g = -g
        decoupled = rule in DECOUPLED or numerics == "bitsandbytes"
        if not decoupled and weight_decay != 0:
            g = g + decay * p
        if "numerics" in defaults:
            update, new = _adam(numerics, g, old, real(t), h)
        else:
            update, new = _FAMILIES[rule.split("_")[0]](rule, g, old, real(t), h)
        shrink = 1 - h["lr"] * decay if decoupled and weight_decay != 0 else real(1)
        return np.asarray((p - update) * shrink if numerics == "bitsandbytes" else p * shrink - update), new


def _power_gap(beta: Array, t: Any) -> Any:
    """1 - beta**t without cancellation near beta = 1; at beta = 0 the logarithm is -inf and the gap 1."""
    return -np.expm1(t * np.log1p(-(1 - beta)))


def _descent(rule: str, g: Array, old: States, t: Any, h: States) -> Update:
    """Gradient descent, heavy ball (Polyak 1964) and Nesterov's momentum (Sutskever et al. 2013)."""
    if rule == "sgd":
        return h["lr"] * g, {}
    m = h["momentum"] * old["m"] + (g if t == 1 else (1 - h["dampening"]) * g)
    ahead = g + h["momentum"] * m if rule == "nesterov" else m
    return h["lr"] * ahead, {"m": m}


def _adagrad(rule: str, g: Array, old: States, t: Any, h: States) -> Update:
    """Duchi, Hazan & Singer 2011: v is the sum of the squares."""
    v = old["v"] + g**2
    return h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (np.sqrt(v) + h["eps"]), {"v": v}


def _rmsprop(rule: str, g: Array, old: States, t: Any, h: States) -> Update:
    """Tieleman & Hinton 2012; centered and with momentum as in Graves 2013, with eps outside the root."""
    new = {"v": h["alpha"] * old["v"] + (1 - h["alpha"]) * g**2}
    variance = new["v"]
    if "a" in old:
        new["a"] = h["alpha"] * old["a"] + (1 - h["alpha"]) * g
        variance = np.maximum(new["v"] - new["a"] ** 2, 0)
    scaled = g / (np.sqrt(variance) + h["eps"])
    if "m" in old:
        scaled = new["m"] = h["momentum"] * old["m"] + scaled
    return h["lr"] * scaled, new


def _adam(numerics: str, g: Array, old: States, t: Any, h: States) -> Update:
    """Kingma & Ba 2015, algorithm 1; AMSGrad (Reddi et al. 2018) over the raw v, but in optax over v-hat.

    TensorFlow and Keras take the eps-hat of the paper's section 2, which beside v-hat is eps / sqrt(1 - beta2**t);
    in MLX m-hat and v-hat are m and v; optax has an eps inside the root too.
    """
    beta1, beta2 = h["betas"]
    gap1, gap2 = (_power_gap(beta, t) if numerics != "mlx" else np.ones_like(beta) for beta in (beta1, beta2))
    new = {"m": beta1 * old["m"] + (1 - beta1) * g, "v": beta2 * old["v"] + (1 - beta2) * g**2}
    m_hat, v_hat = new["m"] / gap1, new["v"] / gap2
    if "max_v" in old:
        largest = np.maximum(old["max_v"], v_hat if numerics == "optax" else new["v"])
        new["max_v"] = largest
        v_hat = largest if numerics == "optax" else largest / gap2
    eps = h["eps"] / np.sqrt(gap2) if numerics in ("tf", "keras") else h["eps"]
    return h["lr"] * m_hat / (np.sqrt(v_hat + h["eps_root"]) + eps), new


def _lion(rule: str, g: Array, old: States, t: Any, h: States) -> Update:
    """Chen et al. 2023, algorithm 2; the sign of NaN is 0, as in PyTorch."""
    beta1, beta2 = h["betas"]
    c = beta1 * old["m"] + (1 - beta1) * g
    sign = (c > 0).astype(c.dtype) - (c < 0).astype(c.dtype)
    return h["lr"] * sign, {"m": beta2 * old["m"] + (1 - beta2) * g}


_FAMILIES: dict[str, Callable[[str, Array, States, Any, States], Update]] = {
    "sgd": _descent,
    "momentum": _descent,
    "nesterov": _descent,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "lion": _lion,
}
