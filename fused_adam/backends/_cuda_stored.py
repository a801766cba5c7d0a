"""Steps on both CUDA backends over numbers that are kept in 16 or 8 bits: kernels/stored.cu in the place of step.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fused_adam import _checks, _formats
from fused_adam._arrays import Array, CudaArray, kind_of
from fused_adam._codegen import Rule
from fused_adam._layout import FlatBuffer
from fused_adam.backends import Gradients, Kept, Placed, Rows, _cuda
from fused_adam.backends._cuda_source import Source, stored_source


class StoredLaunch(_cuda.StepLaunch):
    """Over numbers kept in 16 or 8 bits."""

    def __init__(self, driver: _cuda.Driver, kernel: _cuda.Kernel, made: Source, kept: Kept, device: int) -> None:
        super().__init__(driver, kernel, made, np.dtype(np.float32), device)
        self._form = kept.form
        self._arguments["seed"] = kept.seed

    def segment(self, row: _cuda.Row) -> tuple[Any, ...]:
        p, *rest = (a.address for a in row.arrays)
        master = rest.pop(0) if self._form.master else 0
        scales = rest.pop() if self._form.states == "int8" else 0
        return row.arrays[0].size, 0, row.group, row.first, p, master, scales, rest

    def __call__(self, t: int, coefficients: Sequence[Sequence[float]], stream: int) -> None:
        self._arguments["t"] = t
        super().__call__(t, coefficients, stream)


class Stepper(_cuda.Stepper):
    def _source(self, rule: Rule, dtype: np.dtype[Any], kept: Kept | None) -> Source:
        return super()._source(rule, dtype, kept) if kept is None else stored_source(rule, kept.form)

    def _made(self, kernel: _cuda.Kernel, made: Source, dtype: np.dtype[Any], kept: Kept | None) -> _cuda.StepLaunch:
        if kept is None:
            return super()._made(kernel, made, dtype, kept)
        return StoredLaunch(self.driver, kernel, made, kept, self._device)

    def _found(
        self, part: Rows, given: Gradients | Placed, stream: int, alive: list[CudaArray]
    ) -> tuple[Array, Kept | None]:
        kept = part.kept
        if kept is None:
            return super()._found(part, given, stream, alive)
        if isinstance(given, Placed):
            return given.addresses, kept
        if isinstance(given, FlatBuffer):
            dtype = given.layout.dtype
            starts = np.array([start for start, _ in given.layout.runs], np.int64)
            kind = kind_of(dtype, kept.declared)
            return given.address + starts * dtype.itemsize, _with(kept, kind, "the flat buffer of gradients")
        addresses, nbytes = np.zeros((2, len(given.arrays)), np.int64)
        others: list[CudaArray] = []
        kinds: list[str] = []
        for k, (g, shape) in enumerate(zip(given.arrays, part.shapes, strict=True)):
            own = getattr(g, "dtype", None)
            dtype = own if isinstance(own, np.dtype) else np.dtype(np.void)
            kind = kind_of(dtype, kept.declared)
            quick = self.driver.address(g, shape, dtype, self._device) if kind else None
            if quick is None or quick % dtype.itemsize:
                checked, kind = _checks.kept_gradient(given.names[k], g, given.parameters[k], kept.declared, stream)
                others.append(checked)
                quick, nbytes[k] = checked.address, checked.nbytes
            else:
                nbytes[k] = g.nbytes
            addresses[k] = quick
            kinds.append(kind)
        self._refuse_overlaps(given, addresses, nbytes)
        _cuda.order(self.driver, stream, others, self._device)
        alive += others
        return addresses, _with(kept, _checks.one_kind(given.names[0], kinds), given.names[0])


def _with(kept: Kept, kind: str, name: str) -> Kept:
    """With gradients of this kind. Raises ValueError unless they are offered."""
    form = kept.form._replace(g=kind)
    _formats.refuse_gradient(form, name)
    return kept._replace(form=form)
