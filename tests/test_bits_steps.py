"""The same bits from any chunks and threads, and from whole steps: coefficients, flat buffers, lists, `adam_step`."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import exact
import numpy as np
import pytest
from bits import DTYPES, LARGEST, assert_arrays, coefficients, copies, inputs, run, standard
from conftest import BACKENDS, assert_same_bits, missing, require

import fused_adam
from fused_adam._codegen import bind
from fused_adam.backends import load

N = 300_001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("serial_below", [0, 2**62])
def test_threads(serial_below: int, threads: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numba, numba_cpu = require("numba"), load("numba")
    if threads > numba.config.NUMBA_NUM_THREADS:
        missing(f"NUMBA_NUM_THREADS is {numba.config.NUMBA_NUM_THREADS}")
    ran_serial = []
    serial = numba_cpu._LOOPS.serial
    monkeypatch.setattr(numba_cpu._LOOPS, "serial", lambda *a: (ran_serial.append(True), serial(*a)))
    monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", serial_below)
    rule = bind(*LARGEST)
    given = inputs(rule, dtype, N, share=0.1)
    expected = standard(rule, given)
    # many parameters of all sizes in one step, through the public class
    pieces = [slice(lo, hi) for lo, hi in pairwise([0, 0, 1, 1, 70_000, 70_001, 290_000, N])]
    expected_p = given[0].copy()
    fused_adam.AdamW(expected_p, backend="numpy").step(given[1])

    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        for n in (0, 1, 2**16, 2**16 + 1, N):  # none, one chunk, a chunk and one element, several chunks
            ours = [a[:n].copy() for a in given]
            run("numba", rule, coefficients(rule), ours)
            assert_arrays(rule, ours, [a[:n] for a in expected], f"n={n}")
        p = given[0].copy()
        fused_adam.AdamW([p[piece] for piece in pieces], backend="numba").step([given[1][piece] for piece in pieces])
        assert_same_bits(["p"], [p], [expected_p], "pieces")
    finally:
        numba.set_num_threads(before)
    assert bool(ran_serial) == (serial_below > 0 or threads == 1), "not the driver that this row is about"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2, 7, 128, 1000])
def test_chunks_of_numpy(chunk: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = bind(*LARGEST)
    given = inputs(rule, dtype, 3001, share=0.1)
    ours, expected = copies(given), standard(rule, given)
    monkeypatch.setattr(load("numpy"), "CHUNK", chunk)
    run("numpy", rule, coefficients(rule), ours)
    assert_arrays(rule, ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_numba(dtype: Any) -> None:
    """The compiled loop itself, called for [lo, hi) of any cut, the pieces in any order."""
    require("numba")
    rule = bind(*LARGEST)
    values = np.array(coefficients(rule))
    loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
        load("numba").kernel(rule, np.dtype(dtype))
    )
    given = inputs(rule, dtype, 5003, share=0.1)
    expected = standard(rule, given)
    rng = np.random.default_rng(2)
    for count in (1, 2, 10, 1000):
        ours = copies(given)
        row = np.array([a.ctypes.data for a in ours], np.int64)
        pieces = list(pairwise([0, *sorted(rng.integers(0, 5004, count - 1).tolist()), 5003]))
        for lo, hi in rng.permutation(pieces).tolist():
            loop(row.ctypes.data, lo, hi - lo, values.ctypes.data)
        assert_arrays(rule, ours, expected, f"{count} pieces")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", exact.CASES, ids=str)
def test_class(case: exact.Case, dtype: Any) -> None:
    """Arrays or a flat buffer, gradients of either kind, on each backend: one result after seven steps."""
    require("numba")
    rng = np.random.default_rng(3)
    shapes = {"W": (33, 5), "b": (), "empty": (0, 4), "c": (128,), "d": (1, 130)}
    start = {k: np.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    grads = [{k: np.asarray(rng.normal(size=s) * 10.0**-t, dtype) for k, s in shapes.items()} for t in range(7)]
    expected: list[Any] = []
    for backend in BACKENDS:
        for flat, flat_grads in ((False, False), (True, True), (True, False)):
            params = {k: x.copy() for k, x in start.items()}
            params = fused_adam.flatten(params) if flat else params
            optimizer = case.optimizer(params, **case.arguments, backend=backend)
            for g in grads:
                optimizer.step(fused_adam.flatten(g) if flat_grads else g)
            states = optimizer.state_dict()["state"]
            ours = [params[k] for k in shapes] + [a for state in states for a in state.values()]
            expected = expected or ours
            what = f"{backend} flat={flat} flat_grads={flat_grads}"
            assert_same_bits(map(str, range(len(ours))), ours, expected, what)


ROWS = [
    {"betas": betas, "weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": maximize}
    for betas in ((0.9, 0.999), (0.0, 0.0), (1 - 1e-4, 1 - 1e-8))
    for decay, decoupled in ((0.0, False), (0.1, False), (0.1, True))
    for maximize in (False, True)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(map(str, row.values())).replace(" ", ""))
def test_adam_step(row: dict[str, Any], dtype: Any) -> None:
    """The compiled call works its coefficients out itself: the bits of Python's, and of the class, at every t."""
    require("numba")
    arguments = {k: v for k, v in row.items() if k != "decoupled_weight_decay"}
    case = exact.Case(fused_adam.AdamW if row["decoupled_weight_decay"] else fused_adam.Adam, "adam", arguments)
    for t in (*exact.STEPS, 2**31, 2**53 + 1, 2**62 + 3, 2**63 - 1):
        given = exact.arbitrary(case, dtype, seed=5, n=257)
        expected = exact.one_step(case, t, given, "numpy")
        for backend in BACKENDS:
            ours = {name: x.copy() for name, x in given.items()}
            fused_adam.adam_step(*(ours[k] for k in "pgmv"), step=t, **row, backend=backend)
            assert_same_bits(expected, [ours[k] for k in expected], expected.values(), f"{backend} t={t}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_step_amsgrad(dtype: Any, backend: str) -> None:
    case = exact.Case(fused_adam.AdamW, "amsgradw", {"amsgrad": True, "weight_decay": 0.1})
    given = exact.arbitrary(case, dtype, seed=6)
    expected = exact.one_step(case, 3, given, "numpy")
    ours = {name: x.copy() for name, x in given.items()}
    arrays = [ours[k] for k in "pgmv"]
    fused_adam.adamw_step(*arrays, max_v=ours["max_v"], step=3, weight_decay=0.1, backend=backend)
    assert_same_bits(expected, [ours[k] for k in expected], expected.values())
