"""What an optimizer class asks a step to do with one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fused_adam._codegen import Rule
from fused_adam._coefficients import Formula


class Update(NamedTuple):
    """What a group's hyperparameters ask for.

    formula: (t, *arguments) -> a number for each of names; arguments[0] is the learning rate. None if there are only
    constants: the other coefficients.
    """

    rule: Rule
    formula: Formula | None
    names: Sequence[str]
    arguments: tuple[float, ...]
    constants: Mapping[str, float]

    def at(self, t: int) -> list[float]:
        """The coefficients of step t >= 1, in the order of the rule."""
        values = dict(self.constants)
        if self.formula:
            values.update(zip(self.names, self.formula(t, *self.arguments), strict=True))
        return [*map(values.__getitem__, self.rule.coefficients)]
