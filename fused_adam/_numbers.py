"""Every check of a hyperparameter, a scalar or a step count, and its message: what was given, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fused_adam._checks import kind
from fused_adam._cuda_arrays import view

MAX_STEP = 2**63 - 1
# The largest float64 that rounds to a finite float32.
FLOAT32_LIMIT = 3.4028235677973362e38


def real(name: str, x: Any) -> float:
    """A finite number as float. Raises TypeError or ValueError."""
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | float | np.integer | np.floating):
        raise TypeError(f"{name} should be a number, got {x!r}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} should be finite, got {value}")
    return value


def nonnegative(name: str, x: Any) -> float:
    value = real(name, x)
    if value < 0:
        raise ValueError(f"{name} should be at least 0, got {x}")
    return value


def decay_rate(name: str, x: Any) -> float:
    value = real(name, x)
    if not 0 <= value < 1:
        raise ValueError(f"{name} should be in [0, 1), got {x}")
    return value


def betas(name: str, x: Any) -> tuple[float, float]:
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"{name} should be a pair of numbers, got {x!r}")
    return decay_rate("beta1", x[0]), decay_rate("beta2", x[1])


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} should be True or False, got {x!r}")
    return bool(x)


def max_norm(name: str, x: Any) -> float | None:
    """A number > 0; inf is one that nothing exceeds."""
    if x is None or (isinstance(x, float | np.floating) and x == math.inf):
        return None if x is None else math.inf
    value = real(name, x)
    if value <= 0:
        raise ValueError(f"{name} should be above 0, or None for no limit, got {x}")
    return value


def _scalar(name: str, x: Any) -> Any:
    """A number, or that in an array of one on the host."""
    if isinstance(x, bool | int | float | np.generic):
        return x
    if view(name, x) is not None:
        needs = "the cupy backend and device_scalars=True (or max_grad_norm or skip_nonfinite)"
        raise ValueError(f"{name} is on a GPU, which needs {needs}; pass a number")
    masked = isinstance(x, np.ma.MaskedArray)
    if not isinstance(x, np.ndarray) or masked or x.size != 1:
        shape = f" of shape {x.shape}" if isinstance(x, np.ndarray) and not masked else ""
        raise TypeError(f"{name} should be a number or an array of one, got {kind(x)}{shape}")
    return x.reshape(())[()]


def grad_scale(x: Any) -> float:
    """What gradients are to be divided by. Arrays may hold anything: the step is skipped if it makes no sense."""
    if isinstance(x, int | float | np.generic):
        value = real("grad_scale", x)
        if not value > 0:
            raise ValueError(f"grad_scale should be above 0, got {x}")
        return value
    held = _scalar("grad_scale", x)
    if np.asarray(held).dtype.kind not in "fiu":
        raise TypeError(f"grad_scale should hold a number, got {kind(x)}")
    return float(held)


def found_inf(x: Any) -> bool:
    if x is None:
        return False
    held = np.asarray(_scalar("found_inf", x))
    if held.dtype.kind not in "fiub":
        raise TypeError(f"found_inf should hold a number, got {kind(x)}")
    return bool(held != 0)


def step_number(x: Any, least: int = 1, name: str = "step") -> int:
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} should be an int, got {x!r}")
    if not least <= x <= MAX_STEP:
        given = x if abs(int(x)) < 2**64 else "a larger one"  # Python refuses to print very long integers
        hint = "; it is 1 on the first call" if least else ""
        raise ValueError(f"{name} should be in [{least}, 2**63), got {given}{hint}")
    return int(x)


# Libraries whose form of Adam can be asked for; `_optimizer.Adam` says what they are.
NUMERICS = ("torch", "tf", "keras", "apex", "optax", "bitsandbytes", "mlx")


def numerics(name: str, x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{name} should be a string, got {x!r}")
    if x not in NUMERICS:
        raise ValueError(f"{name} should be one of {', '.join(NUMERICS)}, got {x!r}")
    return x


HYPERPARAMETERS = {
    "lr": nonnegative,
    "betas": betas,
    "eps": nonnegative,
    "weight_decay": nonnegative,
    "momentum": nonnegative,
    "dampening": real,
    "lr_decay": nonnegative,
    "initial_accumulator_value": nonnegative,
    "alpha": decay_rate,
    "nesterov": flag,
    "centered": flag,
    "amsgrad": flag,
    "maximize": flag,
    "numerics": numerics,
    "eps_root": nonnegative,
}


def coefficients(names: Sequence[str], values: Sequence[float], dtype: np.dtype[Any]) -> None:
    """Raises ValueError for a coefficient that is not finite in the compute type."""
    limit = FLOAT32_LIMIT if dtype == np.float32 else math.inf
    if sum(map(abs, values)) < limit:  # quickly, and false of NaN
        return
    for name, value in zip(names, values, strict=True):
        if not abs(value) <= limit or value in (math.inf, -math.inf):
            raise ValueError(f"coefficient {name} is {value}, which {dtype} cannot hold; use smaller hyperparameters")
