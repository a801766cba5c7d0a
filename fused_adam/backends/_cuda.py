"""What both CUDA backends share: segment tables, gradient pointers, coefficients, one launch for all groups of a rule.

A driver (`cupy_cuda`, `numba_cuda`) compiles kernels, copies bytes to a device and launches. Everything that can fail
for want of memory, or because a gradient is wrong, happens before the first launch.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, Protocol

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import Array, CudaArray
from fused_adam._codegen import Rule
from fused_adam._cuda_arrays import is_capturing
from fused_adam._layout import FlatBuffer
from fused_adam.backends import DeferredInterrupt, Gradients, Kept, Loose, Placed, Rows
from fused_adam.backends._cuda_source import Made, NormSource, Source, source

# Elements a block takes; while there are fewer of the larger chunks than a GPU runs blocks at once, the smaller.
_CHUNK, _SMALL_CHUNK = 4096, 2048
_BLOCKS_AT_ONCE = 512
_MAX_BLOCKS = 2**31 - 1  # of a grid
_PER_THREAD = 2  # the address that means a default stream of each thread's own

Kernel = Callable[[int, Array, int], None]  # (blocks, arguments: an array of one struct as bytes, stream)


class Table(Protocol):
    """Bytes in device memory."""

    address: int

    def write(self, a: Array, stream: int, wait: bool = False) -> None:
        """Copy an array there, in the order of the stream, or for all streams if `wait`; `a` may change after it."""

    def read(self, a: Array) -> None:
        """Copy the first bytes into an array, after all work that was given to the device before."""


class Event(Protocol):
    """A place in the order of a stream."""

    def record(self, stream: int) -> None:
        """It is here, behind all work given to the stream so far."""

    def wait(self, stream: int) -> None:
        """Let a stream wait for it, if it is anywhere."""


class Driver(Hashable, Protocol):
    def kernel(self, made: Made, rule: Rule | None, dtype: np.dtype[Any], device: int) -> Kernel:
        """Compile, or load from a cache. A kernel that is launched on two streams at once is made twice."""

    def zero(self, address: int, nbytes: int, device: int, stream: int) -> None:
        """Set memory to 0, in the order of the stream."""

    def table(self, nbytes: int, device: int) -> Table:
        """Raises MemoryError."""

    def current_stream(self, device: int) -> int:
        """The address of the stream that the caller works on."""

    def event(self, device: int) -> Event:
        """Made on the device; nowhere yet."""

    def address(self, g: Any, shape: tuple[int, ...] | None, dtype: np.dtype[Any], device: int) -> int | None:
        """That of a gradient of the driver's own array type if it is as it should be, quickly; else None."""


def stream_address(stream: Any) -> int:
    """A stream of CuPy, Numba or PyTorch, or an address, as an address. Raises TypeError."""
    for attribute in ("ptr", "cuda_stream"):
        if isinstance(value := getattr(stream, attribute, None), int):
            return value
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    handle = getattr(stream, "handle", stream)  # Numba's: a ctypes pointer, None inside for the default stream
    value = getattr(handle, "value", handle) or 0
    if isinstance(value, bool | float | str | bytes) or not hasattr(value, "__int__") or int(value) < 0:
        raise TypeError(f"stream should be a CUDA stream or its address, got {_checks.kind(stream)}")
    return int(value)


def order(driver: Driver, stream: int, arrays: Sequence[CudaArray], device: int) -> None:
    """Let the step wait for the streams that other libraries say their arrays belong to; 0 and 1 are the same one."""
    for other in {a.stream for a in arrays if a.stream is not None} - {stream or 1}:
        event = driver.event(device)
        event.record(other)
        event.wait(stream)


def prepared(stream: int) -> None:
    """Raises RuntimeError where something would be compiled and placed that a capture needs before it."""
    if is_capturing(stream):
        raise RuntimeError("this step was not prepared for a capture; call prepare(), or do one like it, before it")


def chunk_of(total: int, large: int = _CHUNK) -> int:
    """Elements that a block takes of so many."""
    return large if total >= _BLOCKS_AT_ONCE * large else _SMALL_CHUNK


