"""Arrays on the host or a GPU, read and written in pieces by the canonical index of their elements: in C order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from fused_adam import _memory
from fused_adam._arrays import Array, CudaArray, order, ravel
from fused_adam._base import Optimizer
from fused_adam._cuda_arrays import view
from fused_adam._memory import Memory
from fused_adam._part import MASTER, ROW_STEPS, SCALES, Part
from fused_adam.backends import LIBRARY
from fused_adam.checkpoint._format import dtype_name
from fused_adam.checkpoint._manifest import PARAMETER, Parameter, Spec


class Elements(Protocol):
    """Where the elements of an array are."""

    def read(self, start: int, stop: int) -> Array:
        """Elements [start, stop), 1-D: a view that is only to be read, or a copy."""

    def write(self, start: int, x: Array) -> None:
        """x, 1-D, becomes the elements from `start` on, at the latest with `flush`."""

    def flush(self) -> None: ...


class OnHost:
    """shape: in which the 1-D `memory` is ordered as `order` says."""

    def __init__(self, memory: Array, shape: tuple[int, ...], order: str = "C") -> None:
        # a flat iterator goes through any order in that of C
        self._a: Any = memory if order == "C" else memory.reshape(shape, order="F").flat

    def read(self, start: int, stop: int) -> Array:
        found: Array = self._a[start:stop]
        return found

    def write(self, start: int, x: Array) -> None:
        self._a[start : start + len(x)] = x

    def flush(self) -> None:
        pass


class OnGpu:
    """In C order."""

    def __init__(self, a: CudaArray, memory: Memory) -> None:
        self._a: CudaArray = ravel(a)
        self._memory = memory

    def _piece(self, start: int, n: int) -> CudaArray:
        return replace(self._a, address=self._a.address + start * self._a.dtype.itemsize, shape=(n,))

    def read(self, start: int, stop: int) -> Array:
        return self._memory.to_host(self._piece(start, stop - start))

    def write(self, start: int, x: Array) -> None:
        self._memory.assign(self._memory.own(self._piece(start, len(x))), x)

    def flush(self) -> None:
        pass


class FortranOnGpu:
    """Pieces in C order are scattered over the memory, so a copy on the host stands for the array until `flush`."""

    def __init__(self, a: CudaArray, shape: tuple[int, ...], memory: Memory) -> None:
        self._a, self._shape, self._memory = ravel(a), shape, memory
        self._copy: tuple[Array, OnHost] | None = None
        self._written = False

    def _host(self) -> OnHost:
        if self._copy is None:
            flat = self._memory.to_host(self._a)
            self._copy = flat, OnHost(flat, self._shape, "F")
        return self._copy[1]

    def read(self, start: int, stop: int) -> Array:
        return self._host().read(start, stop)

    def write(self, start: int, x: Array) -> None:
        self._host().write(start, x)
        self._written = True

    def flush(self) -> None:
        if self._copy is not None and self._written:
            self._memory.assign(self._memory.own(self._a), self._copy[0])
        self._copy, self._written = None, False


def _elements(a: Any, shape: tuple[int, ...], order: str, memory: Memory) -> Elements:
    """a: 1-D, in the order of a parameter of this shape."""
    found = view("a row", a)
    if found is None:
        return OnHost(a, shape, order)
    return OnGpu(found, memory) if order == "C" else FortranOnGpu(found, shape, memory)


Located = Mapping[tuple[int, str], Elements]  # by the number of the parameter and the name of the array

# Scales are of 64 elements in memory order, so those of a parameter in Fortran order mean others.
FORTRAN_SCALES = f"fortran_{SCALES}"


def of_optimizer(optimizer: Optimizer) -> tuple[list[Parameter], dict[tuple[int, str], Elements]]:
    """The parameters and their states, as they are kept: what they are, and where their elements lie."""
    memory = _memory.of_library(LIBRARY[optimizer.backend], optimizer._device)
    parameters: list[Parameter] = []
    located: dict[tuple[int, str], Elements] = {}
    for group, index in enumerate(optimizer._index):
        for part, j in ((optimizer._parts[k], j) for k, j in index):
            p, steps, number = part.parameters[j], part.row_steps[j], len(parameters)
            how = order(p)
            rows = {PARAMETER: ravel(p)} | {name: buffer.views[j] for name, buffer in part.states.items()}
            if part.master is not None:
                rows[MASTER] = part.master.views[j]
            arrays = {name: Spec(_dtype_name(part, name, row), p.shape) for name, row in rows.items()}
            located |= {(number, name): _elements(row, p.shape, how, memory) for name, row in rows.items()}
            beside = {} if steps is None else {ROW_STEPS: steps}
            if part.scales is not None:
                beside[SCALES if how == "C" else FORTRAN_SCALES] = part.scales.views[j]
            for name, row in beside.items():
                arrays[name] = Spec(dtype_name(row.dtype), row.shape)
                located[number, name] = _elements(row, row.shape, "C", memory)
            name = part.names[j].removeprefix(optimizer._path(group))
            parameters.append(Parameter(name, arrays[PARAMETER].dtype, p.shape, arrays))
    return parameters, located


def _dtype_name(part: Part, name: str, row: Any) -> str:
    """By which safetensors knows what an array of a part holds: of uint16 its dtype does not tell."""
    if part.kept is not None and name != MASTER:
        kind = part.kept.form.p if name == PARAMETER else part.kept.form.states
        if kind == "bfloat16":
            return "BF16"
    return dtype_name(row.dtype)
