"""Rows that count their own steps."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest
from conftest import require
from sparse_cases import CLASSES, draw, everything, summed

import fused_adam
from fused_adam import SparseGrad


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


def test_prepared_it_compiles_nothing_in_its_first_step(monkeypatch):
    require("numba")
    opt = fused_adam.Adam(np.ones((2**16, 5), np.float32), backend="numba", per_row_step=True)
    opt.prepare()
    loops = importlib.import_module("fused_adam.backends._numba_rows").LOOPS
    assert loops.compiled
    monkeypatch.setattr(type(loops), "compile", None)
    opt.step(SparseGrad([1], np.ones((1, 5), np.float32)))


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
