"""NumPy: each rule as straight-line ufunc calls over chunks that stay in cache; no temporaries are made."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import Array, address
from fused_adam._codegen import Rule, numpy_kernel
from fused_adam._guard import Guard
from fused_adam._layout import FlatBuffer
from fused_adam._norm import Total, block_sums
from fused_adam._sparse import Gather
from fused_adam._storage import decoded
from fused_adam.backends import DeferredInterrupt, Gradients, Kept, Loose, Placed, Rows, module

# Elements a chunk: five float32 streams and the scratch rows of one chunk fit in a 1 MiB L2 cache.
CHUNK = 2**15

_MANY = 64  # chunks whose sums of squares are added up together

_local = threading.local()
_kernels: dict[Rule, tuple[Callable[..., None], int]] = {}


def kernel(rule: Rule) -> tuple[Callable[..., None], int]:
    """The rule's compiled function and the number of scratch rows it takes."""
    if rule not in _kernels:
        text = numpy_kernel(rule)
        names = ("add", "subtract", "multiply", "divide", "sqrt", "absolute", "maximum", "minimum")
        scope = {n: getattr(np, n) for n in (*names, "equal", "greater", "less", "copyto", "putmask")}
        exec(compile(text.source, f"<fused_adam numpy {rule.name}>", "exec"), scope)
        _kernels[rule] = scope["kernel"], text.rows
    return _kernels[rule]


def _scratch(rows: int, dtype: np.dtype[Any]) -> list[Array]:
    """This thread's scratch rows and boolean mask; all allocation happens here, before anything is written."""
    pool: list[Array] = _local.__dict__.setdefault(dtype.char, [])
    while len(pool) < rows:
        pool.append(np.empty(CHUNK, dtype))
    if not hasattr(_local, "mask"):
        _local.mask = np.empty(CHUNK, np.bool_)
    return [*pool[:rows], _local.mask]


def _quiet() -> contextvars.Context:
    """This thread's context in which NumPy reports no floating-point error; unlike errstate, leaving it cannot fail."""
    if not hasattr(_local, "quiet"):
        quiet = contextvars.Context()
        quiet.run(np.seterr, all="ignore")
        _local.quiet = quiet
    context: contextvars.Context = _local.quiet
    return context


_Call = tuple[Callable[..., Any], Sequence[Any]]


_ZERO = np.zeros((), np.uint8)


def _zeroing(g: Array) -> _Call:
    """Of two arguments, as other calls: ufuncs find the free tuples of one gone otherwise, and allocate in mid-step."""
    return np.copyto, [g.view(np.uint8), _ZERO]


class _Counter:
    """Counts, element by element of a chunk, how often p stays although g is not 0. Nothing allocates in mid-step."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._old, self._moving = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
        self._mask = np.empty(CHUNK, np.bool_)
        # A chunk of one element is stepped as one of two, of which the second means nothing.
        self._counts, self._of_one = np.zeros(CHUNK, dtype), np.zeros(2, dtype)
        self._zero = np.zeros((), dtype)

    def around(self, call: _Call, p: Array, g: Array, one: bool) -> list[_Call]:
        """A kernel's call on p and g between those that count."""
        n = p.size
        old, moving, mask = self._old[:n], self._moving[:n], self._mask[:n]
        counts = self._of_one if one else self._counts[:n]
        return [
            (np.copyto, [old, p]),
            (np.not_equal, [g, self._zero, mask]),
            (np.copyto, [moving, mask]),
            call,
            (np.equal, [old, p, mask]),
            (np.copyto, [old, mask]),
            (np.multiply, [old, moving, old]),
            (np.add, [counts, old, counts]),
        ]

    def __int__(self) -> int:
        return int(self._counts.sum(dtype=np.float64)) + int(self._of_one[0])