def blocks_of(counts: Array, total: int) -> tuple[int, Array, Array]:
    """(blocks of a launch; of each line of its table, which takes so many, the first; of each block the line)."""
    ends = np.cumsum(counts)
    blocks = int(ends[-1]) if len(ends) else 0
    if blocks > _MAX_BLOCKS:
        raise ValueError(f"{total} elements are more than one launch takes; step over fewer parameters at a time")
    return blocks, ends - counts, np.repeat(np.arange(len(counts), dtype=np.int32), counts)


class Row(NamedTuple):
    """group: its number. arrays: p and the states, with what else is kept of them. first: the canonical index."""

    group: int
    arrays: Sequence[CudaArray]
    first: int = 0


class Launch(ABC):
    """One launch over segments of memory and the gradient of each."""

    chunk = _CHUNK  # elements a block takes of many

    def __init__(self, driver: Driver, kernel: Kernel, made: Source | NormSource, device: int) -> None:
        self._driver = driver
        self._kernel = kernel
        self._made = made
        self._device = device
        self._arguments = np.zeros(1, made.arguments)
        # CuPy asks what it passes by value for its address; of bytes NumPy tells it ten times faster than of a struct.
        self._opaque = self._arguments.view(np.dtype((np.void, made.arguments.itemsize)))
        self._blocks = 0
        self._tables: list[Table] = []
        self._uploaded: Array | None = None
        self._frozen = False
        self._kept: list[Table] = []

    @abstractmethod
    def segment(self, row: Row) -> tuple[Any, ...]:
        """That of a row, as the kernel has it, with 0 for its first block."""

    def place(self, rows: Sequence[Row], stream: int) -> None:
        """Allocate and upload what does not change from step to step. Rows without elements get no segment."""
        self._present = np.array([row.arrays[0].size > 0 for row in rows], bool)
        segments = np.array([*map(self.segment, rows)], self._made.segment)[self._present]
        total = int(segments["n"].sum())
        chunk = chunk_of(total, self.chunk)
        self._blocks, segments["first"], segment_of_chunk = blocks_of(-(-segments["n"] // chunk), total)
        a = self._arguments[0]
        a["chunk"] = chunk
        if len(segments) == 1:
            a["segment"] = segments[0]
        elif self._blocks:
            sizes = (segments.nbytes, 8 * len(segments), segment_of_chunk.nbytes)
            self._tables = [self._driver.table(size, self._device) for size in sizes]
            a["segments"], a["gradients"], a["segment_of_chunk"] = (table.address for table in self._tables)
            self._tables[0].write(segments, stream, wait=True)  # later steps may be on other streams
            self._tables[2].write(segment_of_chunk, stream, wait=True)

    def bind(self, gradients: Array, stream: int) -> None:
        """Take an address for each row, for this launch and those that follow."""
        if not self._blocks:
            return
        present = gradients[self._present]
        if not self._tables:
            self._arguments["gradient"] = present[0]
        elif self._uploaded is None or not np.array_equal(present, self._uploaded):
            if is_capturing(stream):  # a replay would copy from memory that is another's by then
                raise RuntimeError("the gradients moved during a capture; do one step with these arrays before it")
            if self._frozen:
                self._kept.append(self._tables[1])
                self._tables[1] = self._driver.table(8 * len(present), self._device)
                self._arguments["gradients"] = self._tables[1].address
                self._frozen = False
            self._uploaded = None  # until the copy is on its way
            self._tables[1].write(present, stream)
            self._uploaded = present

    def freeze(self) -> None:
        """A CUDA graph reads what this launch does: other gradients get a table of their own from here on."""
        self._frozen = True

    def run(self, stream: int) -> None:
        if self._blocks:
            self._kernel(self._blocks, self._opaque, stream)


class StepLaunch(Launch):
    """One launch: the parts of all groups that take one rule in one type, by one way to look at their memory."""

    def __init__(self, driver: Driver, kernel: Kernel, made: Source, dtype: np.dtype[Any], device: int) -> None:
        super().__init__(driver, kernel, made, device)
        field, offset = made.arguments.fields["coefficients"][:2]  # type: ignore[index]
        self._coefficients: Any = self._arguments.view(np.uint8)[offset:]
        self._number = "f" if dtype == np.float32 else "d"
        self._row = field.shape[-1] * dtype.itemsize if field.shape else 0

    def segment(self, row: Row) -> tuple[Any, ...]:
        p, *states = row.arrays
        return p.size, 0, row.group, p.address, [a.address for a in states] or [0]

    def point(self, control: int, coefficients: int) -> None:
        """Of a kernel that finds its coefficients in device memory: where."""
        self._arguments["control"], self._arguments["coefficients"] = control, coefficients

    def __call__(self, t: int, coefficients: Sequence[Sequence[float]], stream: int) -> None:
        if not self._blocks:
            return
        for k, values in enumerate(coefficients):
            struct.pack_into(f"{len(values)}{self._number}", self._coefficients, k * self._row, *values)
        self._kernel(self._blocks, self._opaque, stream)


class Stepper:
    """Steps over fixed parameters and states on one GPU; see `numpy_cpu.Stepper`."""

    driver: Driver  # each backend's

    def __init__(self, parts: Sequence[Rows], t: Array, writes: _checks.Extents) -> None:
        self._parts = parts
        self._t = t
        self._writes = writes
        arrays = [a for part in parts for row in part.rows for a in row]
        self._device = next((a.device for a in arrays if a.device >= 0), 0)
        self._nbytes = {id(part): np.array([row[0].nbytes for row in part.rows], np.int64) for part in parts}
        self._plan: dict[tuple[Any, ...], list[tuple[list[int], StepLaunch]]] = {}
        self._last: list[Gradients | Placed | None] = [None] * len(parts)
        self._pointers: list[Array] = [np.zeros(0, np.int64)] * len(parts)
        self._kept = [part.kept for part in parts]  # with the gradients of the last step
        self._rules: Sequence[Rule] = []
        self._current: list[tuple[list[int], StepLaunch]] = []
        self._alive: list[CudaArray] = []  # what other libraries lent must outlive the launch
        self._graphs: list[Any] = []  # and what a CUDA graph reads, all graphs

    def prepare(self, rules: Sequence[Rule], by_row: bool, norm: bool) -> None:
        """by_row: for `step_rows`. norm: for one that needs it."""
        stream = self.driver.current_stream(self._device)
        for flat in ([bool(part.runs) for part in self._parts], [False] * len(self._parts)):
            self._launches(rules, flat, stream)

    def step(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Gradients | Placed],
        stream: Any = None,
    ) -> None:
        """Step number t, with a rule, its coefficients and its gradients for each part."""
        on = self._stream(stream)
        self._look(rules, gradients, on)
        with DeferredInterrupt():
            self._launch(t, coefficients, on)
            self._t[0] = t
        self._rules = rules

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads its tables."""
        return bool(self._graphs)

    def _look(self, rules: Sequence[Rule], gradients: Sequence[Gradients | Placed], stream: int) -> None:
        """Make the launches fit for rules and gradients; those of the last step mostly do."""
        if not (rules == self._rules and all(map(is_, gradients, self._last))):
            if rules and rules[0].zeroes:
                _checks.zeroable(gradients)
            self._alive = self._look_again(rules, gradients, stream)
        if is_capturing(stream):
            self._graphs.append((gradients, self._alive))
            for _, launch in self._current:
                launch.freeze()

    def _stream(self, given: Any) -> int:
        return self.driver.current_stream(self._device) if given is None else stream_address(given)

    def _launch(self, t: int, coefficients: Sequence[Sequence[float]], stream: int) -> None:
        for parts, launch in self._current:
            launch(t, [coefficients[k] for k in parts], stream)

    def _look_again(
        self, rules: Sequence[Rule], gradients: Sequence[Gradients | Placed], stream: int
    ) -> list[CudaArray]:
        """Check the gradients and give their addresses to all launches that fit them, before the first of these.

        Returns those that other libraries lent.
        """
        self._rules = []  # until the step is done
        last, self._last = self._last, [None] * len(self._parts)
        alive: list[CudaArray] = []
        for k, (given, known) in enumerate(zip(gradients, last, strict=True)):
            if given is not known:
                self._pointers[k], self._kept[k] = self._found(self._parts[k], given, stream, alive)
        # What is not known by its object next time must not be kept from being freed; what belongs to another stream
        # has to be waited for each time.
        elsewhere = {a.stream for a in alive} - {None, stream or 1}
        self._last = [
            g if isinstance(g, FlatBuffer | Placed) or (g.given and not elsewhere) else None for g in gradients
        ]
        self._current = self._launches(rules, [isinstance(given, FlatBuffer) for given in gradients], stream)
        for parts, launch in self._current:
            launch.bind(np.concatenate([self._pointers[k] for k in parts]), stream)
        return alive

    def _launches(self, rules: Sequence[Rule], flat: Sequence[bool], stream: int) -> list[tuple[list[int], StepLaunch]]:
        """The parts of each launch, and it; made for each choice of rules, and of runs or rows, on first use."""
        key = (tuple(rules), tuple(flat), tuple(self._kept))
        if key not in self._plan:
            prepared(stream)
            by_rule: dict[tuple[Rule, np.dtype[Any], Kept | None], list[int]] = {}
            for k, (rule, part, kept) in enumerate(zip(rules, self._parts, self._kept, strict=True)):
                if part.rows:
                    by_rule.setdefault((rule, part.dtype, kept), []).append(k)
            launches = []
            for (rule, dtype, kept), members in by_rule.items():
                made = self._source(rule, dtype, kept)
                for start in range(0, len(members), made.groups):
                    parts = members[start : start + made.groups]
                    kernel = self.driver.kernel(made, rule, dtype, self._device)
                    launch = self._made(kernel, made, dtype, kept)
                    launch.place(self._rows(parts, flat), stream)
                    launches.append((parts, launch))
            self._plan[key] = launches
        return self._plan[key]

    def _source(self, rule: Rule, dtype: np.dtype[Any], kept: Kept | None) -> Source:
        return source(rule, dtype)

    def _made(self, kernel: Kernel, made: Source, dtype: np.dtype[Any], kept: Kept | None) -> StepLaunch:
        return StepLaunch(self.driver, kernel, made, dtype, self._device)

    def _rows(self, parts: Sequence[int], flat: Sequence[bool]) -> list[Row]:
        """What a launch over parts takes, which are its groups."""
        found = []
        for group, k in enumerate(parts):
            part = self._parts[k]
            rows, firsts = (part.runs, part.run_first) if flat[k] else (part.rows, part.first)
            found += [Row(group, *row) for row in zip(rows, firsts or repeat(0), strict=False)]
        return found

    def _found(
        self, part: Rows, given: Gradients | Placed, stream: int, alive: list[CudaArray]
    ) -> tuple[Array, Kept | None]:
        """The address of each run of a flat buffer, or of each gradient, which is checked first; and as what."""
        if isinstance(given, FlatBuffer):
            starts = np.array([start for start, _ in given.layout.runs], np.int64)
            return given.address + starts * part.dtype.itemsize, None
        if isinstance(given, Placed):
            return given.addresses, None
        addresses = np.zeros(len(given.arrays), np.int64)
        others: list[CudaArray] = []
        for k, (g, shape) in enumerate(zip(given.arrays, part.shapes, strict=True)):
            quick = self.driver.address(g, shape, part.dtype, self._device)
            if quick is None:
                checked = _checks.gradient(given.names[k], g, given.parameters[k], stream)
                others.append(checked)
                quick = checked.address
            addresses[k] = quick
        self._refuse_overlaps(given, addresses, self._nbytes[id(part)])
        order(self.driver, stream, others, self._device)
        alive += others
        return addresses, None

    def _refuse_overlaps(self, given: Loose, addresses: Array, nbytes: Array) -> None:
        hit = self._writes.first_overlap(addresses, nbytes)
        if hit >= 0:
            raise _checks.overlap(given.names[hit])


@lru_cache(maxsize=64)
def _kernel(driver: Driver, rule: Rule, dtype: np.dtype[Any], device: int, stream: int, thread: int) -> Kernel:
    return driver.kernel(source(rule, dtype), rule, dtype, device)


def run(driver: Driver, rule: Rule, coefficients: Sequence[float], p: Any, g: Any, states: Sequence[Any]) -> None:
    """One step on checked 1-D arrays."""
    device = max(p.device, 0)
    stream = driver.current_stream(device)
    thread = threading.get_ident() if stream == _PER_THREAD else 0
    launch = StepLaunch(
        driver, _kernel(driver, rule, p.dtype, device, stream, thread), source(rule, p.dtype), p.dtype, device
    )
    launch.place([Row(0, (p, *states))], stream)
    order(driver, stream, [p, g, *states], device)
    launch.bind(np.array([g.address], np.int64), stream)
    with DeferredInterrupt():
        launch(1, [coefficients], stream)
