"""Steps over rows on both CUDA backends: one launch of kernels/rows.cu for all parameters of a rule that have a gather.

All that these launches read but the gradients goes to the device in one copy. Parameters that move as a whole in the
same step take the ordinary launch (see `_cuda`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import Array, CudaArray
from fused_adam._codegen import Rule
from fused_adam._cuda_arrays import is_capturing
from fused_adam._sparse import Gather
from fused_adam.backends import DeferredInterrupt, Loose, Rows, _cuda, _cuda_stored
from fused_adam.backends._cuda_source import ROW_TABLES, RowsSource, rows_source

_ALIGNED = 16  # bytes on whose multiples the arrays of an upload start
_PATTERNS = 64  # choices of parameters that move as a whole for which tables are kept


class _Moved(NamedTuple):
    """A parameter with its states, which rows of it move, and the rows of gradients."""

    row: tuple[CudaArray, ...]
    gather: Gather
    values: CudaArray


class _Upload:
    """Arrays, each once, that go to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[int, Array]] = {}  # masks and indices of many parameters are often the same one
        self.nbytes = 0

    def add(self, a: Array | None) -> int:
        """Where it will lie, counted from the start; -1 for None."""
        if a is None:
            return -1
        if id(a) not in self._arrays:
            self._arrays[id(a)] = self.nbytes, a
            self.nbytes += -(-a.nbytes // _ALIGNED) * _ALIGNED
        return self._arrays[id(a)][0]

    def packed(self) -> Array:
        everything = np.zeros(self.nbytes, np.uint8)
        for start, a in self._arrays.values():
            everything[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        return everything


class _Launch(NamedTuple):
    """table: a `Gathered` of rows.cu in each row, which is all integers; of_block: the row of each block."""

    kernel: _cuda.Kernel
    blocks: int
    chunk: int
    table: Array
    of_block: Array

    @staticmethod
    def of(
        kernel: _cuda.Kernel, made: RowsSource, dtype: np.dtype[Any], moved: Sequence[_Moved], upload: _Upload
    ) -> _Launch:
        """Over parameters of which something moves; pointers into the upload are still counted from its start."""
        counts = [m.row[0].size // m.gather.width if m.gather.every else len(m.gather.rows) for m in moved]
        total = sum(count * m.gather.width for count, m in zip(counts, moved, strict=True))
        chunk = _cuda.chunk_of(total)
        lines, blocks_each = [], []
        for count, ((p, *states), gather, values) in zip(counts, moved, strict=True):
            width = gather.width
            each, pieces = max(1, chunk // width), -(-width // chunk)
            # Where every row has a gradient there is nothing to look up.
            rows = gather.rows if len(gather.rows) < p.size // width else None
            met = None
            if gather.every and rows is not None:
                met = np.searchsorted(rows, np.arange(-(-count // each) + 1) * each)
            coefficients = np.array(gather.coefficients, np.float64).astype(dtype)
            tables = (rows, gather.starts, gather.order, met, gather.variant, coefficients)
            addresses = [p.address, *([a.address for a in states] or [0]), values.address]
            lines.append([0, count, width, each, pieces, *addresses, *map(upload.add, tables)])
            blocks_each.append(-(-count // each) * pieces)
        table = np.array(lines, np.int64)
        assert table.shape[1] * 8 == made.gathered.itemsize
        blocks, table[:, 0], of_block = _cuda.blocks_of(np.array(blocks_each), total)
        return _Launch(kernel, blocks, chunk, table, of_block)

    def arguments(self, base: int, upload: _Upload) -> Array:
        """With the upload at this address, which the pointers of the table are then counted from no more."""
        pointers = self.table[:, -len(ROW_TABLES) :]
        pointers[...] = np.where(pointers < 0, 0, pointers + base)
        values = base + upload.add(self.table), base + upload.add(self.of_block), self.chunk
        return np.array(values, np.int64).view(np.dtype((np.void, 8 * len(values))))


class _Room:
    """Memory on the device that each step writes anew, when what read it at the last one is done."""

    def __init__(self, driver: _cuda.Driver, device: int) -> None:
        self._driver = driver
        self._device = device
        self._event = driver.event(device)
        self._nbytes = 0
        # Only the last is written. A launch may still read the others, each at most half as large as the next one.
        self._tables: list[_cuda.Table] = []

    def address(self, nbytes: int) -> int:
        """Of so many bytes."""
        if nbytes > self._nbytes:
            larger = max(nbytes, 2 * self._nbytes)
            self._tables.append(self._driver.table(larger, self._device))
            self._nbytes = larger
        return self._tables[-1].address

    def write(self, a: Array, stream: int) -> None:
        self._event.wait(stream)  # the last step may have been on another one
        self._tables[-1].write(a, stream)

    def read(self, stream: int) -> None:
        """All launches that read it have been given to the stream."""
        self._event.record(stream)


class Stepper(_cuda_stored.Stepper):
    def __init__(self, parts: Sequence[Rows], t: Array, writes: _checks.Extents) -> None:
        super().__init__(parts, t, writes)
        self._wholes: dict[tuple[tuple[bool, ...], ...], _cuda.Stepper] = {}
        self._row_kernels: dict[RowsSource, _cuda.Kernel] = {}

    @cached_property
    def _room(self) -> _Room:
        return _Room(self.driver, self._device)

    def prepare(self, rules: Sequence[Rule], by_row: bool, norm: bool) -> None:
        super().prepare(rules, by_row, norm)
        for rule, part in zip(rules, self._parts, strict=True):
            if by_row:
                self._row_kernel(rule, part.dtype)

    def _row_kernel(self, rule: Rule, dtype: np.dtype[Any]) -> tuple[RowsSource, _cuda.Kernel]:
        made = rows_source(rule, dtype)
        if made not in self._row_kernels:
            self._row_kernels[made] = self.driver.kernel(made, rule, dtype, self._device)
        return made, self._row_kernels[made]

    def step_rows(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Loose],
        gathers: Sequence[Sequence[Gather | None]],
        stream: Any = None,
    ) -> None:
        """`step` where of each parameter that has one only the rows of its gather move."""
        on = self._stream(stream)
        if is_capturing(on):
            why = "the host says which rows move, and a replay would not ask it again"
            raise RuntimeError(f"a step over rows cannot be captured in a CUDA graph: {why}; do it outside of one")
        keep = tuple(tuple(gather is None for gather in some) for some in gathers)
        whole = self._whole(keep)
        alive = whole._look_again(rules, [given.only(k) for given, k in zip(gradients, keep, strict=True)], on)
        upload = _Upload()
        launches = self._row_launches(rules, gathers, on, alive, upload)
        commits = [moved.commit() for some in gathers for moved in some if moved is not None]
        arguments: list[Array] = []
        if launches:
            base = self._room.address(upload.nbytes)
            arguments = [launch.arguments(base, upload) for launch in launches]
            self._room.write(upload.packed(), on)
        with DeferredInterrupt():
            whole._launch(t, coefficients, on)
            for launch, given in zip(launches, arguments, strict=True):
                launch.kernel(launch.blocks, given, on)
            if launches:
                self._room.read(on)
            for write, given_to in commits:
                write(*given_to)
            self._t[0] = t
        self._alive = alive

    def _whole(self, keep: tuple[tuple[bool, ...], ...]) -> _cuda.Stepper:
        """Steps over those parameters alone."""
        if keep not in self._wholes:
            parts = [part.only(k) for part, k in zip(self._parts, keep, strict=True)]
            made = type(self)(parts, np.zeros(1, np.int64), self._writes)
            if len(self._wholes) >= _PATTERNS:
                del self._wholes[next(iter(self._wholes))]
            self._wholes[keep] = made
        return self._wholes[keep]

    def _row_launches(
        self,
        rules: Sequence[Rule],
        gathers: Sequence[Sequence[Gather | None]],
        stream: int,
        alive: list[CudaArray],
        upload: _Upload,
    ) -> list[_Launch]:
        """Check the rows of gradients, and place what the launches read."""
        lent: list[CudaArray] = []
        by_rule: dict[tuple[Rule, np.dtype[Any]], list[_Moved]] = {}
        for part, rule, some in zip(self._parts, rules, gathers, strict=True):
            for row, gather in zip(part.rows, some, strict=True):
                if gather is not None:
                    values = gather.values(stream)
                    self._writes.refuse(gather.name, values)
                    lent.append(values)
                    if row[0].size and (gather.every or len(gather.rows)):
                        by_rule.setdefault((rule, part.dtype), []).append(_Moved(row, gather, values))
        _cuda.order(self.driver, stream, lent, self._device)
        alive += lent
        launches = []
        for (rule, dtype), moved in by_rule.items():
            made, kernel = self._row_kernel(rule, dtype)
            launch = _Launch.of(kernel, made, dtype, moved, upload)
            upload.add(launch.table)
            upload.add(launch.of_block)
            launches.append(launch)
        return launches
