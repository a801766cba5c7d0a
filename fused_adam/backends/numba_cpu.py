"""Numba on the CPU: one driver, serial or parallel, that calls the rules' compiled kernels.

The driver takes a table of rows ``[n, part, p, g, state, ...]`` (addresses as int64), the address of each part's kernel
and its coefficients, and commits t itself: a step is one compiled call, which no Ctrl-C can cut in two.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_adam import _checks, _coefficients, _numbers
from fused_adam._arrays import Array, address
from fused_adam._codegen import Rule
from fused_adam._guard import Guard
from fused_adam._layout import FlatBuffer
from fused_adam._sparse import Gather
from fused_adam.backends import PID, DeferredInterrupt, Gradients, Loose, Placed, Rows, module
from fused_adam.backends._numba_kernels import CHUNK, cached, kernel

SERIAL_BELOW = 2**18  # elements; below, waking the threads costs more than they save
COLUMNS = 2  # n and part stand before the addresses


def unusable() -> str:
    """Why this backend cannot run although it can be imported; "" if it can."""
    return "NUMBA_DISABLE_JIT is set; unset it" if numba.config.DISABLE_JIT else ""


# --- drivers ----------------------------------------------------------------------------------------------------------


@intrinsic
def call(typingctx: Any, kernel: Any, row: Any, lo: Any, n: Any, coefficients: Any) -> Any:
    """Call the C function at an address with the rows and coefficients of two arrays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, row, lo, n, coefficients = args
        pointers = [
            context.make_array(t)(context, builder, a).data
            for t, a in ((signature.args[1], row), (signature.args[4], coefficients))
        ]
        arguments = [pointers[0], lo, n, pointers[1]]
        function = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
        builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(kernel, row, types.int64, types.int64, coefficients), codegen


_SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(_coefficients.__file__), Path(_numbers.__file__)]
_HASH = hashlib.sha256(b"".join(f.read_bytes() for f in _SOURCES)).hexdigest()[:12]


