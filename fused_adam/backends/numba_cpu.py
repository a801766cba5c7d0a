"""Numba on the CPU: each rule compiled once to a C function, and one driver, serial or parallel, that calls them.

The driver takes a table of rows ``[n, part, p, g, state, ...]`` (addresses as int64), the address of each part's kernel
and its coefficients, and commits t itself: a step is one compiled call, which no Ctrl-C can cut in two.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_adam import _checks, _coefficients
from fused_adam._arrays import Array, address
from fused_adam._codegen import Rule, bind, numba_source
from fused_adam._layout import FlatBuffer
from fused_adam.backends import Gradients, Loose, Part

CHUNK = 2**16  # elements a thread takes at a time
SERIAL_BELOW = 2**18  # elements; below, waking the threads costs more than they save
_COLUMNS = 2  # n and part stand before the addresses
_OPTIONS = {"error_model": "numpy", "cache": True}  # IEEE division vectorises; fastmath stays off: it changes bits


# --- kernels: one C function a rule, void(row, first element, n, coefficients) ----------------------------------------


@intrinsic
def _view(typingctx: Any, address: Any, lo: Any, n: Any, dtype: Any) -> Any:
    """The n elements of `dtype` from element `lo` behind an address, as an array."""
    element = dtype.dtype if isinstance(dtype, types.NumberClass) else dtype
    array = types.Array(element, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, lo, n, _ = args
        size = ir.Constant(ir.IntType(64), element.bitwidth // 8)
        result = context.make_array(array)(context, builder)
        start = builder.add(base, builder.mul(lo, size))
        data = builder.inttoptr(start, context.get_data_type(element).as_pointer())
        context.populate_array(result, data=data, shape=[n], strides=[size], itemsize=size, meminfo=None, parent=None)
        return result._getvalue()

    return array(address, lo, n, dtype), codegen


@intrinsic
def _call(typingctx: Any, kernel: Any, row: Any, lo: Any, n: Any, coefficients: Any) -> Any:
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


@numba.njit(inline="always")
def _maximum(a: Any, b: Any) -> Any:
    return a if a > b or a != a else b


@numba.njit(inline="always")
def _minimum(a: Any, b: Any) -> Any:
    return a if a < b or a != a else b


@numba.njit(inline="always")
def _sign(x: Any) -> Any:
    return type(x)(x > 0) - type(x)(x < 0)


_SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64, types.CPointer(types.float64))
_SOURCES = [Path(__file__), Path(_coefficients.__file__)]
_HASH = hashlib.sha256(b"".join(p.read_bytes() for p in _SOURCES)).hexdigest()[:12]

_kernels: dict[tuple[Rule, np.dtype[Any]], Any] = {}
_compiling = threading.Lock()


def kernel(rule: Rule, dtype: np.dtype[Any]) -> int:
    """The address of the rule's compiled loop. Compiled on first use, then found in Numba's disk cache."""
    with _compiling:
        if (rule, dtype) not in _kernels:
            _kernels[rule, dtype] = _compile(rule, dtype)
        return int(_kernels[rule, dtype].address)


def _compile(rule: Rule, dtype: np.dtype[Any]) -> Any:
    source = numba_source(rule)
    scope: dict[str, Any] = {
        "__name__": __name__,  # Numba imports a cached function's module
        "_view": _view,
        "_T": numba.from_dtype(dtype),
        "sqrt": math.sqrt,
        "absolute": abs,
        "sign": _sign,
        "maximum": _maximum,
        "minimum": _minimum,
    }
    # Compiled under the rules file's name, or Numba would find no place for its disk cache; the hash in the function's
    # name keeps a changed rule, shell or dtype from finding an old entry.
    exec(compile(source, rule.file, "exec"), scope)
    function = scope["kernel"]
    digest = hashlib.sha256(f"{source}{dtype}{_HASH}".encode()).hexdigest()[:12]
    function.__name__ = function.__qualname__ = f"{rule.name}_{dtype}_{digest}"
    try:
        return numba.cfunc(_SIGNATURE, **_OPTIONS)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.cfunc(_SIGNATURE, **{**_OPTIONS, "cache": False})(function)  # a rule typed into a session


# --- drivers ----------------------------------------------------------------------------------------------------------


def _jit(signatures: list[Any], **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit with explicit signatures: types, dtypes, layout and writability are checked by the call itself."""

    def decorate(f: Callable[..., Any]) -> Any:
        f.__qualname__ += f"_{_HASH}"  # the disk cache looks at this file only, not at what is compiled into it
        return numba.njit(signatures, **_OPTIONS, **options)(f)

    return decorate


