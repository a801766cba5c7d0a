"""The parameters of one group and dtype, and their states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fused_adam._arrays import Array, order, ravel
from fused_adam._layout import FlatBuffer, Layout
from fused_adam.backends import Rows


class Part:
    """names: of the gradients. flat: the flat buffer that the parameters are, if they are one."""

    def __init__(self, group: int, flat: FlatBuffer | None, dtype: np.dtype[Any]) -> None:
        self.group = group
        self.flat = flat
        self.dtype = dtype
        self.names: list[str] = []
        self.parameters: list[Array] = []
        self.states: dict[str, FlatBuffer] = {}
        self.last_gradient: FlatBuffer | None = None  # the one last found to fit and to overlap nothing

    def allocate(self, states: Iterable[tuple[str, float]]) -> None:
        layout = (
            self.flat.layout if self.flat is not None else Layout.of([ravel(p) for p in self.parameters], self.dtype)
        )
        for name, value in states:
            self.states[name] = FlatBuffer(layout)
            if value:
                for view in self.states[name].views:
                    view[...] = value

    def rows(self) -> Rows:
        states = self.states.values()
        rows = zip(map(ravel, self.parameters), *(s.views for s in states), strict=True)
        runs = zip(self.flat.runs, *(s.runs for s in states), strict=True) if self.flat is not None else ()
        shapes = [p.shape if order(p) == "C" else None for p in self.parameters]
        return Rows(self.dtype, shapes, list(rows), list(runs))

    def state_views(self, name: str) -> list[Array]:
        """A state of each parameter, in the parameter's shape and memory order."""
        views = zip(self.states[name].views, self.parameters, strict=True)
        return [v.reshape(p.shape, order="C" if order(p) == "C" else "F") for v, p in views]