def _calls(
    rule: Rule,
    coefficients: Sequence[float],
    p: Array,
    g: Array,
    states: Sequence[Array],
    counter: _Counter | None = None,
) -> list[_Call]:
    """A kernel call for each chunk. Every view is made here, before the first write. counter: for a rule that counts.

    For misaligned arrays, and to write one element in place, a ufunc allocates, which could fail in mid-step: these go
    through scratch rows, by plain copies of bytes.
    """
    f, rows = kernel(rule)
    arrays = (p, g, *states)
    *scratch, mask = _scratch(rows + len(arrays), p.dtype)
    scalars = [np.array(x, p.dtype) for x in coefficients]
    zero = np.zeros((), p.dtype)
    misaligned = [k for k, a in enumerate(arrays) if not a.flags.aligned]
    whole = [*scalars, *(r[:CHUNK] for r in (*scratch[:rows], mask)), zero]
    calls: list[_Call] = []
    for lo in range(0, p.size, CHUNK):
        n = min(CHUNK, p.size - lo)
        chunk = [a[lo : lo + n] for a in arrays]
        write_back: list[_Call] = []
        for k in range(len(arrays)) if n == 1 else misaligned:
            outside, inside = chunk[k].view(np.uint8), scratch[rows + k][:n].view(np.uint8)
            calls.append((np.copyto, [inside, outside]))
            if k != 1:  # g is only read
                write_back.append((np.copyto, [outside, inside]))
            chunk[k] = scratch[rows + k][: max(n, 2)]
        rest = whole if n == CHUNK else [*scalars, *(r[: max(n, 2)] for r in (*scratch[:rows], mask)), zero]
        call: _Call = (f, chunk + rest)
        calls += [call] if counter is None else counter.around(call, chunk[0], chunk[1], n == 1)
        calls += write_back
        if rule.zeroes:
            calls.append(_zeroing(g[lo : lo + n]))
    return calls


class _Pair(NamedTuple):
    """Rows (p, *states) of a part, 1-D, and the gradient of each.

    kept: how they and the gradients are kept, where not all are of the type that is computed in; first: as of `Rows`.
    """

    rows: Sequence[Any]
    gs: Sequence[Array]
    kept: Kept | None = None
    first: Sequence[int] = ()


def _part_calls(
    part: Rows, t: int, rule: Rule, coefficients: Sequence[float], pair: _Pair, counter: _Counter | None = None
) -> list[_Call]:
    """Those of step t."""
    calls: list[_Call] = []
    if pair.kept is None:
        for (p, *states), g in zip(pair.rows, pair.gs, strict=True):
            calls += _calls(rule, coefficients, p, g, states, counter)
        return calls
    stored = module("_numpy_stored")
    f, rows = kernel(rule)
    scratch = _scratch(2 + len(rule.states) + rows, part.dtype)
    kept = pair.kept._replace(t=t)
    for (p, *rest), g, first in zip(pair.rows, pair.gs, pair.first, strict=True):
        calls += stored.calls(rule, f, coefficients, p, g, rest, kept, first, scratch, CHUNK)
    return calls