_I64 = types.int64
_F64 = types.float64
_TABLE = types.Array(_I64, 2, "C")
_INTS = types.Array(_I64, 1, "C")
_COEFFICIENTS = types.Array(_F64, 2, "C")
_STEP = [types.void(_TABLE, _INTS, _INTS, _COEFFICIENTS, _INTS, _I64)]


@numba.njit(inline="always")
def _chunk(rows: Any, kernels: Any, coefficients: Any, r: Any, lo: Any) -> None:
    part = rows[r, 1]
    _call(kernels[part], rows[r, _COLUMNS:], lo, min(CHUNK, rows[r, 0] - lo), coefficients[part])


@_jit(_STEP, nogil=True)
def _serial(rows: Any, first: Any, kernels: Any, coefficients: Any, t: Any, t_new: Any) -> None:
    for r in range(rows.shape[0]):
        for lo in range(0, rows[r, 0], CHUNK):
            _chunk(rows, kernels, coefficients, r, lo)
    t[0] = t_new


@_jit(_STEP, nogil=True, parallel=True)
def _parallel(rows: Any, first: Any, kernels: Any, coefficients: Any, t: Any, t_new: Any) -> None:
    for k in numba.prange(first[-1]):
        r = np.searchsorted(first, k, side="right") - 1  # chunk -> row
        _chunk(rows, kernels, coefficients, r, (k - first[r]) * CHUNK)
    t[0] = t_new


# --- threads ----------------------------------------------------------------------------------------------------------

_pool = threading.Lock()  # held by the one thread that may use Numba's thread pool
_started = False
_forked = False


def _after_fork() -> None:
    """The pool's threads do not exist in a child, and GNU OpenMP would abort it: steps are serial from here on."""
    global _forked, _compiling
    _forked = True
    _compiling = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def _start_pool() -> None:
    """Start Numba's threads. Threads that spin for work collapse when other processes are busy: bound their spinning.

    GNU OpenMP reads its variables once, when it is loaded; they are put back so that nobody else sees them.
    """
    global _started
    bounded = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if bounded:
        os.environ["GOMP_SPINCOUNT"] = "3000"
    try:
        numba.get_num_threads()
    finally:
        if bounded:
            del os.environ["GOMP_SPINCOUNT"]
    _started = True


def _threads() -> int:
    """How many threads a step may use; the caller holds `_pool`."""
    if not _started:
        _start_pool()
    # Numba's own pool aborts the process when two threads use it at once, and not only ours might.
    alone = threading.current_thread() is threading.main_thread() or numba.threading_layer() != "workqueue"
    return numba.get_num_threads() if alone else 1


def launch(n: int, rows: Array, first: Array, kernels: Array, coefficients: Array, t: Array, t_new: int) -> None:
    """Run a table of n elements in all: in parallel if it is worth it, and if no other thread is at it."""
    if n >= SERIAL_BELOW and not _forked and _pool.acquire(blocking=False):
        try:
            run = _parallel if _threads() > 1 else _serial
            run(rows, first, kernels, coefficients, t, t_new)
        finally:
            _pool.release()
    else:
        _serial(rows, first, kernels, coefficients, t, t_new)


# --- adam_step --------------------------------------------------------------------------------------------------------

# Addresses of the kernels of adam_step: [float32 or float64, rule + 3 * maximize], 0 until compiled.
_ADAM = ("adam", "adamw", "adam_l2")
_adam_kernels = np.zeros((2, 6), np.int64)
_DONE, _REFUSED, _COMPILE, _LARGE = range(4)


def _adam_rule(variant: int) -> Rule:
    name, *l2 = _ADAM[variant % 3].split("_")
    return bind(name, (("maximize",) if variant >= 3 else ()) + tuple(l2))


_bias_correction = numba.njit(inline="always")(_coefficients.bias_correction)
_adamw_coefficients = numba.njit(inline="always")(
    FunctionType(_coefficients.adamw.__code__, {"sqrt": math.sqrt, "bias_correction": _bias_correction})
)


@numba.njit(inline="always")
def _apart(a: Any, b: Any, nbytes: Any) -> Any:
    return abs(a - b) >= nbytes


