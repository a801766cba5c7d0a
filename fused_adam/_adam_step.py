"""`adam_step`, for arrays that are kept elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from fused_adam import _checks, _numbers, _optimizer
from fused_adam.backends import OVERRIDE, check_name, choose, load


def adam_step(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    max_v: Any = None,
    maximize: bool = False,
    backend: str = "auto",
) -> None:
    """One Adam step on arrays that are kept elsewhere, in place on p, m, v (and max_v, which turns AMSGrad on).

    Args:
        p, g, m, v, max_v: parameter, gradient, first and second moment, largest v so far: NumPy arrays, or arrays on
            one GPU, of one shape and dtype (float32 or float64) and one memory order, C or Fortran; no two may overlap.
            g is only read.
        step: t of this step: 1 on the first call.
        lr, betas, eps, weight_decay, maximize, backend: as in `Adam`; decoupled_weight_decay: as in `AdamW`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, and nothing is changed.
        RuntimeError: the named backend cannot run here.

    Reference: Kingma & Ba, ICLR 2015, algorithm 1; Loshchilov & Hutter, ICLR 2019, algorithm 2.
    """
    # None as long as another thread is still importing the module, too
    compiled = getattr(sys.modules.get("fused_adam.backends._numba_adam_step"), "adam_step", None)
    if (
        compiled is not None
        and type(backend) is str
        and (backend == "numba" or (backend == "auto" and not OVERRIDE))
        and max_v is None
        and compiled(p, g, m, v, step, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize)
    ):
        return
    in_python(p, g, m, v, step, lr, betas, eps, weight_decay, decoupled_weight_decay, max_v, maximize, backend)


def in_python(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    step: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    decoupled: Any,
    max_v: Any,
    maximize: Any,
    backend: Any,
) -> None:
    """`adam_step` where the compiled call did not apply or refused: check everything in Python, explain or run."""
    arrays = {"p": p, "g": g, "m": m, "v": v} | ({} if max_v is None else {"max_v": max_v})
    check_name(backend)
    t = _numbers.step_number(step)
    group = {
        "lr": _numbers.nonnegative("lr", lr),
        "betas": _numbers.betas("betas", betas),
        "eps": _numbers.nonnegative("eps", eps),
        "weight_decay": _numbers.nonnegative("weight_decay", weight_decay),
        "amsgrad": max_v is not None,
        "maximize": _numbers.flag("maximize", maximize),
        "numerics": "torch",
        "eps_root": 0.0,
    }
    update = _optimizer.adam(group, _numbers.flag("decoupled_weight_decay", decoupled))
    views = _checks.step_arrays(arrays)
    dtype = views[0].dtype
    values = update.at(t)
    _numbers.coefficients(update.rule.coefficients, values, dtype)
    p, g, *states = views
    load(choose(backend, p.size, _checks.device(p))).run(update.rule, values, p, g, states)


def adamw_step(p: Any, g: Any, m: Any, v: Any, *, step: int, weight_decay: float = 1e-2, **arguments: Any) -> None:
    """`adam_step` with decoupled weight decay, 0.01 by default."""
    adam_step(p, g, m, v, step=step, weight_decay=weight_decay, decoupled_weight_decay=True, **arguments)
