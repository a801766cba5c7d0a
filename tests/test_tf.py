"""TensorFlow 1's AdamOptimizer: against its formula, written here in float64, and the numbers of TensorFlow's test."""

from __future__ import annotations

import fake_cupy
import numpy as np
import pytest
from conftest import assert_same_bits, same_bits
from tf_cases import BETA1, BETA2, CALLS, EPSILON, LR, Reference, assert_close, make, optimizer, pairs

import fused_adam
from fused_adam import SparseGrad
from fused_adam.tf import AdamOptimizer


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_variables_that_come_and_go_follow_tensorflow(backend, dtype, order):
    variables, start = make(0, dtype, order=order), make(0, dtype)
    opt, reference = optimizer(backend), Reference(start)
    for t, names in enumerate(CALLS):
        grads = make(t + 1, dtype, names)
        opt.apply_gradients(pairs(grads, variables))
        reference.apply(grads)
        assert opt.t == t + 1
        assert_close(opt, variables, reference, start, dtype)


def test_the_place_of_epsilon_is_seen(backend):
    """The tolerance above would not pass the formula of `fused_adam.Adam`: at t = 1 it moves twice as far here."""
    p, q, g = np.zeros(3), np.zeros(3), np.full(3, 0.5)
    optimizer(backend).apply_gradients([(g, p)])
    fused_adam.Adam(q, LR, (BETA1, BETA2), EPSILON, backend=backend).step(g)
    assert (q / p > 1.5).all()
    np.testing.assert_allclose(p, -LR * np.sqrt(0.01) / 0.1 * 0.05 / (np.sqrt(0.0025) + EPSILON), rtol=1e-12)


def test_sparse_gradients_are_dense_ones_with_zeros(backend):
    variables, start = make(0, names="ae"), make(0, names="ae")
    opt, reference = optimizer(backend), Reference(start)
    for t in range(6):
        values = np.random.default_rng(t).standard_normal((4, 4, 3))
        grads = {
            "a": SparseGrad([2, 0, 2, 2], values[0]),
            "e": SparseGrad(np.array([5, 1, 5]), np.ascontiguousarray(values[1, :3, :2])),
        }
        if t % 3 == 2:
            grads["e"] = np.random.default_rng(t).standard_normal((6, 2))
        opt.apply_gradients(pairs(grads, variables))
        reference.apply(grads)
        assert_close(opt, variables, reference, start)


def test_a_lazy_sparse_gradient_leaves_the_other_rows(backend):
    variables, dense = make(0, names="a"), make(0, names="a")
    opt, other = optimizer(backend), optimizer(backend)
    for t in range(3):
        g = make(t + 1, names="a")["a"]
        opt.apply_gradients([(SparseGrad([1, 3], np.ascontiguousarray(g[[1, 3]]), lazy=True), variables["a"])])
        other.apply_gradients([(g, dense["a"])])
    assert same_bits(variables["a"][[1, 3]], dense["a"][[1, 3]])
    assert same_bits(variables["a"][[0, 2]], make(0, names="a")["a"][[0, 2]])


def test_the_bits_of_a_late_variable_are_those_of_adam_at_that_t(backend):
    for dtype in (np.float32, np.float64):
        early, late = make(0, dtype), make(1, dtype)
        opt = optimizer(backend)
        for t in range(4):
            opt.apply_gradients(pairs(make(t + 2, dtype), early))
        expected = make(1, dtype)
        adam = fused_adam.Adam(expected, LR, (BETA1, BETA2), EPSILON, backend="numpy", numerics="tf")
        adam.load_state_dict(adam.state_dict() | {"t": 4})
        for t in range(3):
            grads = make(t + 9, dtype)
            opt.apply_gradients(pairs(grads, late))
            adam.step(grads)
        assert_same_bits(late, late.values(), expected.values())


@pytest.mark.parametrize("kind", ["dense", "sparse", "repeated"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_golden_numbers_of_tensorflows_own_test(backend, dtype, kind):
    """Three steps from 1 and 3 with gradients 0.1 and 0.01; at its tolerance, a thousandth of one step."""
    var0, var1 = np.array([1.0, 2.0], dtype), np.array([3.0, 4.0], dtype)
    opt = AdamOptimizer(backend=backend)
    for _ in range(3):
        g0, g1 = np.array([0.1, 0.1], dtype), np.array([0.01, 0.01], dtype)
        if kind == "sparse":
            g0, g1 = SparseGrad(np.array([0, 1], np.int32), g0), SparseGrad(np.array([0, 1], np.int32), g1)
        if kind == "repeated":
            g0, g1 = SparseGrad([0, 1, 0, 1], np.tile(g0 / 2, 2)), SparseGrad([1, 0, 1, 0], np.tile(g1 / 2, 2))
        opt.apply_gradients([(g0, var0), (g1, var1)])
    np.testing.assert_allclose(var0, [0.9970000003, 1.9970000003], rtol=0, atol=1e-6)
    np.testing.assert_allclose(var1, [2.997000002999997, 3.997000002999997], rtol=0, atol=1e-6)
    np.testing.assert_allclose(opt.get_slot(var0, "m"), 0.0271, rtol=1e-6)
    np.testing.assert_allclose(opt.get_slot(var0, "v"), 2.997001e-05, rtol=1e-6)


# --- on a GPU that is not there ---------------------------------------------------------------------------------------


def test_on_a_gpu_each_call_is_one_launch_with_the_same_bits(monkeypatch):
    host = make(0, np.float32)
    opt = optimizer()
    for t, names in enumerate(CALLS):
        opt.apply_gradients(pairs(make(t + 1, np.float32, names), host))
    with fake_cupy.installed(monkeypatch) as cupy:
        there = {name: cupy.asarray(v) for name, v in make(0, np.float32).items()}
        gpu = optimizer("cupy")
        for t, names in enumerate(CALLS):
            grads = {name: cupy.asarray(g) for name, g in make(t + 1, np.float32, names).items()}
            gpu.apply_gradients(pairs(grads, there))
        assert [name for name, *_ in fake_cupy.launches] == ["adam_f32"] * len(CALLS)
        assert_same_bits(host, [v.get() for v in there.values()], host.values())
        slots = [gpu.get_slot(there[name], slot).get() for name in host for slot in "mv"]
        assert_same_bits(slots_of := [opt.get_slot(host[name], s) for name in host for s in "mv"], slots, slots_of)
