"""Steps where some rows stay, or have a t of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fused_adam import _numbers
from fused_adam._layout import leaves
from fused_adam._part import Part
from fused_adam._sparse import Gather, Mask, SparseGrad, gather, row_masks
from fused_adam._update import Update
from fused_adam.backends import Gradients, Loose

if TYPE_CHECKING:
    from fused_adam._base import Optimizer


def step(
    optimizer: Optimizer,
    t: int,
    updates: Sequence[Update],
    coefficients: Sequence[Sequence[float]],
    gradients: Sequence[Gradients],
    masks: Sequence[Sequence[Mask | None]],
    options: tuple[Any, ...],
) -> None:
    """Step number t. masks: one for each parameter of each part."""
    rules = [u.rule for u in updates]
    loose = [
        given if isinstance(given, Loose) else Loose(part.names, [g for _, g in leaves(given, "")], part.parameters)
        for part, given in zip(optimizer._parts, gradients, strict=True)
    ]
    gathers: list[list[Gather | None]] = []
    for part, update, values, given, mine in zip(optimizer._parts, updates, coefficients, loose, masks, strict=True):

        def at(number: int, part: Part = part, u: Update = update, values: Sequence[float] = values) -> Sequence[float]:
            return _coefficients_at(number, part, u) if optimizer.per_row_step else values

        each = zip(part.names, given.arrays, mine, part.parameters, part.row_steps, strict=True)
        gathers.append([gather(name, g, mask, p, t, steps, at) for name, g, mask, p, steps in each])
    if any(moved is not None for some in gathers for moved in some):
        optimizer._stepper.step_rows(t, rules, coefficients, loose, gathers, *options)
    else:  # a mask of nothing but None
        optimizer._stepper.step(t, rules, coefficients, gradients, *options)


def masks_of(optimizer: Optimizer, mask: Any) -> list[list[Mask | None]]:
    """One for each parameter of each part."""
    masks: list[list[Mask | None]] = [[None] * len(part.names) for part in optimizer._parts]
    for found, index in zip(row_masks(mask, optimizer._trees, optimizer._one_group), optimizer._index, strict=True):
        for (part, j), mine in zip(index, found, strict=True):
            masks[part][j] = mine
    return masks


def has_rows(given: Gradients) -> bool:
    """Whether a gradient of some rows is among them; there is none among those that are known again."""
    if type(given) is not Loose or given.given:
        return False
    return any(issubclass(kind, SparseGrad) for kind in {*map(type, given.arrays)})


def _coefficients_at(t: int, part: Part, update: Update) -> Sequence[float]:
    values = update.at(t)
    _numbers.coefficients(update.rule.coefficients, values, part.dtype)
    return values
