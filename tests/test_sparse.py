"""Gradients of some rows: the same bytes as dense steps of all rows, or of the given rows alone."""

from __future__ import annotations

import importlib
import io
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import require
from sparse_cases import CLASSES, draw, everything, summed
from watch import misaligned

import fused_adam
from fused_adam import SparseGrad
from fused_adam.backends import load

# Rows of one element, of a vector and a bit, of more than a chunk of NumPy (2**15) and of Numba (2**16); and so many
# rows that chunks end among them and threads take part (from 2**18 elements on).
SHAPES = [(1,), (50,), (40, 3), (30, 2, 5), (9, 4, 3, 2), (3, 2**15 + 1), (4, 2**16 + 3), (2**17 + 5,), (5000, 59)]


def picks(rng, rows):
    """Index lists: none, one row, all rows, some with duplicates and in disorder, the last."""
    yield np.zeros(0, np.int64)
    yield np.array([rng.integers(rows)])
    yield np.arange(rows, dtype=np.int32)
    yield rng.integers(0, rows, min(rows, 300))
    yield np.sort(rng.permutation(rows)[: max(1, rows // 10)]).astype(np.uint16 if rows < 2**16 else np.int64)
    yield np.full(3, rows - 1, np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("cls", "hyper"), CLASSES)
def test_without_lazy_it_is_the_dense_step(cls, hyper, dtype, backend):
    rng = np.random.default_rng(0)
    for shape in SHAPES if cls is fused_adam.AdamW else SHAPES[:5]:
        p = draw(rng, shape, dtype)
        q = p.copy()
        ours, dense = cls(p, **hyper, backend=backend), cls(q, **hyper, backend="numpy")
        for indices in picks(rng, shape[0]):
            values = draw(rng, (len(indices), *shape[1:]), dtype)
            ours.step(SparseGrad(indices, values))
            dense.step(summed(shape, indices, values, dtype))
            assert everything(ours) == everything(dense), (shape, indices)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("cls", "hyper"), CLASSES)
def test_lazy_steps_the_given_rows_alone(cls, hyper, dtype, backend):
    """As a dense step of an array that has no other rows; those others keep their bytes."""
    rng = np.random.default_rng(1)
    for shape in SHAPES if cls is fused_adam.AdamW else SHAPES[:5]:
        p = draw(rng, shape, dtype)
        ours = cls(p, **hyper, backend=backend)
        ours.step(draw(rng, shape, dtype))
        for indices in picks(rng, shape[0]):
            before, p_before = ours.state_dict(), p.copy()
            values = draw(rng, (len(indices), *shape[1:]), dtype)
            ours.step(SparseGrad(indices, values, lazy=True))

            rows = np.unique(indices).astype(np.intp)
            if len(rows):
                q = p_before[rows]
                alone = cls(q, **hyper, backend="numpy")
                state = {k: a[rows] for k, a in before["state"][0].items()}
                alone.load_state_dict({**before, "state": [state]})
                alone.step(summed(shape, indices, values, dtype)[rows])
                p_before[rows] = q
                for name, a in alone.state_dict()["state"][0].items():
                    before["state"][0][name][rows] = a
            assert p.tobytes() == p_before.tobytes(), (shape, indices)
            assert pickle.dumps(ours.state_dict()) == pickle.dumps({**before, "t": before["t"] + 1}), (shape, indices)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("serial_below", [0, 2**62])
def test_threads(serial_below, threads, monkeypatch):
    numba, numba_cpu = require("numba"), load("numba")
    rows = importlib.import_module("fused_adam.backends._numba_rows")
    ran_serial = []
    serial = rows.LOOPS.serial
    monkeypatch.setattr(rows.LOOPS, "serial", lambda *a: (ran_serial.append(True), serial(*a)))
    monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", serial_below)
    rng = np.random.default_rng(9)
    params = [draw(rng, shape, np.float32) for shape in ((9000, 59), (40,), (3, 2**17 + 1))]
    grads = [draw(rng, p.shape, np.float32) for p in params]
    masks = [rng.random(len(p)) < 0.3 for p in params]
    expected = [p.copy() for p in params]
    opt = fused_adam.AdamW(params, backend="numba", per_row_step=True)
    plain = fused_adam.AdamW(expected, backend="numpy", per_row_step=True)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        for g in (grads, [SparseGrad(np.flatnonzero(m), g[m]) for g, m in zip(grads, masks, strict=True)]):
            mask = masks if g is grads else None
            opt.step(g, mask=mask)
            plain.step(g, mask=mask)
    finally:
        numba.set_num_threads(before)
    assert everything(opt) == everything(plain)
    assert bool(ran_serial) == (serial_below > 0 or threads == 1), "not the loop that this row is about"


def test_masks_that_are_made_when_asked_for(backend):
    """Such as those of an open npz file: each is gone before the next one comes, which may then get its id."""
    masks = {name: np.arange(8) == k for k, name in enumerate("abcdef")}
    file = io.BytesIO()
    np.savez(file, **masks)
    file.seek(0)
    params = {name: np.ones((8, 2), np.float32) for name in masks}
    fused_adam.Adam(params, backend=backend).step({k: np.ones_like(p) for k, p in params.items()}, mask=np.load(file))
    for name, p in params.items():
        assert np.array_equal((p != 1).all(axis=1), masks[name])


def test_a_subclass_is_a_sparse_gradient_too(backend):
    class Named(SparseGrad):
        pass

    p = np.ones((3, 2), np.float32)
    fused_adam.Adam(p, backend=backend).step(Named([1], p[:1] * 2, lazy=True))
    assert (p != 1).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_a_mask_is_a_lazy_gradient(backend):
    rng = np.random.default_rng(3)
    shapes = [(1000, 59), (1000,), (1000, 4, 3)]
    params = [draw(rng, s, np.float32) for s in shapes]
    ours = fused_adam.AdamW([p.copy() for p in params], backend=backend)
    lazy = fused_adam.AdamW([p.copy() for p in params], backend="numpy")
    for mask in (rng.random(1000) < 0.1, np.arange(1000) < 500, np.zeros(1000, bool), np.ones(1000, bool)):
        rows = np.flatnonzero(mask)
        grads = [draw(rng, s, np.float32) for s in shapes]
        before = [g.copy() for g in grads]
        ours.step(grads, mask=mask)
        lazy.step([SparseGrad(rows, g[rows], lazy=True) for g in grads])
        assert everything(ours) == everything(lazy)
        assert all(map(np.array_equal, grads, before))


def test_masks_in_the_structure_of_the_parameters(backend):
    rng = np.random.default_rng(4)
    params = {"W": draw(rng, (6, 3), np.float32), "b": draw(rng, (3,), np.float32)}
    grads = {"W": draw(rng, (6, 3), np.float32), "b": draw(rng, (3,), np.float32)}
    mask = np.array([True, False, True, False, False, True])
    expected = {name: p.copy() for name, p in params.items()}
    dense = fused_adam.Adam(expected, backend="numpy")
    dense.step(grads)
    flat = fused_adam.flatten(params)
    flat_grads = flat.zeros_like()
    for name, g in grads.items():
        flat_grads[name] = g
    for given, gradients, view in ((params, grads, params), (flat, flat_grads, flat)):
        start = params["W"].copy()
        fused_adam.Adam(given, backend=backend).step(gradients, mask={"W": mask, "b": None})
        assert view["W"].tobytes() == np.where(mask[:, None], expected["W"], start).tobytes()
        assert view["b"].tobytes() == expected["b"].tobytes()
        params = {"W": start, "b": params["b"]}


def test_a_mask_of_none_is_no_mask(backend):
    p, q = np.ones((4, 2), np.float32), np.ones((4, 2), np.float32)
    fused_adam.Adam([p], backend=backend).step([p * 2], mask=[None])
    fused_adam.Adam([q], backend=backend).step([q * 2])
    assert p.tobytes() == q.tobytes() and (p != 1).all()


def test_groups_with_masks_and_sparse_gradients(backend):
    rng = np.random.default_rng(5)
    a, b, c = (draw(rng, s, d) for s, d in (((8, 2), np.float32), ((8,), np.float64), ((3, 2), np.float32)))
    start = [x.copy() for x in (a, b, c)]
    groups = [{"params": [a, b], "lr": 0.1}, {"params": c, "lr": 0.2, "weight_decay": 0.0}]
    opt = fused_adam.AdamW(groups, backend=backend)
    mask = np.arange(8) % 3 == 0
    ga, gb, gc = (draw(rng, x.shape, x.dtype) for x in (a, b, c))
    opt.step([[ga, gb], SparseGrad([2, 0], gc[[2, 0]], lazy=True)], mask=[mask, None])
    for x, old, g, moved, lr, decay in (
        (a, start[0], ga, mask, 0.1, 1e-2),
        (b, start[1], gb, mask, 0.1, 1e-2),
        (c, start[2], gc, np.array([True, False, True]), 0.2, 0.0),
    ):
        new = old.copy()
        fused_adam.AdamW(new, lr=lr, weight_decay=decay, backend="numpy").step(g)
        assert x.tobytes() == np.where(moved.reshape(-1, *[1] * (x.ndim - 1)), new, old).tobytes()


def test_sparse_beside_dense_and_in_pairs(backend):
    rng = np.random.default_rng(6)
    table, w = draw(rng, (2000, 7), np.float32), draw(rng, (2**16 + 9,), np.float32)
    indices, g = rng.integers(0, 2000, 50), draw(rng, w.shape, np.float32)
    values = draw(rng, (50, 7), np.float32)
    expected = [table.copy(), w.copy()]
    fused_adam.Adam(expected, backend="numpy").step([summed(table.shape, indices, values, np.float32), g])
    for form in ("step", "pairs"):
        params = [table.copy(), w.copy()]
        opt = fused_adam.Adam(params, backend=backend)
        if form == "step":
            opt.step([SparseGrad(indices, values), g])
        else:
            opt.apply_gradients([(g, params[1]), (SparseGrad(indices, values), params[0])])
        assert [p.tobytes() for p in params] == [p.tobytes() for p in expected]


def test_any_place_in_memory(backend):
    """Misaligned parameters and values, and values that are not contiguous."""
    rng = np.random.default_rng(7)
    p, values = draw(rng, (100, 5), np.float32), draw(rng, (5, 20), np.float32).T
    rows = rng.permutation(100)[:20]
    plain, odd = p.copy(), misaligned(p, 3)
    fused_adam.Adam(plain, backend="numpy").step(SparseGrad(rows, values.copy(), lazy=True))
    fused_adam.Adam(odd, backend=backend).step(SparseGrad(rows, misaligned(values, 1), lazy=True))
    assert odd.tobytes() == plain.tobytes()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_any_rows(data):
    """Shapes, rows and a mode at random; the dense oracle is NumPy's."""
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 2, 3, 8, 17, 1000]))
    indices = data.draw(st.lists(st.integers(0, rows - 1), max_size=60))
    lazy, backend = data.draw(st.booleans()), data.draw(st.sampled_from(["numpy", "numba"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    p, values = draw(rng, (rows, width), np.float32), draw(rng, (len(indices), width), np.float32)
    start, expected = p.copy(), p.copy()
    fused_adam.AdamW(p, backend=backend).step(SparseGrad(indices, values, lazy))
    fused_adam.AdamW(expected, backend="numpy").step(summed(p.shape, indices, values, np.float32))
    if lazy:
        away = np.setdiff1d(np.arange(rows), indices)
        expected[away] = start[away]
    assert p.tobytes() == expected.tobytes()
