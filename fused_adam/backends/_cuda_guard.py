"""Steps of unscaled, checked and clipped gradients on a GPU.

`HostGuard` lets the host decide, and so waits for the norm; `DeviceGuard` keeps t and all that follows from it on the
device, where one block decides before each step (kernels/prologue.cu), and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import is_
from typing import Any

import numpy as np

from fused_adam import _checks, _coefficients, _numbers
from fused_adam._arrays import Array, CudaArray
from fused_adam._codegen import Rule
from fused_adam._cuda_arrays import is_capturing, never_moves, view
from fused_adam._guard import Guard, Settings
from fused_adam._layout import FlatBuffer
from fused_adam._norm import LIMBS, Total
from fused_adam._update import Update
from fused_adam.backends import DeferredInterrupt, Gradients, Kept, Placed
from fused_adam.backends import _cuda_source as text
from fused_adam.backends._cuda import Kernel, Launch, Row, StepLaunch, Table, order, prepared
from fused_adam.backends._cuda_rows import Stepper

_INFINITE, _NOT_A_NUMBER, _NOT_FINITE = 1, 2, 4  # flags of digits.cuh


class NormLaunch(Launch):
    """Over all gradients of a dtype."""

    chunk = 16384

    def segment(self, row: Row) -> tuple[Any, ...]:
        return row.arrays[0].size, 0

    def __call__(self, scale: tuple[int, int, float], sums: int, stream: int) -> None:
        self._arguments["scale"], self._arguments["sums"] = scale, sums
        self.run(stream)


class HostGuard(Stepper):
    """Waits for the norm, where one is wanted."""

    def prepare(self, rules: Sequence[Rule], by_row: bool, norm: bool) -> None:
        super().prepare(rules, by_row, norm)
        if norm:
            stream = self.driver.current_stream(self._device)
            for flat in (tuple(bool(part.runs) for part in self._parts), (False,) * len(self._parts)):
                self._place_norms(flat, stream)

    def step_guarded(
        self, t: int, rules: Sequence[Rule], gradients: Sequence[Gradients | Placed], guard: Guard, stream: Any = None
    ) -> None:
        """`step` with the coefficients that the guard decides on, or no step; it waits for the norm it wants."""
        on = self._stream(stream)
        if guard.settings.wants_norm and is_capturing(on):
            raise RuntimeError(
                "this step waits for the norm, which a capture in a CUDA graph cannot; use CuPy's backend"
            )
        self._look(rules, gradients, on)
        total = self._total(guard.scale, gradients, on) if guard.settings.wants_norm else None
        coefficients = guard.decide(total)
        with DeferredInterrupt():
            if coefficients is not None:
                self._launch(t, coefficients, on)
                self._t[0] = t
            elif guard.settings.zeroes:
                for part, given, pointers in zip(self._parts, gradients, self._pointers, strict=True):
                    rows = part.runs if isinstance(given, FlatBuffer) else part.rows
                    for address, (p, *_) in zip(pointers.tolist(), rows, strict=True):
                        if p.size:
                            self.driver.zero(address, p.nbytes, self._device, on)
        self._rules = rules

    @cached_property
    def _sums(self) -> Table:
        """The digits that norm.cu adds to, 0 between two steps."""
        table = self.driver.table(8 * text.SUMS, self._device)
        table.write(np.zeros(text.SUMS, np.int64), self.driver.current_stream(self._device), wait=True)
        return table

    @cached_property
    def _norms(self) -> dict[tuple[bool, ...], list[tuple[list[int], NormLaunch]]]:
        return {}

    def _place_norms(self, flat: tuple[bool, ...], stream: int) -> list[tuple[list[int], NormLaunch]]:
        """The parts of each launch, one for each dtype, and it."""
        if flat not in self._norms:
            prepared(stream)
            made = []
            for dtype in {part.dtype: None for part in self._parts}:
                parts = [k for k, part in enumerate(self._parts) if part.dtype == dtype]
                source = text.norm_source(dtype)
                kernel = self.driver.kernel(source, None, dtype, self._device)
                launch = NormLaunch(self.driver, kernel, source, self._device)
                launch.place(self._rows(parts, flat), stream)
                made.append((parts, launch))
            self._norms[flat] = made
        return self._norms[flat]

    def _bind_norms(self, gradients: Sequence[Gradients | Placed], stream: int) -> list[NormLaunch]:
        """Launches over the gradients that `_look` has found right."""
        found = self._place_norms(tuple(isinstance(given, FlatBuffer) for given in gradients), stream)
        for parts, launch in found:
            launch.bind(np.concatenate([self._pointers[k] for k in parts]), stream)
            if is_capturing(stream):
                launch.freeze()
        return [launch for _, launch in found]

    def _add_up(self, launches: Sequence[NormLaunch], scale: tuple[int, int, float], stream: int) -> None:
        for launch in launches:
            launch(scale, self._sums.address, stream)

    def _forget_sums(self, stream: int) -> None:
        """So that the next step does not add to what one left that failed half way."""
        self._sums.write(np.zeros(text.SUMS, np.int64), stream)

    def _total(self, scale: float, gradients: Sequence[Gradients | Placed], stream: int) -> Total:
        launches = self._bind_norms(gradients, stream)
        found = np.zeros(text.SUMS, np.int64)
        try:
            self._add_up(launches, (0, 0, scale), stream)
            self._sums.read(found)
        finally:
            self._forget_sums(stream)
        sets = found.reshape(64, -1)
        flags = int(np.bitwise_or.reduce(sets[:, LIMBS]))
        special = np.nan if flags & _NOT_A_NUMBER else np.inf if flags & _INFINITE else 0.0
        return Total(sets[:, :LIMBS].sum(0), special, not flags & _NOT_FINITE)


class DeviceGuard(HostGuard):
    """Waits for nothing: steps can be captured in a CUDA graph and replayed with other learning rates.

    on_device: whether `keep` was called; until then all is as in `Stepper`. ran: whether there was a step since.
    """

    on_device = False

    def keep(self, settings: Settings) -> None:
        """Keep t and the scalars on the device from here on."""
        self.on_device = True
        self._settings = settings
        self._control = self.driver.table(text.CONTROL.itemsize, self._device)
        self._groups = self.driver.table(text.GROUP.itemsize * len(self._parts), self._device)
        self._coefficients = self.driver.table(text.COEFFICIENT_BYTES * len(self._parts), self._device)
        self._uploaded: Array | None = None
        self._last_updates: Sequence[Update] = []
        self._replayed: list[Rule] = []  # by CUDA graphs
        self._lent: list[CudaArray] = []  # scalars, which must outlive the launch
        self.ran = False
        made = text.prologue_source()
        self._arguments = np.zeros(1, made.arguments)
        self._opaque = self._arguments.view(np.dtype((np.void, made.arguments.itemsize)))
        dtypes = {part.dtype.itemsize for part in self._parts}
        a = self._arguments[0]
        a["control"], a["groups"], a["count"] = self._control.address, self._groups.address, len(self._parts)
        a["narrow"], a["wide"] = 4 in dtypes, 8 in dtypes
        a["max_norm"] = np.inf if settings.max_grad_norm is None else settings.max_grad_norm
        a["skip_nonfinite"] = settings.skip_nonfinite
        if settings.wants_norm:
            a["sums"] = self._sums.address
        self._prologue = self.driver.kernel(made, None, np.dtype(np.float64), self._device)
        self._control.write(np.zeros(1, text.CONTROL), self.driver.current_stream(self._device), wait=True)

    def control(self) -> Any:
        """What prologue.cu leaves, after all work that was given to the device before."""
        control = np.zeros(1, text.CONTROL)
        self._control.read(control)
        return control[0]

    def set_t(self, t: int) -> None:
        self._write(t=t)

    def upload(self, updates: Sequence[Update], rules: Sequence[Rule], stream: Any = None, wait: bool = False) -> None:
        """Bring the hyperparameters to the device, if they are not there. rules: the updates', behind preludes.

        wait: until they are there for all streams.
        """
        on = self._stream(stream)
        if self._uploaded is not None and all(map(is_, updates, self._last_updates)):
            return
        if self._replayed and list(rules) != self._replayed:
            why = "a step of this optimizer was captured, and its replays would take the coefficients for others"
            raise RuntimeError(f"a hyperparameter that asks for another rule was changed: {why}; make a new optimizer")
        groups = np.zeros(len(updates), text.GROUP)
        for k, (u, rule, part) in enumerate(zip(updates, rules, self._parts, strict=True)):
            groups[k] = _group(u, rule, part.dtype, self._coefficients.address + k * text.COEFFICIENT_BYTES)
        if self._uploaded is None or groups.tobytes() != self._uploaded.tobytes():
            if is_capturing(on):
                raise RuntimeError("a hyperparameter changed since the last step; call prepare() before the capture")
            self._uploaded = None
            self._groups.write(groups, on, wait)
            self._uploaded = groups
        self._last_updates = updates

    def step_on_device(
        self,
        updates: Sequence[Update],
        rules: Sequence[Rule],
        gradients: Sequence[Gradients | Placed],
        scale: Any,
        found: Any,
        stream: Any = None,
    ) -> None:
        """The next step, or none: the device knows."""
        on = self._stream(stream)
        lent: list[CudaArray] = []
        self._arguments["scale"] = scale = _scalar("grad_scale", scale, on, lent)
        self._arguments["found"] = _scalar("found_inf", found, on, lent)
        for a in lent:
            _checks.same_place("a scalar", a.device, "the parameters", self._device)
        self._look(rules, gradients, on)
        norms = self._bind_norms(gradients, on) if self._settings.wants_norm else []
        self.upload(updates, rules, on)
        if capturing := is_capturing(on):
            self._graphs.append(lent)
            self._replayed = list(rules)
        else:
            # A CuPy array is ordered by the caller, as a gradient is.
            order(self.driver, on, [a for a in lent if not never_moves(a.owner)], self._device)
        decided = False
        try:
            with DeferredInterrupt():
                self._add_up(norms, scale, on)
                self._prologue(1, self._opaque, on)
                decided = True
                for _, launch in self._current:
                    launch.run(on)
        except BaseException:
            if not capturing:
                self._take_back(decided, on)
            raise
        self.ran = True
        self._lent = lent
        self._rules = rules

    def _take_back(self, decided: bool, stream: int) -> None:
        """What is known on the device of a step that failed, so that it can be done again."""
        if not decided:
            self._forget_sums(stream)
            return
        control = self.control()
        self._write(t=control["t"] - (not control["skips"]), skipped=control["skipped"] - control["skips"])

    def _write(self, **fields: int) -> None:
        control = np.array([self.control()], text.CONTROL)
        for name, value in fields.items():
            control[name] = value
        self._control.write(control, self.driver.current_stream(self._device), wait=True)

    def _source(self, rule: Rule, dtype: np.dtype[Any], kept: Kept | None) -> text.Source:
        if kept is not None:
            return text.stored_source(rule, kept.form, self.on_device)
        return text.source(rule, dtype, self.on_device)

    def _rows(self, parts: Sequence[int], flat: Sequence[bool]) -> list[Row]:
        rows = super()._rows(parts, flat)
        return [row._replace(group=parts[row.group]) for row in rows] if self.on_device else rows

    def _made(self, kernel: Kernel, made: text.Source, dtype: np.dtype[Any], kept: Kept | None) -> StepLaunch:
        launch = super()._made(kernel, made, dtype, kept)
        if self.on_device:
            launch.point(self._control.address, self._coefficients.address)
        return launch


def _group(u: Update, rule: Rule, dtype: np.dtype[Any], coefficients: int) -> Any:
    """A `Group` of prologue.cu. Raises ValueError where it has no room, or no formula."""
    if u.formula is not None and getattr(_coefficients, u.formula.__name__, None) is not u.formula:
        raise ValueError(f"the coefficients of rule {u.rule.name!r} are a Python function of t, which no GPU can call")
    if len(rule.coefficients) > text.MOST_COEFFICIENTS:
        most = text.MOST_COEFFICIENTS - len(rule.coefficients) + len(u.rule.coefficients)
        raise ValueError(f"rule {u.rule.name!r} has {len(u.rule.coefficients)} coefficients; {most} fit on the device")
    for t in (1, 2, _numbers.MAX_STEP):  # between which all of them only grow or only fall
        _numbers.coefficients(u.rule.coefficients, u.at(t), dtype)
    group = np.zeros((), text.GROUP)
    group["formula"] = text.FORMULAS.index(u.formula.__name__) if u.formula else 0
    group["arguments"][: len(u.arguments)] = u.arguments
    group["wide"], group["count"], group["coefficients"] = dtype.itemsize == 8, len(rule.coefficients), coefficients
    for k, name in enumerate(rule.coefficients):
        if name in u.names:
            group["source"][k] = u.names.index(name)
        elif name in ("unscaling", "clipping"):
            group["source"][k] = text.UNSCALING if name == "unscaling" else text.CLIPPING
        else:
            group["source"][k], group["constants"][k] = text.MOST_RESULTS + k, u.constants[name]
    return group


def _scalar(name: str, x: Any, stream: int, lent: list[CudaArray]) -> tuple[int, int, float]:
    """A `Scalar` of control.cuh: a number, or one in memory of the device's, which is then lent."""
    found = None if x is None else view(name, x, stream)
    if found is None:
        check = _numbers.grad_scale if name == "grad_scale" else _numbers.found_inf
        return 0, 0, float(check(x))
    kinds = ("float32", "float64") if name == "grad_scale" else ("float32", "float64", "bool", "uint8")
    if found.size != 1 or found.dtype not in kinds:
        raise TypeError(f"{name} should be one {' or '.join(kinds)}, got {found.size} of {found.dtype}")
    lent.append(found)
    return text.KINDS[found.dtype], found.address, 0.0
