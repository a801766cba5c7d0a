"""The parameters of one group and dtype, and their states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import AnyArray, Array, order, ravel
from fused_adam._cuda_arrays import view
from fused_adam._layout import FlatBuffer, Layout
from fused_adam._memory import Memory
from fused_adam.backends import Loose, Rows

ROW_STEPS = "row_steps"  # of a state dict


class Part:
    """names: of the gradients. given: the parameters as the caller knows them. flat: the flat buffer that they are, if
    they are one.
    """

    def __init__(self, group: int, flat: FlatBuffer | None, dtype: np.dtype[Any]) -> None:
        self.group = group
        self.flat = flat
        self.dtype = dtype
        self.names: list[str] = []
        self.given: list[Any] = []
        self.parameters: list[AnyArray] = []
        self.states: dict[str, FlatBuffer] = {}
        self.row_steps: list[Array | None] = []  # of each parameter, int64 on the host; None unless rows have their own
        # The gradients last found to fit and to overlap nothing, if their memory cannot move. Loose ones are kept alive
        # by that, so they are only remembered as long as the same arrays come again: see `remembers`.
        self.last_gradient: FlatBuffer | Loose | None = None
        self.remembers = True

    def allocate(self, states: Iterable[tuple[str, float]], memory: Memory, per_row_step: bool) -> None:
        shapes = [(p.size,) for p in self.parameters]
        layout = self.flat.layout if self.flat is not None else Layout.of(self.given, shapes, self.dtype)
        for name, p in zip(self.names, self.parameters, strict=True):
            rows = _checks.rows(name.replace("grads", "params", 1), p, needed=False)[0] if per_row_step else 0
            self.row_steps.append(np.zeros(rows, np.int64) if per_row_step else None)
        for name, value in states:
            self.states[name] = FlatBuffer(layout, memory)
            if value:
                for row in self.states[name].views:
                    memory.assign(row, np.broadcast_to(np.array(value, self.dtype), row.shape))

    def rows(self) -> Rows:
        states = self.states.values()
        rows = zip(map(ravel, self.parameters), *(map(_row, s.views) for s in states), strict=True)
        flat = [] if self.flat is None else [self.flat, *states]
        runs = zip(*(map(_row, buffer.runs) for buffer in flat), strict=True)
        shapes = [p.shape if order(p) == "C" else None for p in self.parameters]
        return Rows(self.dtype, shapes, list(rows), list(runs))

    def saved(self, k: int) -> dict[str, Array]:
        """Copies on the host of the states of parameter k, in its shape and memory order, and of its rows' steps."""
        p, steps = self.parameters[k], self.row_steps[k]
        how: Any = "C" if order(p) == "C" else "F"
        saved = {name: b.memory.to_host(b.views[k]).reshape(p.shape, order=how) for name, b in self.states.items()}
        return saved if steps is None else saved | {ROW_STEPS: steps.copy()}


def _row(a: Any) -> AnyArray:
    return view("a row", a) or a
