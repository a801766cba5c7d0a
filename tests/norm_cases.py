"""Launches of a kernel of the norm, wherever it runs, that must leave the digits of `_norm` and touch nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from bits import inputs
from numba_cuda_cases import Guarded

from fused_adam._codegen import bind
from fused_adam._norm import LIMBS, Total, block_sums, unscaling
from fused_adam.backends._cuda_source import KINDS, SUMS, norm_source

COPIES, SET = 64, 72
BEFORE = 8  # in each of the sums, digits and flags, before a launch

Launch = Callable[[range, Any], None]


LAST = 2**31 - 2  # the last block of threads of the largest grid


class Case(NamedTuple):
    """sizes: of segments, one without a table. off: elements by which gradients miss a multiple of 16 bytes.

    on_device: of which type the scale lies in device memory, if it does. before: blocks of threads that are not
    launched, for chunks that are not there.
    """

    numbers: str = "ordinary"
    sizes: tuple[int, ...] = (1000,)
    chunk: int = 2048
    off: int = 0
    scale: float = 1.0
    on_device: str = ""
    before: int = 0


def cases(dtype: np.dtype[Any]) -> list[Case]:
    sizes = [(n,) for n in (1, 3, 4, 127, 128, 129, 4095, 4096, 4097)]
    tables = [(0, 1, 3, 0, 4, 127, 128, 129, 300, 0), (2048, 2049)]
    scales = [1024.0, 3.0, 1e39, 1e-37, 1e-40, 1e46, 1e300, 1e-310, 0.0, -0.0, -1.0, np.inf, -np.inf, np.nan]
    return [
        *(Case(sizes=s) for s in (*sizes, *tables)),
        *(Case(sizes=s, off=1) for s in (*sizes[:6], *tables)),
        Case(sizes=(700,), off=2),
        Case(sizes=(128 * 66 + 1,), chunk=128),  # more blocks of threads than there are sums
        Case(sizes=(9000, 5), chunk=8192),  # more than a block of threads looks at at once
        *(Case(numbers, (300, 4), 256) for numbers in NUMBERS),
        Case("alike", (5000,), 4096),
        *(Case("0", (129, 130, 131), off=off) for off in (0, 1)),  # to which what lies behind them would add
        *(Case(scale=scale) for scale in scales),
        *(Case("subnormal", scale=scale) for scale in (3.0, 1e-37)),
        *(Case(scale=scale, on_device="f4") for scale in (1.0, 3.0, 1e-42, 0.0, np.nan)),
        *(Case(scale=scale, on_device="f8") for scale in (1.0, 3.0, 1e39, np.inf)),
        *(Case(scale=scale, on_device="u1") for scale in (0, 1, 200)),
        *(Case(scale=scale, on_device="?") for scale in (0, 1)),
    ]


def _with(x: float) -> Callable[[Any, Any], Any]:
    """Among ordinary numbers."""

    def filled(dtype: Any, n: int) -> Any:
        a = _ordinary(dtype, n)
        a[n // 2] = x
        return a

    return filled


def _ordinary(dtype: Any, n: int) -> Any:
    return inputs(bind("sgd"), dtype, n, share=0)[1]


def _subnormal(dtype: Any, n: int) -> Any:
    info = np.finfo(dtype)
    return (info.smallest_subnormal * np.arange(1, n + 1)).astype(dtype) * dtype.type(-1)


NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "ordinary": _ordinary,
    # Of one magnitude: each order of additions rounds to another sum.
    "alike": lambda dtype, n: np.random.default_rng(n).uniform(1, 2, n).astype(dtype),
    "special": lambda dtype, n: inputs(bind("sgd"), dtype, n, share=0.02)[1],
    "inf": _with(np.inf),
    "-inf": _with(-np.inf),
    "nan": _with(np.nan),
    "-nan": _with(-np.nan),
    "subnormal": _subnormal,
    "0": lambda dtype, n: np.zeros(n, dtype),
    "-0": lambda dtype, n: -np.zeros(n, dtype),
    "1e38": lambda dtype, n: np.full(n, 1e38, dtype),
    "largest": lambda dtype, n: np.full(n, np.finfo(dtype).max),  # whose squares float64 does not hold
    # Squares of which the first four add up to a float64, and with the next four do not.
    "near": lambda dtype, n: np.full(n, np.sqrt(np.finfo(dtype).max) * 0.4),
    # Of squares that float64 holds as subnormals, and one digit's last bit.
    "small": lambda dtype, n: np.full(n, max(1e-160, np.finfo(dtype).tiny), dtype),
}


def expected(arrays: list[Any], chunk: int, scale: float, block: int) -> Any:
    """What `_norm` adds to the sums, from this block of threads on."""
    sums = np.full((COPIES, SET), BEFORE, np.int64)
    with np.errstate(all="ignore"):
        for a in arrays:
            by = a.dtype.type(unscaling(scale, a.dtype))
            for lo in range(0, a.size, chunk):
                x = by * a[lo : lo + chunk]
                found = block_sums(x, (np.empty(chunk), np.empty(chunk // 4)))
                total = Total()
                total.add(found)
                mine = sums[block % COPIES]
                mine[:LIMBS] += total.limbs
                mine[LIMBS] |= np.isinf(found).any() | 2 * np.isnan(found).any() | 4 * (not np.isfinite(x).all())
                block += 1
    return sums


def check(launch: Launch, dtype: np.dtype[Any], case: Case) -> None:
    made = norm_source(dtype)
    gradients = [Guarded(NUMBERS[case.numbers](dtype, n), dtype.itemsize * case.off * bool(n)) for n in case.sizes]
    arrays = [g.array for g in gradients]
    given = [a.copy() for a in arrays]
    sums = Guarded(np.full(SUMS, BEFORE, np.int64), 0)
    a = np.zeros((), made.arguments)
    a["chunk"], a["sums"] = case.chunk, sums.array.ctypes.data
    scale = np.array(case.scale, case.on_device or "f8")
    if case.on_device:
        a["scale"] = (KINDS[scale.dtype], scale.ctypes.data, np.nan)
    else:
        a["scale"] = (0, 0, case.scale)
    chunks = [-(-n // case.chunk) for n in case.sizes]
    firsts = np.cumsum([0, *chunks]).tolist()
    segments = np.array(list(zip(case.sizes, firsts, strict=False)), made.segment)
    addresses = np.array([g.ctypes.data for g in arrays], np.int64)
    segment_of_chunk = np.repeat(np.arange(len(arrays), dtype=np.int32), chunks)
    if len(arrays) == 1:
        absent = case.before * case.chunk
        a["segment"], a["gradient"] = (absent + case.sizes[0], 0), addresses[0] - absent * dtype.itemsize
    else:
        tables = {"segments": segments, "gradients": addresses, "segment_of_chunk": segment_of_chunk}
        for name, table in tables.items():
            a[name] = table.ctypes.data
    launch(range(case.before, case.before + firsts[-1]), a)
    right = expected(given, case.chunk, bool(scale) if scale.dtype.kind in "ub" else float(scale), case.before)
    ours = sums.array.reshape(COPIES, SET)
    wrong = np.argwhere(ours != right).tolist()
    assert not wrong, f"{case}: [copy, digit] {wrong[0]} is {ours[*wrong[0]]}, not {right[*wrong[0]]}; of {len(wrong)}"
    assert all(g.intact() for g in (*gradients, sums)), f"{case}: wrote outside an array"
    assert all(x.tobytes() == y.tobytes() for x, y in zip(arrays, given, strict=True)), f"{case}: wrote a gradient"