_ADAM_ARGUMENTS = [
    (types.Array(_I64, 2, "C"), p, types.Array(p.dtype, 1, "C", readonly=True), p, p, _I64, *[_F64] * 5, _I64)
    for p in (types.Array(types.float32, 1, "C"), types.Array(types.float64, 1, "C"))
]


@_jit([_I64(*a, _TABLE, _INTS, _COEFFICIENTS) for a in _ADAM_ARGUMENTS])
def _adam_prepare(
    kernels: Any, p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
    variant: Any, row: Any, kernel: Any, c: Any,
) -> Any:  # fmt: skip
    """Check what the signature cannot, then fill one row, its kernel and its coefficients."""
    n = p.size
    nbytes = p.nbytes
    P, G, M, V = p.ctypes.data, g.ctypes.data, m.ctypes.data, v.ctypes.data
    if g.size != n or m.size != n or v.size != n or t < 1:
        return _REFUSED
    if not (_apart(P, G, nbytes) and _apart(P, M, nbytes) and _apart(P, V, nbytes)):
        return _REFUSED
    if not (_apart(G, M, nbytes) and _apart(G, V, nbytes) and _apart(M, V, nbytes)):
        return _REFUSED
    # Written so that NaN fails.
    if not (0.0 <= lr < np.inf and 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        return _REFUSED
    if not (0.0 <= eps < np.inf and 0.0 <= weight_decay < np.inf):
        return _REFUSED
    if weight_decay == 0.0:
        variant -= variant % 3
    kernel[0] = kernels[p.itemsize >> 3, variant]
    if kernel[0] == 0:
        return _COMPILE
    c1, c2, step, scaled_eps, decay = _adamw_coefficients(t, lr, beta1, beta2, eps, weight_decay)
    c[0, 0], c[0, 1], c[0, 2], c[0, 3], k = c1, c2, step, scaled_eps, 4
    if variant % 3:
        c[0, k] = decay if variant % 3 == 1 else weight_decay
        k += 1
    if variant >= 3:
        c[0, k] = -1.0
        k += 1
    limit = _checks._FLOAT32_LIMIT if p.itemsize == 4 else 1.7976931348623157e308
    for i in range(k):
        if not abs(c[0, i]) <= limit:
            return _REFUSED
    row[0, 0], row[0, 1], row[0, 2], row[0, 3], row[0, 4], row[0, 5] = n, 0, P, G, M, V
    return _DONE if n < SERIAL_BELOW else _LARGE


@_jit([_I64(*a) for a in _ADAM_ARGUMENTS])
def _adam_small(
    kernels: Any, p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
    variant: Any,
) -> Any:  # fmt: skip
    """Check and run in one call, unless the arrays are large."""
    row = np.empty((1, 6), np.int64)
    kernel = np.empty(1, np.int64)
    c = np.empty((1, 6))
    status = _adam_prepare(kernels, p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, variant, row, kernel, c)
    if status == _DONE:
        for lo in range(0, p.size, CHUNK):
            _chunk(row, kernel, c, 0, lo)
    return status


def adam_step(
    p: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any, decoupled: Any,
    maximize: Any,
) -> bool:  # fmt: skip
    """Run the step if the arguments are of the plain kinds that compiled code can check; False if Python must look."""
    try:
        beta1, beta2 = betas
        if not (
            type(t) is int
            and type(lr) is type(beta1) is type(beta2) is type(eps) is type(weight_decay) is float
            and type(decoupled) is type(maximize) is bool
            and type(p) is type(g) is type(m) is type(v) is np.ndarray
            and type(betas) is tuple
        ):
            return False
        if p.ndim != 1:
            if not (p.shape == g.shape == m.shape == v.shape and all(a.flags.c_contiguous for a in (p, g, m, v))):
                return False
            p, g, m, v = p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1)
        variant = (1 if decoupled else 2) + (3 if maximize else 0)
        arguments = (_adam_kernels, p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, variant)
        status = _adam_small(*arguments)
        if status == _DONE:
            return True
        if status == _REFUSED:
            return False
        row, kernels, c = np.empty((1, 6), np.int64), np.empty(1, np.int64), np.empty((1, 6))
        if status == _COMPILE:
            if weight_decay == 0:
                variant -= variant % 3
            _adam_kernels[p.itemsize >> 3, variant] = kernel(_adam_rule(variant), p.dtype)
            return adam_step(p, g, m, v, t, lr, betas, eps, weight_decay, decoupled, maximize)
        _adam_prepare(*arguments, row, kernels, c)
        launch(p.size, row, np.array([0, -(-p.size // CHUNK)]), kernels, c, np.empty(1, np.int64), t)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


# --- stepper ----------------------------------------------------------------------------------------------------------


_GRADIENTS = [
    types.boolean(types.Array(_I64, 1, "A"), _I64, _I64, types.Array(dtype, ndim, "C", readonly=True))
    for dtype in (types.float32, types.float64)
    for ndim in (1, 2)
]


@_jit(_GRADIENTS)
def _address(column: Any, k: Any, itemsize: Any, g: Any) -> Any:
    """Write a gradient's address; a third of the time that Python takes to ask for it. False for the wrong dtype."""
    if g.itemsize != itemsize:
        return False
    column[k] = g.ctypes.data
    return True


class Stepper:
    """Steps over fixed parameters and states; see `numpy_cpu.Stepper`."""

    def __init__(self, parts: Sequence[Part], t: Array, writes: _checks.Extents) -> None:
        self._parts = parts
        self._t = t
        self._writes = writes
        rows = [(k, row) for k, part in enumerate(parts) for row in part.rows]
        self._rows = np.zeros((len(rows), _COLUMNS + 1 + max(len(row) for _, row in rows)), np.int64)
        for r, (k, (p, *states)) in enumerate(rows):
            addresses = [address(p), 0, *map(address, states)]
            self._rows[r, : _COLUMNS + len(addresses)] = [p.size, k, *addresses]
        self._first = np.concatenate([[0], np.cumsum(-(-self._rows[:, 0] // CHUNK))]).astype(np.int64)
        self._n = int(self._rows[:, 0].sum())
        ends = np.cumsum([len(part.rows) for part in parts]).tolist()
        gradients = self._rows[:, _COLUMNS + 1]
        self._gradients = [gradients[end - len(part.rows) : end] for part, end in zip(parts, ends, strict=True)]
        self._nbytes = [np.array([row[0].nbytes for row in part.rows], np.int64) for part in parts]
        self._rules: list[Rule] = []
        self._kernels = np.zeros(len(parts), np.int64)

    def prepare(self, rules: Sequence[Rule]) -> None:
        self._kernels[:] = [kernel(rule, part.dtype) for rule, part in zip(rules, self._parts, strict=True)]
        self._coefficients = np.zeros((len(rules), max(1, *(len(rule.coefficients) for rule in rules))))
        self._rules = list(rules)

    def step(
        self, t: int, rules: Sequence[Rule], coefficients: Sequence[Sequence[float]], gradients: Sequence[Gradients]
    ) -> None:
        """Step number t, with a rule, its coefficients and its gradients for each part."""
        if self._rules != rules:
            self.prepare(rules)
        for k, values in enumerate(coefficients):
            self._coefficients[k, : len(values)] = values
        alive = []  # copies that must outlive the launch
        parts = zip(self._parts, self._gradients, self._nbytes, gradients, strict=True)
        for part, column, nbytes, given in parts:
            if isinstance(given, FlatBuffer):
                column[:] = given.addresses
            else:
                alive.append(self._bind(part, column, nbytes, given))
        launch(self._n, self._rows, self._first, self._kernels, self._coefficients, self._t, t)

    def _bind(self, part: Part, column: Array, nbytes: Array, given: Loose) -> list[Array]:
        """Check the gradients and write their addresses."""
        copies = []
        itemsize = part.dtype.itemsize
        for k, (g, shape) in enumerate(zip(given.arrays, part.shapes, strict=True)):
            try:  # the compiled call refuses what is not plain; Python then explains or makes it so
                if type(g) is np.ndarray and g.shape == shape and _address(column, k, itemsize, g):
                    continue
            except TypeError:
                pass
            checked = _checks.gradient(given.names[k], g, given.parameters[k])
            column[k] = address(checked)
            copies.append(checked)
        hit = self._writes.first_overlap(column, nbytes)
        if hit >= 0:
            raise _checks.overlap(given.names[hit])
        return copies


def run(rule: Rule, coefficients: Sequence[float], p: Array, g: Array, states: Sequence[Array]) -> None:
    """One step on checked 1-D arrays."""
    rows = np.array([[p.size, 0, *map(address, (p, g, *states))]], np.int64)
    kernels = np.array([kernel(rule, p.dtype)], np.int64)
    first = np.array([0, -(-p.size // CHUNK)], np.int64)
    launch(p.size, rows, first, kernels, np.array([coefficients], np.float64), np.empty(1, np.int64), 0)
