"""The gradients of a step, matched to the parts of an optimizer; backends check the arrays themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_adam import _checks
from fused_adam._cuda_arrays import never_moves
from fused_adam._layout import FlatBuffer, match
from fused_adam._part import Part
from fused_adam.backends import Gradients, Loose

if TYPE_CHECKING:
    from fused_adam._base import Optimizer

_MISSING = object()


def of_step(optimizer: Optimizer, grads: Any) -> list[Gradients]:
    """Those given to `Optimizer.step`."""
    groups = _by_group(optimizer, grads)
    return [_of_part(optimizer, part, groups) for part in optimizer._parts]


def of_pairs(optimizer: Optimizer, grads_and_vars: Iterable[tuple[Any, Any]]) -> list[Gradients]:
    """Those given to `Optimizer.apply_gradients`."""
    positions = {id(p): (k, j) for k, part in enumerate(optimizer._parts) for j, p in enumerate(part.given)}
    gradients: list[list[Any]] = [[_MISSING] * len(part.parameters) for part in optimizer._parts]
    for n, pair in enumerate(grads_and_vars):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"grads_and_vars[{n}] should be a (gradient, parameter) pair, got {_checks.kind(pair)}")
        g, p = pair
        if id(p) not in positions:
            raise ValueError(f"grads_and_vars[{n}]: not a parameter of this optimizer; pass the arrays it was given")
        k, j = positions[id(p)]
        if gradients[k][j] is not _MISSING:
            raise ValueError(f"grads_and_vars[{n}]: this parameter came before; pass each once, gradients summed")
        gradients[k][j] = g
    for part, gs in zip(optimizer._parts, gradients, strict=True):
        for name, g in zip(part.names, gs, strict=True):
            if g is _MISSING:
                raise ValueError(f"the gradient of {name.replace('grads', 'params', 1)} is missing; pass one for each")
    loose = zip(optimizer._parts, gradients, strict=True)
    return [Loose(part.names, gs, part.parameters) for part, gs in loose]


def _by_group(optimizer: Optimizer, grads: Any) -> Sequence[Any]:
    if optimizer._one_group:
        return [grads]
    if not isinstance(grads, list | tuple):
        raise ValueError(f"grads should be a list with one entry for each group, got {_checks.kind(grads)}")
    if len(grads) != len(optimizer.param_groups):
        raise ValueError(f"grads has {len(grads)} entries but there are {len(optimizer.param_groups)} groups")
    return grads


def _of_part(optimizer: Optimizer, part: Part, groups: Sequence[Any]) -> Gradients:
    grads, last = groups[part.group], part.last_gradient
    path = optimizer._path(part.group)
    if optimizer.param_groups[part.group]["params"] is not optimizer._params[part.group]:
        raise ValueError(f'param_groups[{part.group}]["params"] was replaced; make a new optimizer for that')
    if last is not None:
        if grads is last or (type(grads) is list and type(last) is Loose and last.is_of(grads)):
            return last  # their memory never moves, so what was found of them still holds
        part.remembers = part.remembers and type(last) is not Loose
        part.last_gradient = None
    if part.flat is not None and isinstance(grads, FlatBuffer):
        _checks.same_place(path, grads.memory.device, "its parameter", optimizer._device)
        extent = np.array([grads.address], np.int64), np.array([grads.data.nbytes], np.int64)
        if optimizer._writes.first_overlap(*extent) >= 0:
            raise _checks.overlap(path)
        if grads.layout == part.flat.layout:
            part.last_gradient = grads
            return grads
    matched = list(match(grads, optimizer._trees[part.group], path))
    mine = [g for g, (k, _) in zip(matched, optimizer._index[part.group], strict=True) if optimizer._parts[k] is part]
    loose = Loose(part.names, mine, part.parameters)
    if part.remembers and type(grads) is list and all(map(never_moves, grads)):
        part.last_gradient = loose = loose._replace(given=grads.copy())
    return loose
