"""Steps over rows by a kernel that runs on the host, through the stepper of both CUDA backends, against NumPy's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from bits import LARGEST, assert_arrays, inputs
from host_kernel import build
from numba_cuda_cases import OWN, Guarded, values

from fused_adam import SparseGrad
from fused_adam._arrays import CudaArray
from fused_adam._checks import Extents
from fused_adam._codegen import Rule, bind
from fused_adam._sparse import Gather, Mask, gather
from fused_adam.backends import Loose, Rows, _cuda_rows, numpy_cpu
from fused_adam.backends._cuda_source import RowsSource

# Two to four axes; rows of one element, of many to a block, of a block's and of several blocks'; and nothing at all.
SHAPES = (
    (300,),
    (40, 1),
    (1100, 2),
    (70, 59),
    (40, 128),
    (6, 3, 4),
    (5, 2, 3, 2),
    (3, 2048),
    (4, 2049),
    (0, 3),
    (4, 0),
)
WIDE = ((3, 6000), (2, 2, 2050))
KINDS = ("unordered", "ascending", "duplicates", "one", "all", "none", "mask", "mask of none", "dense")

RULES = [bind("sgd"), bind(*LARGEST), OWN]  # for what takes long

Launch = Callable[[int, Any], None]


class OnHost(Gather):
    """Whose gradients' memory is taken for a GPU's."""

    def values(self, stream: int = 1) -> Any:
        return described(super().values(stream))


def described(a: Any) -> CudaArray:
    return CudaArray(a.ctypes.data, (a.size,), a.dtype, "C", True, 0, None, a)


class Memory:
    def __init__(self, nbytes: int) -> None:
        self._guarded = Guarded(np.full(nbytes, 0xFF, np.uint8), 0)
        self.address = self._guarded.array.ctypes.data

    def write(self, a: Any, stream: int, wait: bool = False) -> None:
        self._guarded.array[: a.nbytes] = a.reshape(-1).view(np.uint8)


class Event:
    def record(self, stream: int) -> None:
        pass

    def wait(self, stream: int) -> None:
        pass


class Host:
    """A driver whose device is the host. rows: launches of the kernel over rows, if not those of the host build."""

    def __init__(self, rows: Callable[[RowsSource, Rule, Any], Launch] | None = None) -> None:
        self._rows = rows

    def kernel(self, made: Any, rule: Rule, dtype: Any, device: int) -> Any:
        other = self._rows is not None and isinstance(made, RowsSource)
        launch: Any = self._rows(made, rule, dtype) if other else build(made.text, made.name)  # type: ignore[misc]
        return lambda blocks, arguments, stream: launch(blocks, arguments)

    def table(self, nbytes: int, device: int) -> Memory:
        return Memory(nbytes)

    def event(self, device: int) -> Event:
        return Event()

    def address(self, g: Any, shape: Any, dtype: Any, device: int) -> int:
        return int(g.ctypes.data)


def gradient(kind: str, rng: Any, draw: Callable[[int], Any], p: Any, lazy: bool) -> tuple[Any, Mask | None]:
    """One for p and a mask, if this kind has one."""
    n = p.shape[0]
    if kind == "dense" or kind.startswith("mask"):
        moving = np.flatnonzero(rng.random(n) < (0.5 if kind == "mask" else 0))
        return draw(p.size).reshape(p.shape), None if kind == "dense" else Mask("mask", n, moving)
    indices = {
        "unordered": rng.permutation(n)[: -(-n // 2)],
        "ascending": np.sort(rng.permutation(n)[: -(-n // 2)]),
        "duplicates": rng.integers(0, max(1, n // 3), 2 * n if n else 0),
        "one": np.arange(n)[-1:],
        "all": np.arange(n),
        "none": np.arange(0),
    }[kind].astype(rng.choice([np.int32, np.int64]))
    k = len(indices)
    return SparseGrad(indices, draw(k * (p.size // max(n, 1))).reshape(k, *p.shape[1:]), lazy), None


def check(
    driver: Any, rule: Rule, dtype: Any, shapes: Sequence[tuple[int, ...]], kinds: Sequence[str], lazy: bool, own: bool
) -> None:
    """One step of two groups. own: rows have a t of their own."""
    rng = np.random.default_rng(len(kinds) + 2 * lazy + own)

    def draw(n: int) -> Any:
        given = inputs(rule, dtype, n + int(rng.integers(100)), share=0.05)[1]
        return given[:n]

    groups: tuple[list[Any], ...] = ([], [], [], [])
    checked = []
    for group in (0, 1):
        names, gs, ps, ours, theirs, gathers = [], [], [], [], [], []
        for k, (shape, kind) in enumerate(itertools.product(shapes, kinds)):
            if k % 2 != group:
                continue
            p, _, *states = inputs(rule, dtype, int(np.prod(shape)), share=0.05)
            guarded = [Guarded(a, dtype.itemsize * ((k + j) % 3)) for j, a in enumerate((p, *states))]
            expected = [a.array.copy() for a in guarded]
            g, mask = gradient(kind, rng, draw, p.reshape(shape), lazy)
            steps = rng.integers(0, 3, shape[0]) if own else None
            at = _coefficients(rule, group)
            gathers.append(gather(f"g{k}", g, mask, expected[0].reshape(shape), 1, steps, at))
            names.append(f"g{k}")
            gs.append(g)
            ps.append(expected[0].reshape(shape))
            ours.append(tuple(described(a.array) for a in guarded))
            theirs.append(tuple(expected))
            checked.append((f"{shape} {kind} lazy={lazy} own={own}", guarded, expected))
        for x, y in zip(groups, (Loose(names, gs, ps), ours, theirs, gathers), strict=True):
            x.append(y)

    step(driver, rule, dtype, *groups)
    for what, guarded, expected in checked:
        mine = [a.array for a in guarded]
        assert_arrays(rule, [mine[0], mine[0], *mine[1:]], [expected[0], *expected], what)
        assert all(a.intact() for a in guarded), f"{what}: wrote outside an array"


def step(
    driver: Any,
    rule: Rule,
    dtype: Any,
    loose: Sequence[Loose],
    ours: Sequence[Any],
    theirs: Sequence[Any],
    gathers: Sequence[Sequence[Gather | None]],
) -> None:
    """One step by a kernel over `ours` and one by NumPy over `theirs`, with the rows, or None, of each group."""
    of_rows = [[OnHost(*x) if x else None for x in some] for some in gathers]
    coefficients = [values(rule, group) for group in range(len(loose))]
    ran: list[tuple[Any, Any, Any, tuple[int, ...]]] = [
        (type("Stepper", (_cuda_rows.Stepper,), {"driver": driver}), ours, of_rows, (0,)),
        (numpy_cpu.Stepper, theirs, gathers, ()),
    ]
    for stepper, arrays, some, stream in ran:
        parts = [Rows(dtype, [p.shape for p in g.parameters], rows, []) for g, rows in zip(loose, arrays, strict=True)]
        t = np.zeros(1, np.int64)
        stepper(parts, t, Extents([])).step_rows(5, [rule] * len(parts), coefficients, loose, some, *stream)
        assert t[0] == 5


def check_few(driver: Any, rule: Rule, dtype: Any) -> None:
    """What takes long for each element."""
    for way in every_way():
        check(driver, rule, dtype, [(9, 5), (12,)], KINDS, **way)
    check(driver, rule, dtype, [(2, 2049)], ["duplicates", "one"], lazy=False, own=False)


def _coefficients(rule: Rule, group: int) -> Callable[[int], list[float]]:
    return lambda number: [x * (1 + (number - 1) / 64) for x in values(rule, group)]


def every_way() -> Iterator[dict[str, bool]]:
    """The two choices that are made for a whole step."""
    yield from ({"lazy": lazy, "own": own} for lazy in (False, True) for own in (False, True))
