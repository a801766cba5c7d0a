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
from watch import misaligned

import fused_adam
from fused_adam import SparseGrad
from fused_adam.backends import load

CLASSES = [
    (fused_adam.SGD, {}),
    (fused_adam.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (fused_adam.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    (fused_adam.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    (fused_adam.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (fused_adam.AdamW, {"maximize": True}),
    (fused_adam.Lion, {"weight_decay": 0.1}),
]
# Rows of one element, of a vector and a bit, of more than a chunk of NumPy (2**15) and of Numba (2**16); and so many
# rows that chunks end among them and threads take part (from 2**18 elements on).
SHAPES = [(1,), (50,), (40, 3), (30, 2, 5), (9, 4, 3, 2), (3, 2**15 + 1), (4, 2**16 + 3), (2**17 + 5,), (5000, 59)]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def summed(shape, indices, values, dtype):
    """A dense gradient: duplicates added one after the other, as they come."""
    dense = np.zeros(shape, dtype)
    for row, value in zip(indices, values, strict=True):
        dense[row] += value
    return dense


def picks(rng, rows):
    """Index lists: none, one row, all rows, some with duplicates and in disorder, the last."""
    yield np.zeros(0, np.int64)
    yield np.array([rng.integers(rows)])
    yield np.arange(rows, dtype=np.int32)
    yield rng.integers(0, rows, min(rows, 300))
    yield np.sort(rng.permutation(rows)[: max(1, rows // 10)]).astype(np.uint16 if rows < 2**16 else np.int64)
    yield np.full(3, rows - 1, np.int32)


def everything(opt):
    """The bytes of parameters and states, and t."""
    params = [p.tobytes() for part in opt._parts for p in part.given]
    return params, pickle.dumps(opt.state_dict())


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


@pytest.mark.parametrize(("cls", "hyper"), CLASSES)
def test_rows_with_steps_of_their_own(cls, hyper, backend):
    """Each row goes through what a dense optimizer of that row does that saw its gradients only, whichever way they
    come.
    """
    rng = np.random.default_rng(2)
    for shape in ((7,), (6, 3), (5, 2, 2)):
        p = draw(rng, shape, np.float32)
        rows = [p[k : k + 1].copy() for k in range(len(p))]
        ours = cls(p, **hyper, backend=backend, per_row_step=True)
        alone = [cls(row, **hyper, backend="numpy") for row in rows]
        for t in range(24):
            g = draw(rng, shape, np.float32)
            seen = np.flatnonzero(rng.random(len(p)) < 0.4)
            if t % 4 == 0:
                ours.step(SparseGrad(seen, g[seen], lazy=True))
            elif t % 4 == 1:
                mask = np.zeros(len(p), bool)
                mask[seen] = True
                ours.step(g, mask=mask)
            elif t % 4 == 2:
                ours.step(g)
                seen = np.arange(len(p))
            else:  # the others move with a gradient of 0
                ours.step(SparseGrad(seen, g[seen]))
                g = summed(shape, seen, g[seen], np.float32)
                seen = np.arange(len(p))
            for k in seen:
                alone[k].step(g[k : k + 1])
        assert np.concatenate(rows).tobytes() == p.tobytes()
        saved = ours.state_dict()
        assert saved["state"][0]["row_steps"].tolist() == [opt.t for opt in alone]
        assert len({opt.t for opt in alone}) > 2
        for name in alone[0].state_dict()["state"][0]:
            expected = np.concatenate([opt.state_dict()["state"][0][name] for opt in alone])
            assert saved["state"][0][name].tobytes() == expected.tobytes()


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


def test_groups_and_changed_hyperparameters_with_steps_of_rows(backend):
    rng = np.random.default_rng(10)
    a, b = draw(rng, (4, 3), np.float32), draw(rng, (5,), np.float32)
    alone = [a.copy(), b.copy()]
    groups = [{"params": a, "lr": 0.1}, {"params": b, "betas": (0.5, 0.9)}]
    opt = fused_adam.Adam(groups, backend=backend, per_row_step=True)
    plain = [
        fused_adam.Adam(alone[0], lr=0.1, backend="numpy"),
        fused_adam.Adam(alone[1], betas=(0.5, 0.9), backend="numpy"),
    ]
    for t in range(6):
        opt.param_groups[1]["lr"] = plain[1].param_groups[0]["lr"] = 0.01 * (t + 1)
        opt.param_groups[0]["eps"] = plain[0].param_groups[0]["eps"] = 1e-3 / (t + 1)
        grads = draw(rng, a.shape, np.float32), draw(rng, b.shape, np.float32)
        opt.step(grads)
        for one, g in zip(plain, grads, strict=True):
            one.step(g)
    assert a.tobytes() == alone[0].tobytes() and b.tobytes() == alone[1].tobytes()


def test_the_coefficients_of_a_rows_own_step_are_checked(backend):
    """Those of t = 2 are too large for float32, those of t = 1 are not."""
    p = np.ones((3, 2), np.float32)
    opt = fused_adam.Adam(p, lr=8.5e39, betas=(0.0, 0.999), backend=backend, per_row_step=True)
    g = np.full((1, 2), 1e-30, np.float32)
    opt.step(SparseGrad([0], g, lazy=True))
    opt.step(SparseGrad([1], g, lazy=True))
    before = everything(opt)
    with pytest.raises(ValueError, match="coefficient step is"):
        opt.step(SparseGrad([1, 2], np.repeat(g, 2, 0), lazy=True))
    assert everything(opt) == before and opt.t == 2


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


def test_prepared_it_compiles_nothing_in_its_first_step(monkeypatch):
    require("numba")
    opt = fused_adam.Adam(np.ones((2**16, 5), np.float32), backend="numba", per_row_step=True)
    opt.prepare()
    loops = importlib.import_module("fused_adam.backends._numba_rows").LOOPS
    assert loops.compiled
    monkeypatch.setattr(type(loops), "compile", None)
    opt.step(SparseGrad([1], np.ones((1, 5), np.float32)))


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


def test_a_saved_run_continues_to_the_bit(backend):
    rng = np.random.default_rng(8)
    p = draw(rng, (20, 3), np.float32)
    opt = fused_adam.Adam(p, backend=backend, per_row_step=True)
    gradients = [SparseGrad(rng.integers(0, 20, 6), draw(rng, (6, 3), np.float32), lazy=True) for _ in range(6)]
    for g in gradients[:3]:
        opt.step(g)
    copy = pickle.loads(pickle.dumps(opt))
    q = copy.param_groups[0]["params"]
    loaded = fused_adam.Adam(p.copy(), backend=backend, per_row_step=True)
    loaded.load_state_dict(opt.state_dict())
    for g in gradients[3:]:
        for x in (opt, copy, loaded):
            x.step(g)
    assert p.tobytes() == q.tobytes() == loaded.param_groups[0]["params"].tobytes()
    assert pickle.dumps(opt.state_dict()) == pickle.dumps(copy.state_dict()) == pickle.dumps(loaded.state_dict())

    opt.state_dict()["state"][0]["row_steps"][...] = 99  # a copy
    steps = opt.state_dict()["state"][0]["row_steps"]
    for wrong in (steps[:-1], steps.astype(np.int32), steps - 5, steps + 7):
        state = opt.state_dict()
        state["state"][0]["row_steps"] = wrong
        with pytest.raises(ValueError, match="row_steps"):
            loaded.load_state_dict(state)
    with pytest.raises(ValueError, match="keys"):
        fused_adam.Adam(p.copy(), backend=backend).load_state_dict(opt.state_dict())
    assert pickle.dumps(loaded.state_dict()) == pickle.dumps(opt.state_dict())


V = np.ones((2, 3), np.float32)
WRONG = [
    (SparseGrad([0, 10], V), ValueError, r"grads.indices\[1\] is 10 but the parameter has 10 rows"),
    (SparseGrad([-1, 1], V), ValueError, r"grads.indices\[0\] is -1"),
    (SparseGrad(np.array([0, 2**63 + 1], np.uint64), V), ValueError, r"grads.indices\[1\] is 9223372036854775809"),
    (SparseGrad([0.0, 1.0], V), TypeError, "grads.indices should be integers, got a list"),
    (SparseGrad(np.array([True, False]), V), TypeError, "for a mask pass"),
    (SparseGrad(np.ma.array([0, 100], mask=[False, True]), V), TypeError, "grads.indices should not be a masked array"),
    (SparseGrad([[0, 1]], V), ValueError, r"grads.indices should be 1-D, got shape \(1, 2\)"),
    (SparseGrad([0], V), ValueError, r"grads.values has shape \(2, 3\).*ask for \(1, 3\)"),
    (SparseGrad([0, 1, 1], V), ValueError, r"grads.values has shape \(2, 3\).*ask for \(3, 3\)"),
    (SparseGrad([0, 1], V[:, :2]), ValueError, r"grads.values has shape \(2, 2\)"),
    (SparseGrad([0, 1], V.astype(np.float64)), ValueError, "grads.values has dtype float64 but the parameter"),
    (SparseGrad([0, 1], V.tolist()), TypeError, "grads.values should be a NumPy array"),
    (SparseGrad([0, 1], V, lazy=1), TypeError, "grads.lazy should be True or False"),
]


@pytest.mark.parametrize(("g", "error", "said"), WRONG)
def test_bad_input_is_refused_before_anything_is_written(g, error, said, backend):
    opt = fused_adam.Adam(np.ones((10, 3), np.float32), backend=backend)
    opt.step(np.ones((10, 3), np.float32))
    before = everything(opt)
    with pytest.raises(error, match=said):
        opt.step(g)
    assert everything(opt) == before


MASKS = [
    (np.ones(9, bool), ValueError, "mask has 9 entries but the parameter of grads has 10 rows"),
    (np.ones(10, np.int8), TypeError, "mask should be an array of booleans, got a NumPy array of int8"),
    (np.ones((10, 3), bool), ValueError, r"mask should be 1-D, a boolean for each row, got shape \(10, 3\)"),
    (np.ma.array(np.ones(10, bool), mask=True), TypeError, "mask should not be a masked array"),
    ([np.ones(10, bool)], ValueError, "mask should be one array like the parameter, got a list"),
]


@pytest.mark.parametrize(("mask", "error", "said"), MASKS)
def test_bad_masks(mask, error, said, backend):
    opt = fused_adam.Adam(np.ones((10, 3), np.float32), backend=backend)
    before = everything(opt)
    with pytest.raises(error, match=said):
        opt.step(np.ones((10, 3), np.float32), mask=mask)
    assert everything(opt) == before


def test_what_has_no_rows_or_overlaps(backend):
    ones = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"parameter has shape \(\)"):
        fused_adam.Adam(np.ones((), np.float32), backend=backend).step(SparseGrad([], np.ones(0, np.float32)))
    with pytest.raises(ValueError, match="in Fortran order"):
        fused_adam.Adam(np.asfortranarray(ones), backend=backend).step(ones, mask=np.ones(4, bool))
    with pytest.raises(ValueError, match="in Fortran order"):
        fused_adam.Adam(np.asfortranarray(ones), backend=backend, per_row_step=True)
    p = ones.copy()
    with pytest.raises(ValueError, match="grads overlaps a parameter"):
        fused_adam.Adam(p, backend=backend).step(SparseGrad([0, 1], p[:2]))
    with pytest.raises(ValueError, match="SparseGrad and mask is given too"):
        fused_adam.Adam(p, backend=backend).step(SparseGrad([0], p[:1] * 2), mask=np.ones(4, bool))
    with pytest.raises(TypeError, match="per_row_step should be True or False"):
        fused_adam.Adam(p, backend=backend, per_row_step=1)
    two = fused_adam.Adam([{"params": p.copy()}, {"params": p.copy()}], backend=backend)
    with pytest.raises(ValueError, match="one entry for each of the 2 groups"):
        two.step([ones, ones], mask=[np.ones(4, bool)])
    assert np.array_equal(p, ones)


def test_nothing_moves_but_t(backend):
    for shape in ((0, 3), (5, 0), (5, 3)):
        p = np.ones(shape, np.float32)
        for per_row_step in (False, True):
            opt = fused_adam.Adam(p, backend=backend, per_row_step=per_row_step)
            opt.step(SparseGrad([], np.zeros((0, *shape[1:]), np.float32), lazy=True))
            opt.step(np.ones(shape, np.float32), mask=np.zeros(shape[0], bool))
            assert opt.t == 2 and np.array_equal(p, np.ones(shape, np.float32))
            assert not any(a.any() for a in opt.state_dict()["state"][0].values())


def test_rows_of_no_elements(backend):
    opt = fused_adam.Adam(np.ones((5, 0), np.float32), backend=backend, per_row_step=True)
    for lazy in (False, True):
        opt.step(SparseGrad([1, 1, 0], np.zeros((3, 0), np.float32), lazy))
    assert opt.state_dict()["state"][0]["row_steps"].tolist() == [2, 2, 1, 1, 1]


def test_a_scalar_is_one_row_with_a_step_of_its_own(backend):
    p, q = np.ones((), np.float32), np.ones((), np.float32)
    opt, plain = fused_adam.Adam(p, backend=backend, per_row_step=True), fused_adam.Adam(q, backend=backend)
    for g in (np.float32(1), np.float32(-2)):
        opt.step(g)
        plain.step(g)
    assert p == q != 1


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
