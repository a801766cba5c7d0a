"""Rules of one's own: an optimizer class from a function of a few assignments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fused_adam import _numbers
from fused_adam._base import Optimizer
from fused_adam._codegen import Rule, parse
from fused_adam._guard import Options
from fused_adam._part import ROW_STEPS
from fused_adam._update import Update


def rule(update: Callable[..., Any], coefficients: Callable[..., Mapping[str, float]] | None = None) -> type[Optimizer]:
    """An optimizer class of a rule of one's own, fused on every backend.

    Args:
        update: the rule, read from its source: ``p`` and ``g`` first, then states (which are returned after p) and
            coefficients. Assignments over names with ``+ - * /``, sqrt, maximum, minimum, absolute and sign; no
            literals and no branches. It is never called. States start at 0.
        coefficients: ``(t, **hyperparameters) -> {coefficient: number}``, called before each step with t = 1, 2, ...
            (and, with per_row_step, with that of each row that moves); its arguments after t, with their defaults, are
            the class's hyperparameters. Without it, each coefficient is a hyperparameter of its own that must be given.

    Returns:
        A class that is used like `Adam`: ``Class(params, *, backend="auto", ..., **hyperparameters)``. It pickles if it
        is reachable under the rule's name, as with ``@fused_adam.rule``.

    Raises:
        ValueError: the rule is outside this grammar; the message shows the line.

    >>> import numpy as np, fused_adam
    >>> @fused_adam.rule
    ... def signed(p, g, lr):
    ...     p = p - lr * sign(g)
    ...     return p
    """
    parsed = _parse(update)
    if coefficients is None:
        defaults: dict[str, Any] = dict.fromkeys(parsed.coefficients, inspect.Parameter.empty)
    else:
        arguments = list(inspect.signature(coefficients).parameters.values())
        if not arguments:
            raise ValueError(f"coefficients of rule {parsed.name!r} should take t first, then the hyperparameters")
        defaults = {a.name: a.default for a in arguments[1:]}
    for taken in {"self", "params", *Options.__annotations__} & set(defaults):
        raise ValueError(f"rule {parsed.name!r}: a hyperparameter cannot be called {taken!r}; choose another name")

    class Made(Optimizer):
        def __init__(self, params: Any, **given: Any) -> None:
            options = {name: given.pop(name) for name in Options.__annotations__ if name in given}
            hyperparameters = given
            for name in hyperparameters:
                if name not in defaults:
                    raise TypeError(f"{parsed.name} has no hyperparameter {name!r}; it has {list(defaults)}")
            values = {**defaults, **hyperparameters}
            for name, value in values.items():
                if value is inspect.Parameter.empty:
                    raise TypeError(f"{parsed.name} needs {name}=")
            super().__init__(params, values, **options)

        def _check_one(self, name: str, value: Any) -> Any:
            return _numbers.real(name, value)

        def _update(self, group: Mapping[str, Any]) -> Update:
            hyperparameters = {k: group[k] for k in defaults}
            if coefficients is None:
                return Update(parsed, None, (), (), hyperparameters)
            return Update(parsed, lambda t: values_at(t, hyperparameters), parsed.coefficients, (), {})

    def values_at(t: int, hyperparameters: Mapping[str, Any]) -> tuple[float, ...]:
        assert coefficients is not None
        values = coefficients(t, **hyperparameters)
        for name in parsed.coefficients:
            if name not in values:
                raise ValueError(f"coefficients of rule {parsed.name!r} did not return {name!r}")
        return tuple(_numbers.real(n, values[n]) for n in parsed.coefficients)

    Made.__name__ = update.__name__
    Made.__qualname__ = update.__qualname__
    Made.__module__ = update.__module__
    Made.__doc__ = update.__doc__
    return Made


def _parse(f: Callable[..., Any]) -> Rule:
    """`parse`, and the arguments and result that an optimizer needs."""
    rule = parse(f)
    if rule.arguments[:2] != ("p", "g"):
        raise ValueError(f"rule {rule.name!r}: the first two arguments should be p and g, got {rule.arguments}")
    if rule.outputs[0] != "p" or "g" in rule.outputs:
        raise ValueError(f"rule {rule.name!r}: return p first, then the states, and not g")
    for n in {"unscaling", "clipping"} & {*rule.arguments, *(a.target for a in rule.assignments)}:
        raise ValueError(f"rule {rule.name!r}: {n!r} is what gradients are multiplied by before it; use another name")
    if ROW_STEPS in rule.states:
        raise ValueError(f"rule {rule.name!r}: a state cannot be called {ROW_STEPS!r}; choose another name")
    assigned = {a.target for a in rule.assignments}
    for n in rule.outputs:
        if n not in assigned:
            raise ValueError(f"rule {rule.name!r}: {n!r} is returned but never assigned")
    for n in rule.coefficients:
        if n in assigned:
            raise ValueError(f"rule {rule.name!r}: {n!r} is assigned but not returned; use a new name for it")
    return rule
