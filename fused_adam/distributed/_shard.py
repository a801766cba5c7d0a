"""What one rank owns of one bucket: an optimizer over parts of parameters, which knows where these parts begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fused_adam import _gradients, _storage
from fused_adam._arrays import Array, carrier
from fused_adam._base import Optimizer
from fused_adam._norm import unscaling
from fused_adam.distributed._plan import Piece


class Shard:
    """pieces: of one or more parameters, at least one element. optimizer: over them, a list of groups.

    Args:
        begin: where the interval begins in canonical space.
        prototype: the optimizer whose hyperparameters this one follows.
        groups: of each parameter, the number of the group it is in.
        parameters: all, 1-D.
        gradient: the kind of gradients that it takes: that of its sums, or one of 16 bits.
        options: of its class.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        begin: int,
        prototype: Optimizer,
        groups: Sequence[int],
        parameters: Sequence[Array],
        gradient: str,
        options: Mapping[str, Any],
    ) -> None:
        self.pieces = pieces
        self._begin, self._prototype, self._gradient = begin, prototype, gradient
        self._groups = sorted({groups[piece.number] for piece in pieces})
        self._members = [[k for k, piece in enumerate(pieces) if groups[piece.number] == g] for g in self._groups]
        made = [
            {"params": [parameters[p.number][p.start : p.stop] for p in (pieces[k] for k in members)], **hyper}
            for members, hyper in zip(self._members, self._hyperparameters(), strict=True)
        ]
        canonical = [pieces[k].first + pieces[k].start for members in self._members for k in members]
        self.optimizer: Optimizer = type(prototype)(made, canonical=canonical, **options)

    def _hyperparameters(self) -> list[dict[str, Any]]:
        """Of each of its groups."""
        names, groups = self._prototype._names, self._prototype.param_groups
        return [{name: groups[g][name] for name in names} for g in self._groups]

    def parts(self, g: Array) -> list[Array]:
        """Those of an array over the interval that are the pieces'."""
        starts = [p.first + p.start - self._begin for p in self.pieces]
        return [g[start : start + p.stop - p.start] for start, p in zip(starts, self.pieces, strict=True)]

    def prepare(self, scale: float, clips: bool) -> None:
        """Compile what `step` needs."""
        opt = self.optimizer
        rules = opt._runner.rules(opt._updates(), scale, clips)
        opt._stepper.prepare(rules, False, False)

    @property
    def narrow(self) -> bool:
        """Whether it takes gradients of 16 bits."""
        return self._gradient != opt_dtype(self.optimizer).name

    def rounded(self, g: Array, divisor: float) -> Array:
        """Sums divided, and rounded to the 16 bits that it takes: divided first, or they might not fit."""
        with np.errstate(all="ignore"):
            quotients = g * g.dtype.type(unscaling(divisor, g.dtype))
            return _storage.decoded(_storage.encoded(quotients, carrier(self._gradient)))

    def step(self, t: int, g: Array, scale: float, clipping: float | None) -> None:
        """Step number t. g: the interval's gradients, to be divided by the scale and multiplied by `clipping`."""
        opt = self.optimizer
        for group, hyper in zip(opt.param_groups, self._hyperparameters(), strict=True):
            group.update(hyper)
        parts = self.parts(g)
        if self.narrow:
            parts = [_storage.encoded(part, carrier(self._gradient)) for part in parts]
        given = [[parts[k] for k in members] for members in self._members]
        opt._t[0] = t - 1
        opt._run(_gradients.of_step(opt, given), grad_scale=scale, clipping=clipping)


def opt_dtype(optimizer: Optimizer) -> np.dtype[Any]:
    """What its steps are computed in."""
    return optimizer._parts[0].dtype
