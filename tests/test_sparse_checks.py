"""What is wrong with sparse gradients and masks is refused before anything is written; and what has no rows to move."""

from __future__ import annotations

import numpy as np
import pytest
from sparse_cases import everything

import fused_adam
from fused_adam import SparseGrad

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