def _row_calls(rule: Rule, moved: Gather, p: Array, values: Array, states: Sequence[Array]) -> list[_Call]:
    """Calls for the rows of a parameter that move: those that do not follow each other go through scratch rows."""
    values, source = moved.summed(values)
    w = moved.width
    everyone = np.arange(p.size // max(w, 1)) if moved.every else moved.rows
    if not p.size or not len(everyone):
        return []
    # Rows as opaque bytes: NumPy copies each in one go, whether it is aligned or not. Taken and put by methods that
    # allocate nothing, and "clip", for the rows were checked: with "raise" they would go through a buffer. A row of
    # more than a chunk is a chunk of its own, and never copied.
    row = np.dtype((np.void, w * p.itemsize if w <= CHUNK else 1))
    gradients, table = values.view(row), [a.view(row) for a in (p, *states)]
    each = max(1, CHUNK // w)
    used = kernel(rule)[1] + 1 + len(table)  # by `_calls`
    found, zeros, *inside = _scratch(used + 2 + len(table), p.dtype)[used:-1]
    if w > CHUNK:
        zeros = np.zeros(w, p.dtype)
    calls: list[_Call] = []
    for coefficients, mine in moved.by_variant(everyone):
        for lo in range(0, len(mine), each):
            here = mine[lo : lo + each]
            n = len(here)
            first, last = np.searchsorted(moved.rows, (here[0], here[-1] + 1))
            place = np.searchsorted(here, moved.rows[first:last])
            own = here[place] == moved.rows[first:last]
            place, numbers = place[own], source[first:last][own]
            if len(numbers) == n and numbers[-1] - numbers[0] == n - 1 and np.all(np.diff(numbers) == 1):
                g = values[numbers[0] * w : (numbers[0] + n) * w]
            else:
                g = zeros[: n * w]
                calls.append((g.fill, [np.zeros((), g.dtype)]))
                if len(numbers):
                    some = found[: len(numbers) * w].view(row)
                    calls.append((gradients.take, [numbers, 0, some, "clip"]))
                    calls.append((g.view(row).put, [place, some, "clip"]))
            if here[-1] - here[0] == n - 1:
                rows = [a[here[0] * w : (here[0] + n) * w] for a in (p, *states)]
                calls += _calls(rule, coefficients, rows[0], g, rows[1:])
            else:
                rows = [a[: n * w] for a in inside]
                copies = [(a, copy.view(row)) for a, copy in zip(table, rows, strict=True)]
                calls += [(a.take, [here, 0, copy, "clip"]) for a, copy in copies]
                calls += _calls(rule, coefficients, rows[0], g, rows[1:])
                calls += [(a.put, [here, copy, "clip"]) for a, copy in copies]
    return calls


def _execute(calls: Sequence[_Call], t: Array, t_new: int) -> None:
    quiet = _quiet()
    # As tuples, or each call would make its own: for more than 20 arguments, as many preludes need, with new memory.
    made = [(f, tuple(arguments)) for f, arguments in calls]
    with DeferredInterrupt():
        quiet.run(_call_all, made, t, t_new)


def _call_all(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], t: Array, t_new: int) -> None:
    for f, arguments in calls:
        f(*arguments)
    t[0] = t_new


def run(rule: Rule, coefficients: Sequence[float], p: Array, g: Array, states: Sequence[Array]) -> None:
    """One step on checked 1-D arrays."""
    _execute(_calls(rule, coefficients, p, g, states), np.empty(1, np.int64), 0)


def total_of(each: Iterable[tuple[Sequence[Array], Any]]) -> Total:
    """The squares of gradients, each 1-D and with what it is to be multiplied by, a scalar of what is computed in."""
    total = Total()
    rows = np.empty(CHUNK), np.empty(CHUNK // 4)
    found: list[Array] = []  # sums of several chunks: many at once are added up twice as fast
    with np.errstate(all="ignore"):
        for gs, unscaling in each:
            for g in gs:
                for lo in range(0, g.size, CHUNK):
                    x = g[lo : lo + CHUNK]
                    x = decoded(x) if x.itemsize == 2 else x
                    x = x if unscaling == 1 else x * unscaling
                    sums = block_sums(x, rows)
                    # Of finite float32 numbers no sum overflows; of float64 it may.
                    total.finite = total.finite and (bool(np.isfinite(sums).all()) or bool(np.isfinite(x).all()))
                    found.append(sums.copy())
                    if len(found) == _MANY:
                        total.add(np.concatenate(found))
                        found.clear()
    if found:
        total.add(np.concatenate(found))
    return total


class Stepper:
    """Steps over fixed parameters and states.

    Args:
        parts: their rows.
        t: int64 array of one element, the number of steps done; committed with the step.
        writes: the memory of parts, which no gradient may overlap.
    """

    def __init__(self, parts: Sequence[Rows], t: Array, writes: _checks.Extents) -> None:
        self._parts = parts
        self._t = t
        self._writes = writes

    def prepare(self, rules: Sequence[Rule], by_row: bool, norm: bool) -> None:
        """by_row: for `step_rows`. norm: for one that needs it."""
        for part, rule in zip(self._parts, rules, strict=True):
            used = kernel(rule)[1] + 2 + len(rule.states)
            _scratch(used + (3 + len(rule.states)) * by_row, part.dtype)

    def step(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Gradients | Placed],
    ) -> None:
        """Step number t, with a rule, its coefficients and its gradients for each part."""
        _execute(self._all_calls(t, rules, coefficients, gradients), self._t, t)

    def _all_calls(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Gradients | Placed],
    ) -> list[_Call]:
        calls: list[_Call] = []
        each = zip(self._parts, rules, coefficients, self._pairs(gradients), strict=True)
        for part, rule, values, pair in each:
            calls += _part_calls(part, t, rule, values, pair)
        return calls

    def step_guarded(
        self, t: int, rules: Sequence[Rule], gradients: Sequence[Gradients | Placed], guard: Guard
    ) -> None:
        """`step` with the coefficients that the guard decides on, or no step."""
        pairs = self._pairs(gradients)
        if guard.settings.zeroes:
            _checks.zeroable(gradients)
        total = None
        if guard.settings.wants_norm:
            each = zip(self._parts, pairs, strict=True)
            total = total_of((pair.gs, part.dtype.type(guard.unscaling[part.dtype])) for part, pair in each)
        coefficients = guard.decide(total)
        calls: list[_Call] = []
        if coefficients is None:
            if guard.settings.zeroes:
                calls = [_zeroing(g) for pair in pairs for g in pair.gs]
            _execute(calls, self._t, t - 1)
            return
        counters = []
        for part, rule, values, pair in zip(self._parts, rules, coefficients, pairs, strict=True):
            counter = _Counter(part.dtype) if rule.counts else None
            counters += [counter] if counter is not None else []
            calls += _part_calls(part, t, rule, values, pair, counter)
        guard.count = lambda: sum(map(int, counters))
        _execute(calls, self._t, t)

    def _pairs(self, gradients: Sequence[Gradients | Placed]) -> list[_Pair]:
        """For each part the rows to step over and the gradient of each, checked."""
        return [self._pair(part, given) for part, given in zip(self._parts, gradients, strict=True)]

    def _pair(self, part: Rows, given: Gradients | Placed) -> _Pair:
        if part.kept is not None:
            kept, gs = module("_stored").gradients(part, given)
            if isinstance(given, FlatBuffer):
                return _Pair(part.runs, gs, kept, part.run_first)
            if isinstance(given, Loose):
                self._refuse_overlaps(given, gs)
            return _Pair(part.rows, gs, kept, part.first)
        if isinstance(given, FlatBuffer):
            return _Pair(part.runs, given.runs)
        return _Pair(part.rows, given.arrays(part) if isinstance(given, Placed) else self._checked(given))

    def step_rows(
        self,
        t: int,
        rules: Sequence[Rule],
        coefficients: Sequence[Sequence[float]],
        gradients: Sequence[Loose],
        gathers: Sequence[Sequence[Gather | None]],
    ) -> None:
        """`step` where of each parameter that has one only the rows of its gather move."""
        calls: list[_Call] = []
        for part, rule, values, given, some in zip(self._parts, rules, coefficients, gradients, gathers, strict=True):
            dense = iter(self._checked(given.only([moved is None for moved in some])))
            for (p, *states), moved in zip(part.rows, some, strict=True):
                if moved is None:
                    calls += _calls(rule, values, p, next(dense), states)
                else:
                    self._writes.refuse(moved.name, g := moved.values())
                    calls += _row_calls(rule, moved, p, g, states)
                    calls.append(moved.commit())
        _execute(calls, self._t, t)

    def _checked(self, given: Loose) -> list[Array]:
        gs = [_checks.gradient(*x) for x in zip(given.names, given.arrays, given.parameters, strict=True)]
        self._refuse_overlaps(given, gs)
        return gs

    def _refuse_overlaps(self, given: Any, gs: Sequence[Array]) -> None:
        starts = np.array([address(g) for g in gs], np.int64)
        hit = self._writes.first_overlap(starts, np.array([g.nbytes for g in gs], np.int64))
        if hit >= 0:
            raise _checks.overlap(given.names[hit])
