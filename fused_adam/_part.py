"""The parameters of one group and dtype, and their states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from fused_adam import _row_checks, _storage
from fused_adam._arrays import AnyArray, Array, carried, carrier, order, ravel
from fused_adam._cuda_arrays import view
from fused_adam._layout import FlatBuffer, Layout
from fused_adam._memory import Memory
from fused_adam.backends import Kept, Loose, Rows

ROW_STEPS, MASTER = "row_steps", "master"  # of a state dict


class Part:
    """names: of the gradients. given: the parameters as the caller knows them. flat: the flat buffer that they are, if
    they are one. kept: how, where that is not the type that is computed in, dtype. first: their canonical indices.
    """

    def __init__(self, group: int, flat: FlatBuffer | None, kind: str, kept: Kept | None) -> None:
        self.group = group
        self.flat = flat
        self.dtype = np.dtype(np.float64 if kind == "float64" else np.float32)
        self.kept = kept
        self.first: list[int] = []
        self.master: FlatBuffer | None = None
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
        if self.kept is not None:
            if self.kept.form.master:
                self.master = FlatBuffer(replace(layout, dtype=carrier(self.kept.form.master)), memory)
            if self.kept.form.master == "float32":
                for row, p in zip(self.master_rows, self.parameters, strict=True):
                    row[:] = _storage.decoded(ravel(p))
            layout = replace(layout, dtype=carrier(self.kept.form.states))
        for name, p in zip(self.names, self.parameters, strict=True):
            rows = _row_checks.rows(name.replace("grads", "params", 1), p, needed=False)[0] if per_row_step else 0
            self.row_steps.append(np.zeros(rows, np.int64) if per_row_step else None)
        for name, value in states:
            self.states[name] = FlatBuffer(layout, memory)
            if value:
                for row in self.states[name].views:
                    memory.assign(row, np.broadcast_to(np.array(value, self.dtype), row.shape))

    @property
    def master_rows(self) -> list[Any]:
        return [] if self.master is None else self.master.views

    @property
    def keys(self) -> tuple[str, ...]:
        """What a state dict has of each parameter."""
        master = () if self.master is None else (MASTER,)
        return (*self.states, *master, *((ROW_STEPS,) if self.row_steps[0] is not None else ()))

    def rows(self) -> Rows:
        beside = [*([] if self.master is None else [self.master]), *self.states.values()]
        rows = zip(map(ravel, self.parameters), *(map(_row, b.views) for b in beside), strict=True)
        flat = [] if self.flat is None else [self.flat, *beside]
        runs = zip(*(map(_row, buffer.runs) for buffer in flat), strict=True)
        shapes = [p.shape if order(p) == "C" else None for p in self.parameters]
        run_first = [] if self.flat is None else [self.first[0] + start for start, _ in self.flat.layout.runs]
        return Rows(self.dtype, shapes, list(rows), list(runs), self.kept, self.first, run_first)

    def saved(self, k: int) -> dict[str, Array]:
        """Copies on the host of the states of parameter k, in its shape and memory order, and of its rows' steps.

        What is kept in 16 bits is float32 in them, and so is what a master stands for.
        """
        p, steps = self.parameters[k], self.row_steps[k]
        how: Any = "C" if order(p) == "C" else "F"
        rows = {name: b.memory.to_host(b.views[k]) for name, b in self.states.items()}
        if self.kept is not None:
            rows = {name: _storage.decoded(row) for name, row in rows.items()}
            if self.master is not None:
                low = self.master.views[k]
                split = self.kept.form.master == "split16"
                rows[MASTER] = _storage.joined(ravel(p), low) if split else low.copy()
        saved = {name: row.reshape(p.shape, order=how) for name, row in rows.items()}
        return saved if steps is None else saved | {ROW_STEPS: steps.copy()}

    def writes(self, k: int, name: str, key: str, host: Array) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The call that puts a saved state, or master, back. Nothing in it allocates.

        host: 1-D, in the memory order of parameter k. Raises ValueError for a master that is not the parameter's.
        """
        buffer = self.states.get(key, self.master)
        assert buffer is not None
        if self.kept is not None:
            if key == MASTER:
                p = ravel(self.parameters[k])
                split = self.kept.form.master == "split16"
                rounded, host = _storage.split(host) if split else (_storage.encoded(host, p.dtype), host)
                if not np.array_equal(rounded, p):
                    raise ValueError(
                        f"{name} does not round to the parameter; load the parameters of the same run first"
                    )
            else:
                host = _storage.encoded(host, buffer.layout.dtype)
        return buffer.memory.assign, (buffer.views[k], host)


def _row(a: Any) -> AnyArray:
    found = view("a row", a)
    return carried(a, a.dtype.name) if found is None else found
