"""What an optimizer class asks a step to do with one group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
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

    def at(self, t: int) -> Sequence[float]:
        """The coefficients of step t >= 1, in the order of the rule."""
        results = self.formula(t, *self.arguments) if self.formula else ()
        return _picker(self.rule, (*self.names, *self.constants))((*results, *self.constants.values()))


@lru_cache(maxsize=256)
def _picker(rule: Rule, names: tuple[str, ...]) -> Callable[[tuple[float, ...]], tuple[float, ...]]:
    """What puts values of these names into the order of the rule."""
    where = [names.index(name) for name in rule.coefficients]
    if len(where) > 1:
        return itemgetter(*where)
    return lambda values: tuple(values[k] for k in where)
