"""The parameters of one group and dtype, and their states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fused_adam import _checks, _int8, _memory, _row_checks, _storage
from fused_adam._arrays import AnyArray, Array, carried, carrier, order, ravel
from fused_adam._cuda_arrays import view
from fused_adam._layout import FlatBuffer, Layout
from fused_adam._memory import Memory
from fused_adam.backends import Kept, Loose, Rows

ROW_STEPS, MASTER, SCALES = "row_steps", "master", "scales"  # of a state dict


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
        self.scales: Scales | None = None
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
                    memory.assign(row, _storage.decoded(_on_host(p)))
        for name, p in zip(self.names, self.parameters, strict=True):
            rows = _row_checks.rows(name.replace("grads", "params", 1), p, needed=False)[0] if per_row_step else 0
            self.row_steps.append(np.zeros(rows, np.int64) if per_row_step else None)
        for name, value in states:
            dtype = self._carrier(name)  # mostly the layout's own, whose runs are then found once for all states
            self.states[name] = FlatBuffer(layout if layout.dtype == dtype else replace(layout, dtype=dtype), memory)
            if value:
                for row in self.states[name].views:
                    memory.assign(row, np.broadcast_to(np.array(value, self.dtype), row.shape))
        if self.in_8_bits:
            self.scales = Scales(layout, memory)

    @property
    def in_8_bits(self) -> bool:
        return self.kept is not None and self.kept.form.states == "int8"

    def _carrier(self, state: str) -> np.dtype[Any]:
        if self.kept is None:
            return self.dtype
        return np.dtype({"m": np.int8, "v": np.uint8}[state]) if self.in_8_bits else carrier(self.kept.form.states)

    @property
    def master_rows(self) -> list[Any]:
        return [] if self.master is None else self.master.views

    @property
    def keys(self) -> tuple[str, ...]:
        """What a state dict has of each parameter."""
        beside = (*((SCALES,) if self.scales else ()), *((MASTER,) if self.master is not None else ()))
        return (*self.states, *beside, *((ROW_STEPS,) if self.row_steps[0] is not None else ()))

    def rows(self) -> Rows:
        beside = [b for b in (self.master, *self.states.values(), self.scales) if b is not None]
        rows = zip(map(ravel, self.parameters), *(map(_row, b.views) for b in beside), strict=True)
        flat = [] if self.flat is None else [self.flat, *beside]
        runs = zip(*(map(_row, buffer.runs) for buffer in flat), strict=True)
        shapes = [p.shape if order(p) == "C" else None for p in self.parameters]
        run_first = [] if self.flat is None else [self.first[0] + start for start, _ in self.flat.layout.runs]
        return Rows(self.dtype, shapes, list(rows), list(runs), self.kept, self.first, run_first)

    def saved(self, k: int) -> dict[str, Array]:
        """Copies on the host of the states of parameter k, in its shape and memory order, and of its rows' steps.

        What is kept in 16 bits is float32 in them, and so is what a master stands for. 8-bit states are codes, and have
        scales.
        """
        p, steps = self.parameters[k], self.row_steps[k]
        how: Any = "C" if order(p) == "C" else "F"
        rows = {name: b.memory.to_host(b.views[k]) for name, b in self.states.items()}
        if self.kept is not None:
            if not self.in_8_bits:
                rows = {name: _storage.decoded(row) for name, row in rows.items()}
            if self.master is not None:
                low = self.master.memory.to_host(self.master.views[k])
                rows[MASTER] = low if low.dtype == np.float32 else _storage.joined(_on_host(p), low)
        saved = {name: row.reshape(p.shape, order=how) for name, row in rows.items()}
        if self.scales is not None:
            saved[SCALES] = self.scales.memory.to_host(self.scales.views[k])
        return saved if steps is None else saved | {ROW_STEPS: steps.copy()}

    def writes(self, k: int, name: str, given: Mapping[str, Any], t: int) -> list[tuple[Callable[..., Any], Any]]:
        """The calls that put a saved state back. Nothing in them allocates.

        Raises TypeError or ValueError: it does not fit parameter k, or holds the master of other parameters.
        """
        p, steps = self.parameters[k], self.row_steps[k]
        keys = (
            *self.states,
            *((MASTER,) if self.master is not None else ()),
            *((ROW_STEPS,) if steps is not None else ()),
        )
        coded = isinstance(given, Mapping) and SCALES in given and tuple(self.states) == ("m", "v")
        _checks.same_keys(name, given, [*keys, SCALES] if coded else keys)
        rows: dict[str, Array] = {}
        for key in keys:
            if key == ROW_STEPS:
                continue
            if coded and key in _int8.CODES:
                _int8.check_codes(f'{name}["{key}"]', _memory.on_host(given[key]), p.shape, _int8.CODES[key])
            else:
                _checks.state(f'{name}["{key}"]', given[key], p.shape, self.dtype)
            # 1-D and of one layout, so that nothing allocates, and so nothing fails, once the writing begins
            rows[key] = ravel(np.array(_memory.on_host(given[key]), order="C" if order(p) == "C" else "F"))
        if coded:
            rows[SCALES] = _int8.checked_scales(f'{name}["{SCALES}"]', _memory.on_host(given[SCALES]), rows["m"])
        calls: list[tuple[Callable[..., Any], Any]] = []
        if steps is not None:
            found = _row_checks.row_steps(f'{name}["{ROW_STEPS}"]', given[ROW_STEPS], steps, t)
            calls.append((np.copyto, (steps, found)))
        if self.kept is not None:
            rows = self._encoded(k, name, rows, t)
        elif coded:
            rows = _int8.to_floats(rows["m"], rows["v"], rows[SCALES])
        buffers = {**self.states, MASTER: self.master, SCALES: self.scales}
        for key in rows:  # not its items: CPython's iterator over them crashes where memory runs out
            buffer = buffers[key]
            assert buffer is not None
            calls.append((buffer.memory.assign, (buffer.views[k], rows[key])))
        return calls

    def _encoded(self, k: int, name: str, rows: dict[str, Array], t: int) -> dict[str, Array]:
        """States, and the part of a master beside parameter k, as they are kept."""
        master = rows.pop(MASTER, None)
        if self.in_8_bits:
            if SCALES not in rows:
                rows = _int8.from_floats(rows["m"], rows["v"], self.first[k], t)
        else:
            if SCALES in rows:
                rows = _int8.to_floats(rows["m"], rows["v"], rows[SCALES])
            rows = {key: _storage.encoded(row, self._carrier(key)) for key, row in rows.items()}
        if master is not None and self.master is not None:
            p, beside = _on_host(self.parameters[k]), self.master.layout.dtype
            wide = beside == np.float32
            rounded, low = (_storage.encoded(master, p.dtype), master) if wide else _storage.split(master, beside)
            if not np.array_equal(rounded, p):
                why = "does not round to the parameter; load the parameters of the same run first"
                raise ValueError(f'{name}["{MASTER}"] {why}')
            rows[MASTER] = low
        return rows


class Scales:
    """Those of 8-bit states: two of uint16 for each 64 elements, laid out beside a layout's parameters."""

    def __init__(self, layout: Layout, memory: Memory) -> None:
        self.memory = memory
        data = memory.zeros(layout.total // 32, np.dtype(np.uint16))
        self.views = [data[s.offset // 32 :][: 2 * _int8.blocks(s.size)] for s in layout.segments]
        self.runs = [data[start // 32 :][: 2 * _int8.blocks(end - start)] for start, end in layout.runs]


def _on_host(p: AnyArray) -> Array:
    """A parameter's elements in memory order."""
    return _memory.on_host(ravel(p))


def _row(a: Any) -> AnyArray:
    found = view("a row", a)
    return carried(a, a.dtype.name) if found is None else found