def jit(signatures: list[Any], **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit with explicit signatures: types, dtypes, layout and writability are checked by the call itself."""

    def decorate(f: Callable[..., Any]) -> Any:
        f.__qualname__ += f"_{_HASH}"  # the disk cache looks at f's own file only, not at what is compiled into it
        return cached(lambda **cache: numba.njit(signatures, **cache, **options)(f))

    return decorate


I64 = types.int64
F64 = types.float64
TABLE = types.Array(I64, 2, "C")
INTS = types.Array(I64, 1, "C")
COEFFICIENTS = types.Array(F64, 2, "C")
_STEP = [types.void(TABLE, INTS, INTS, COEFFICIENTS, INTS, I64)]


@numba.njit(inline="always")
def chunk(rows: Any, kernels: Any, coefficients: Any, r: Any, lo: Any) -> None:
    part = rows[r, 1]
    call(kernels[part], rows[r, COLUMNS:], lo, min(CHUNK, rows[r, 0] - lo), coefficients[part])


def _serial(rows: Any, first: Any, kernels: Any, coefficients: Any, t: Any, t_new: Any) -> None:
    for r in range(rows.shape[0]):
        for lo in range(0, rows[r, 0], CHUNK):
            chunk(rows, kernels, coefficients, r, lo)
    t[0] = t_new


def _parallel(rows: Any, first: Any, kernels: Any, coefficients: Any, t: Any, t_new: Any) -> None:
    for k in numba.prange(first[-1]):
        r = np.searchsorted(first, k, side="right") - 1  # chunk -> row
        chunk(rows, kernels, coefficients, r, (k - first[r]) * CHUNK)
    t[0] = t_new


class Loops:
    """A loop that runs on one thread, and one that runs on all; the latter is compiled on first use."""

    def __init__(self, signatures: list[Any], serial: Callable[..., None], parallel: Callable[..., None]) -> None:
        self._signatures = signatures
        self._parallel = parallel
        self.serial = jit(signatures, nogil=True)(serial)
        self.compiled = False

    def compile(self) -> None:
        """The first to be compiled loads GNU OpenMP and starts its threads.

        Threads that spin for work collapse when other processes are busy, so their spinning is bounded. OpenMP reads
        its variables once, when it is loaded; they are put back so that nobody else sees them.
        """
        bounded = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
        if bounded:
            os.environ["GOMP_SPINCOUNT"] = "20000"  # long enough to last from one step to the next
        try:
            self.parallel = jit(self._signatures, nogil=True, parallel=True)(self._parallel)
        finally:
            if bounded:
                del os.environ["GOMP_SPINCOUNT"]
        self.compiled = True


_LOOPS = Loops(_STEP, _serial, _parallel)

# --- threads ----------------------------------------------------------------------------------------------------------

_pool = threading.Lock()  # held by the one thread that may use Numba's thread pool
_forked = os.getpid() != PID  # by a parent whose own Numba code may have started the pool


def _after_fork() -> None:
    """The pool's threads do not exist in a child, and GNU OpenMP would abort it: steps are serial from here on."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(loops: Loops) -> int:
    """How many threads a step may use; the caller holds `_pool`."""
    if not loops.compiled:
        loops.compile()
    # Numba's own pool aborts the process when two threads use it at once, and not only ours might.
    alone = threading.current_thread() is threading.main_thread() or numba.threading_layer() != "workqueue"
    return numba.get_num_threads() if alone else 1


def ready(n: int, loops: Loops = _LOOPS) -> None:
    """Compile what `launch` needs."""
    if n >= SERIAL_BELOW and not _forked and not loops.compiled:
        with DeferredInterrupt(), _pool:
            _threads(loops)


def launch(n: int, *arguments: Any, loops: Loops = _LOOPS) -> None:
    """Run a loop over n elements in all: in parallel if it is worth it, and if no other thread is at it."""
    if n >= SERIAL_BELOW and not _forked:
        with DeferredInterrupt():  # one that fell between acquire and release would leave every later step serial
            if _pool.acquire(blocking=False):
                try:
                    run = loops.parallel if _threads(loops) > 1 else loops.serial
                    run(*arguments)
                    return
                finally:
                    _pool.release()
    loops.serial(*arguments)


# --- stepper ----------------------------------------------------------------------------------------------------------


_GRADIENTS = [
    types.boolean(types.Array(I64, 1, "A"), I64, I64, types.Array(dtype, ndim, "C", readonly=True))
    for dtype in (types.float32, types.float64)
    for ndim in (1, 2)
]


@jit(_GRADIENTS)
def _address(column: Any, k: Any, itemsize: Any, g: Any) -> Any:
    """Write a gradient's address; a third of the time that Python takes to ask for it. False for the wrong dtype."""
    if g.itemsize != itemsize:
        return False
    column[k] = g.ctypes.data
    return True


def _arrays(part: Rows, given: Gradients | Placed) -> Sequence[Array]:
    """Gradients that were found right, 1-D."""
    if part.kept is not None:
        gradients: Sequence[Array] = module("_stored").gradients(part, given)[1]
        return gradients
    if isinstance(given, FlatBuffer):
        return given.runs
    if isinstance(given, Placed):
        return given.arrays(part)
    return [_checks.gradient(*x) for x in zip(given.names, given.arrays, given.parameters, strict=True)]


def chunks(rows: Array) -> Array:
    """The number of each row's first chunk, and how many there are."""
    return np.concatenate([[0], np.cumsum(-(-rows[:, 0] // CHUNK))]).astype(np.int64)


class Stepper:
    """Steps over fixed parameters and states; see `numpy_cpu.Stepper`."""

    def __init__(self, parts: Sequence[Rows], t: Array, writes: _checks.Extents) -> None:
        self._parts = parts
        self._t = t
        self._writes = writes
        rows = [(k, row) for k, part in enumerate(parts) for row in part.rows]
        # The last columns are for the address of counts, or for what random bits depend on.
        self._rows = np.zeros((len(rows), COLUMNS + 4 + max(len(row) for _, row in rows)), np.int64)
        for r, (k, (p, *states)) in enumerate(rows):
            addresses = [address(p), 0, *map(address, states)]
            if (kept := parts[k].kept) is not None:
                addresses += [0, kept.seed, 0]
            self._rows[r, : COLUMNS + len(addresses)] = [p.size, k, *addresses]
        self._first = chunks(self._rows)
        self._n = int(self._rows[:, 0].sum())
        ends = np.cumsum([len(part.rows) for part in parts]).tolist()
        gradients = self._rows[:, COLUMNS + 1]
        self._gradients = [gradients[end - len(part.rows) : end] for part, end in zip(parts, ends, strict=True)]
        self._nbytes = [np.array([row[0].nbytes for row in part.rows], np.int64) for part in parts]
        plain = [k for k, part in enumerate(parts) if part.kept is None]
        self._plain_parts = [[table[k] for k in plain] for table in (parts, self._gradients, self._nbytes)]
        self._stored = [k for k, part in enumerate(parts) if part.kept is not None]
        self._forms = {k: kept.form for k, part in enumerate(parts) if (kept := part.kept) is not None}
        self._steps = {}
        for k in self._stored:
            mine = self._rows[ends[k] - len(parts[k].rows) : ends[k], COLUMNS + 1 + len(parts[k].rows[0]) :]
            mine[:, 0] = parts[k].first
            self._steps[k] = mine[:, 2]
        self._rules: list[Rule] = []
        self._kernels = np.zeros(len(parts), np.int64)
        self._coefficients = np.zeros((len(parts), 1))
        self._counts = np.zeros(0, np.int64)  # of each chunk, if rules count

    def prepare(self, rules: Sequence[Rule], by_row: bool, norm: bool) -> None:
        """by_row: for `step_rows`. norm: for one that needs it."""
        self._take(rules)
        ready(self._n, module("_numba_rows").LOOPS if by_row else _LOOPS)
        if norm:
            ready(self._n, module("_numba_norm").LOOPS)

    def _use(self, rules: Sequence[Rule], coefficients: Sequence[Sequence[float]]) -> None:
        if self._rules != rules:
            self._take(rules)
        self._set(coefficients)

    def _set(self, coefficients: Sequence[Sequence[float]]) -> None:
        for k, values in enumerate(coefficients):
            self._coefficients[k, : len(values)] = values

    def _take(self, rules: Sequence[Rule]) -> None:
        kept = [self._forms.get(k, part.dtype) for k, part in enumerate(self._parts)]
        kernels = [kernel(rule, how) for rule, how in zip(rules, kept, strict=True)]
        coefficients = np.zeros((len(rules), max(1, *(len(rule.coefficients) for rule in rules))))
        if rules[0].counts and not len(self._counts):
            self._counts = np.zeros(self._first[-1], np.int64)
            for row, first in zip(self._rows, self._first.tolist(), strict=False):
                row[COLUMNS + 1 + len(self._parts[row[1]].rows[0])] = address(self._counts) + 8 * first
        # all or nothing: kernels of other rules than self._rules would run unnoticed
        self._kernels, self._coefficients, self._rules = np.array(kernels, np.int64), coefficients, list(rules)

    def step(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Gradients | Placed],
    ) -> None:
        """Step number t, with a rule, its coefficients and its gradients for each part."""
        alive = self._bind_all(gradients, t)
        self._use(rules, coefficients)
        launch(self._n, self._rows, self._first, self._kernels, self._coefficients, self._t, t)
        del alive  # copies that had to outlive the launch

    def step_guarded(
        self, t: int, rules: Sequence[Rule], gradients: Sequence[Gradients | Placed], guard: Guard
    ) -> None:
        """`step` with the coefficients that the guard decides on, or no step."""
        alive = self._bind_all(gradients, t)
        if self._rules != rules:
            self._take(rules)
        if guard.settings.zeroes:
            _checks.zeroable(gradients)
        total = None
        if guard.settings.wants_norm:
            kinds = [self._forms[k].g if k in self._forms else part.dtype.name for k, part in enumerate(self._parts)]
            unscaling = [guard.unscaling[part.dtype] for part in self._parts]
            total = module("_numba_norm").total(self._n, self._rows, self._first, kinds, unscaling)
        coefficients = guard.decide(total)
        if coefficients is not None:
            self._set(coefficients)
            guard.count = lambda: int(self._counts.sum())
            launch(self._n, self._rows, self._first, self._kernels, self._coefficients, self._t, t)
        elif guard.settings.zeroes:
            # Every view is made before the first write.
            each = [g for part, given in zip(self._parts, gradients, strict=True) for g in _arrays(part, given)]
            fills = [g.view(np.uint8).fill for g in each]
            with DeferredInterrupt():
                for fill in fills:
                    fill(0)
        del alive

    def _bind_all(self, gradients: Sequence[Gradients | Placed], t: int) -> list[list[Array]]:
        """Check the gradients and write their addresses. Returns copies that must outlive the launch."""
        alive = [self._bind_stored(k, gradients[k], t) for k in self._stored]
        if self._stored:
            gradients = [g for k, g in enumerate(gradients) if k not in self._forms]
        for part, column, nbytes, given in zip(*self._plain_parts, gradients, strict=True):
            if isinstance(given, (FlatBuffer, Placed)):  # a tuple is asked three times as fast
                column[:] = given.addresses
            else:
                alive.append(self._bind(part, column, nbytes, given))
        return alive

    def _bind_stored(self, k: int, given: Gradients | Placed, t: int) -> list[Array]:
        """The gradients of a part of which something is kept in 16 bits: their kind chooses the kernel."""
        part, column = self._parts[k], self._gradients[k]
        self._steps[k][:] = t
        if isinstance(given, Placed):
            column[:] = given.addresses
            return []
        kept, gs = module("_stored").gradients(part, given)
        if isinstance(given, FlatBuffer):
            column[:] = given.addresses
        elif isinstance(given, Loose):
            column[:] = [*map(address, gs)]
            hit = self._writes.first_overlap(column, np.array([g.nbytes for g in gs], np.int64))
            if hit >= 0:
                raise _checks.overlap(given.names[hit])
        if kept.form != self._forms[k]:
            self._forms[k] = kept.form
            self._rules = []  # so that kernels are chosen again
        return [*gs]

    def step_rows(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Loose],
        gathers: Sequence[Sequence[Gather | None]],
    ) -> None:
        """`step` where of each parameter that has one only the rows of its gather move."""
        by_row = module("_numba_rows")
        self._use(rules, coefficients)
        moves = by_row.Moves()
        ordinary: dict[int, Array] = {}  # gradients, by the row of the table
        r = 0
        for part, code, given, some in zip(self._parts, self._kernels.tolist(), gradients, gathers, strict=True):
            for name, g, p, row, moved in zip(*given[:3], part.rows, some, strict=True):
                checked = moved.values() if moved else _checks.gradient(name, g, p)
                self._writes.refuse(name, checked)
                if moved:
                    moves.add(code, row, checked, moved)
                else:
                    ordinary[r] = checked
                r += 1
        rows = self._rows[[*ordinary]]
        rows[:, COLUMNS + 1] = [address(g) for g in ordinary.values()]
        n = int(rows[:, 0].sum()) + moves.n
        ready(n, by_row.LOOPS)
        arguments = (rows, chunks(rows), self._kernels, self._coefficients, *moves.arguments(), self._t, t)
        launch(n, *arguments, loops=by_row.LOOPS)

    def _bind(self, part: Rows, column: Array, nbytes: Array, given: Loose) -> list[Array]:
        """Check the gradients and write their addresses."""
        copies = []
        itemsize = part.dtype.itemsize
        for k, (g, shape) in enumerate(zip(given.arrays, part.shapes, strict=True)):
            # What is not plain goes to Python, which explains or makes it so. dtypes too: Numba's cache of types does
            # not tell byte orders apart.
            if type(g) is np.ndarray and g.shape == shape and g.dtype == part.dtype and g.flags.c_contiguous:
                try:
                    if _address(column, k, itemsize, g if 1 <= g.ndim <= 2 else g.reshape(-1)):
                        continue
                except TypeError:  # misaligned
                    pass
            checked = _checks.gradient(given.names[k], g, given.parameters[k])
            column[k] = address(checked)
            copies.append(checked)
        hit = self._writes.first_overlap(column, nbytes)
        if hit >= 0:
            raise _checks.overlap(given.names[hit])
        return copies


def run(rule: Rule, coefficients: Sequence[float], p: Array, g: Array, states: Sequence[Array]) -> None:
    """One step on checked 1-D arrays, for `adam_step`; its calls to come are checked and run by compiled code."""
    module("_numba_adam_step")
    rows = np.array([[p.size, 0, *map(address, (p, g, *states))]], np.int64)
    kernels = np.array([kernel(rule, p.dtype)], np.int64)
    first = np.array([0, -(-p.size // CHUNK)], np.int64)
    launch(p.size, rows, first, kernels, np.array([coefficients], np.float64), np.empty(1, np.int64), 0)
