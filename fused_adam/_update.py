"""What an optimizer class asks a step to do with one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
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
        results = self.formula(t, *self.arguments) if self.formula else ()
        values = (*results, *self.constants.values())
        return [values[k] for k in _positions(self.rule.coefficients, (*self.names, *self.constants))]


@lru_cache(maxsize=256)
def _positions(wanted: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """Where each of the wanted names stands."""
    return [names.index(name) for name in wanted]
