"""The public classes: structures, groups, flat buffers, state dicts, copies, rules of one's own, backends."""

# Rules are source text: the intrinsics in them are names of the grammar, not of this module.
# ruff: noqa: F821

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import fused_adam
from fused_adam.backends import reason

CLASSES = [
    (fused_adam.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    (fused_adam.SGD, {"momentum": 0.9, "nesterov": True}),
    (fused_adam.SGD, {}),
    (fused_adam.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    (fused_adam.RMSprop, {"momentum": 0.9, "centered": True}),
    (fused_adam.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (fused_adam.AdamW, {"maximize": True}),
    (fused_adam.Lion, {"weight_decay": 0.1}),
]
SHAPES = {"W1": (10, 8), "b1": (8,), "deep": {"W2": (3, 4, 5), "s": ()}, "none": (0, 3)}


def tree(seed: int, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def make(shape):
        if isinstance(shape, dict):
            return {k: make(s) for k, s in shape.items()}
        return np.asarray(rng.standard_normal(shape), dtype)

    return make(shapes)


def arrays(t):
    if isinstance(t, np.ndarray):
        return [t]
    return [a for child in (t.values() if hasattr(t, "values") else t) for a in arrays(child)]


def assert_same(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(("cls", "kw"), CLASSES)
def test_every_way_to_pass_parameters_gives_the_same_bytes(cls, kw, backend):
    results = []

    params = tree(0)
    opt = cls(params, backend=backend, **kw)
    for t in range(3):
        opt.step(tree(t + 1))
    results.append(params)

    flat = fused_adam.flatten(tree(0))
    opt = cls(flat, backend=backend, **kw)
    grads = flat.zeros_like()
    for t in range(3):
        for view, g in zip(arrays(grads.tree), arrays(tree(t + 1)), strict=True):
            view[...] = g
        opt.step(grads)
    results.append(flat.tree)

    flat = fused_adam.flatten(tree(0))  # a flat buffer with loose gradients
    opt = cls(flat, backend=backend, **kw)
    for t in range(3):
        opt.step(tree(t + 1))
    results.append(flat.tree)

    params = tree(0)  # TensorFlow's form, in reverse order
    opt = cls(arrays(params), backend=backend, **kw)
    for t in range(3):
        opt.apply_gradients(list(zip(arrays(tree(t + 1)), arrays(params), strict=True))[::-1])
    results.append(params)

    params = tree(0)  # groups, and gradients from a flat buffer
    first, *rest = arrays(params)
    opt = cls([{"params": first}, {"params": rest}], backend=backend, **kw)
    for t in range(3):
        g, *gs = arrays(tree(t + 1))
        opt.step([g, fused_adam.flatten(gs)])
    results.append(params)

    params = tree(0)  # one array at a time
    for k, p in enumerate(arrays(params)):
        opt = cls(p, backend=backend, **kw)
        for t in range(3):
            opt.step(arrays(tree(t + 1))[k])
    results.append(params)

    assert not np.array_equal(results[0]["W1"], tree(0)["W1"])
    for other in results[1:]:
        assert_same(results[0], other)


def test_groups_keep_their_own_hyperparameters_and_dtypes(backend):
    a, b = np.ones(5, np.float32), np.ones(7, np.float64)
    opt = fused_adam.AdamW(
        [{"params": [a], "lr": 0.5, "weight_decay": 0.0}, {"params": {"b": b}}], lr=0.1, backend=backend
    )
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.1]
    opt.step([[np.ones(5, np.float32)], {"b": np.ones(7)}])
    np.testing.assert_allclose(a, 0.5, rtol=1e-6)
    np.testing.assert_allclose(b, 1 - 0.1 - 0.1 * 0.01, rtol=1e-6)
    opt.param_groups[1]["lr"] = 0.0
    before = b.copy()
    opt.step([[np.ones(5, np.float32)], {"b": np.ones(7)}])
    assert np.array_equal(b, before)
    assert a[0] < 0.5
    assert opt.t == 2


def test_mixed_dtypes_in_one_list(backend):
    mixed = [np.ones(5, np.float32), np.ones(7), np.ones(3, np.float32)]
    opt = fused_adam.Adam(mixed, backend=backend)
    opt.step([np.full_like(p, k + 1) for k, p in enumerate(mixed)])
    for k, p in enumerate(mixed):
        alone = np.ones_like(p)
        fused_adam.Adam(alone, backend=backend).step(np.full_like(p, k + 1))
        assert_same(p, alone)
    state = opt.state_dict()["state"]
    assert [s["m"].dtype for s in state] == [np.float32, np.float64, np.float32]
    np.testing.assert_allclose(state[2]["m"], 0.3, rtol=1e-6)


def test_a_state_that_a_changed_hyperparameter_needs_is_refused(backend):
    p = np.ones(3)
    opt = fused_adam.SGD(p, backend=backend)
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="make a new optimizer"):
        opt.step(np.ones(3))
    assert (p == 1).all()
    assert opt.t == 0


def test_keys_that_a_scheduler_adds_to_a_group_do_no_harm(backend):
    opt = fused_adam.SGD(np.ones(3), backend=backend)
    opt.param_groups[0]["initial_lr"] = 0.1
    opt.step(np.ones(3))
    opt.load_state_dict(opt.state_dict())
    assert "initial_lr" not in opt.state_dict()["param_groups"][0]


@pytest.mark.parametrize(("cls", "kw"), CLASSES)
def test_a_resumed_run_continues_bit_for_bit(cls, kw, backend):
    params = tree(0)
    opt = cls(params, backend=backend, **kw)
    for t in range(3):
        opt.step(tree(t + 1))
    saved = copy.deepcopy(opt.state_dict())
    assert saved["t"] == 3
    params2 = copy.deepcopy(params)
    other = cls(params2, backend=backend, **{**kw, "lr": 0.77})
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    twin, pickled = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for t in range(3, 6):
        for o in (opt, other, twin, pickled):
            o.step(tree(t + 1))
    for o in (other, twin, pickled):
        assert o.t == 6
        assert_same(params, o.param_groups[0]["params"])
    assert saved["t"] == 3  # loaded arrays are not aliased
    assert_same(
        [list(s.values()) for s in twin.state_dict()["state"]], [list(s.values()) for s in opt.state_dict()["state"]]
    )


def test_state_dict_is_a_copy_in_the_parameters_shapes(backend):
    p = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    opt = fused_adam.Adam([p], backend=backend)
    opt.step([np.arange(6.0).reshape(2, 3)])
    m = opt.state_dict()["state"][0]["m"]
    np.testing.assert_allclose(m, 0.1 * np.arange(6.0).reshape(2, 3))
    m[:] = 99
    assert opt.state_dict()["state"][0]["m"].max() < 1


def test_a_pickled_flat_buffer_keeps_its_views():
    flat = fused_adam.flatten(tree(0))
    for other in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert_same(flat.tree, other.tree)
        other["deep"]["W2"][0, 0, 0] = 42
        assert 42 in other.data
        assert 42 not in flat.data
        fused_adam.AdamW(copy.deepcopy(flat)).step(other)  # equal layouts fit each other


def test_flat_buffer_layout():
    flat = fused_adam.flatten(tree(0))
    assert flat.data.ctypes.data % 128 == 0
    assert [s.offset % 128 for s in flat.layout.segments] == [0] * 5
    assert flat.data.size == 128 * 4
    flat["b1"] = 7
    assert (flat.data[128:136] == 7).all()
    assert (flat.data[136:256] == 0).all()
    with pytest.raises(TypeError):
        flat.tree["b1"] = np.zeros(8)  # would be ignored by the next step
    assert fused_adam.flatten([np.ones(3)], dtype=np.float32).data.dtype == np.float32
    assert fused_adam.flatten(np.ones((2, 3))[:, ::2]).tree.shape == (2, 2)


def test_padding_never_sees_a_step(backend):
    """eps = 0 and g = 0 give NaN, as in torch; the zeros between the arrays must stay zeros."""
    flat = fused_adam.flatten([np.ones(3, np.float32), np.ones(130, np.float32)])
    grads = flat.zeros_like()
    grads[0][:] = grads[1][:] = 1
    opt = fused_adam.Adam(flat, eps=0.0, backend=backend)
    opt.step(grads)
    assert np.isfinite(flat.data).all()
    assert (flat.data == 0).sum() == 125 + 126
    grads[0][:] = 0
    grads[1][:] = 0
    zero = np.zeros(3, np.float32)
    opt = fused_adam.Adam(zero, eps=0.0, backend=backend)
    opt.step(zero.copy())
    assert np.isnan(zero).all()


def lookahead(t, lr=0.1, beta=0.9):
    return {"c": 1 - beta, "step": lr / t}


def trust(p, g, m, c, step):
    """A rule with a local name, a rebound g and every intrinsic."""
    g = minimum(g, maximum(p, c))
    u = absolute(g) + c
    m = (m - c * m) + c * (g / sqrt(u))
    p = p - step * sign(m) * u
    return p, m


Trust = fused_adam.rule(trust, coefficients=lookahead)
trust = Trust  # picklable under the rule's own name, as with the decorator


def test_a_rule_of_ones_own(backend):
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 1000))
    ours = p.copy()
    opt = Trust([ours], lr=0.2, backend=backend)
    given = g.copy()
    m = np.zeros(1000)
    for t in (1, 2, 3):
        opt.step([given])
        x = np.minimum(g, np.maximum(p, 0.1))
        u = np.abs(x) + (1 - 0.9)
        m = m + (1 - 0.9) * (x / np.sqrt(u) - m)
        p = p - 0.2 / t * np.sign(m) * u
    assert np.array_equal(given, g)  # rebinding g does not write the caller's array
    np.testing.assert_allclose(ours, p, rtol=1e-12)
    assert list(opt.state_dict()["state"][0]) == ["m"]
    twin = pickle.loads(pickle.dumps(opt))
    twin.step([g])
    assert twin.t == 4
    with pytest.raises(TypeError, match="no hyperparameter 'beta3'"):
        Trust([ours], beta3=1)


def outside_a(p, g, lr):
    p = p - 2 * g
    return p


def outside_b(p, g, lr):
    if lr > 0:
        p = p - lr * g
    return p


def outside_c(p, g, lr):
    p = p - exp(g)
    return p


def outside_d(p, g, m, lr):
    m = g
    p = p - lr * m
    return p, m


def outside_e(p, g, lr):
    p = p - lr**2 * g
    return p


def outside_f(p, g, lr, **more):
    p = p - lr * g
    return p


def outside_g(g, p, lr):
    p = p - lr * g
    return p


def outside_h(p, g, m, lr):
    p = p - lr * g
    return p, m


def outside_i(p, g, lr):
    lr = lr * g
    p = p - lr
    return p


def outside_j(p, g, lr):
    p = p - typo * g
    return p


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (outside_a, "literal is not allowed.*p = p - 2"),
        (outside_b, "only assignments"),
        (outside_c, "only sqrt.* may be called.*exp"),
        (outside_d, "bare copy"),
        (outside_e, "literal|only names"),
        (outside_f, "plain arguments"),
        (outside_g, "first two arguments should be p and g"),
        (outside_h, "'m' is returned but never assigned"),
        (outside_i, "'lr' is assigned but not returned"),
        (outside_j, "'typo' is not an argument"),
        (lambda p, g: p, "with def"),
    ],
)
def test_what_stands_outside_the_grammar_is_refused(f, message):
    with pytest.raises(ValueError, match=message):
        fused_adam.rule(f)


def test_backends_are_listed_with_reasons():
    listed = {name: (available, why) for name, available, why in fused_adam.backends()}
    assert list(listed) == ["cupy", "numba-cuda", "numba", "numpy"]
    assert listed["numpy"] == (True, "")
    for available, why in listed.values():
        assert available == (why == "")


def test_auto_takes_numba_for_large_buffers_and_says_so_once(caplog):
    script = (
        "import sys, numpy as np, fused_adam\n"
        "small = fused_adam.AdamW(np.ones(10)); assert small.backend == 'numpy', small.backend\n"
        "assert 'numba' not in sys.modules\n"
        "large = fused_adam.AdamW(np.ones(100_000)); print(large.backend)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_ADAM_BACKEND"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == ("numba" if not reason("numba") else "numpy")
    with caplog.at_level(logging.INFO, "fused_adam"):
        fused_adam.AdamW(np.ones(3), backend="numpy").step(np.ones(3))
    assert [r.getMessage() for r in caplog.records] == ["AdamW runs on the numpy backend"]


def test_the_environment_overrides_auto():
    script = "import numpy as np, fused_adam; print(fused_adam.AdamW(np.ones(100_000)).backend)"
    for name, expected in (("numpy", "numpy\n"), ("cupy", "RuntimeError: FUSED_ADAM_BACKEND 'cupy' is not available")):
        out = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, "FUSED_ADAM_BACKEND": name},
            check=False,
        )
        assert expected in out.stdout + out.stderr


def test_import_is_light():
    """NumPy and little else: the fastest of several processes, so that a busy moment does not count."""
    script = "import time, numpy; t = time.perf_counter(); import fused_adam, sys; print(time.perf_counter() - t)"
    script += "; print([m for m in ('numba', 'torch', 'matplotlib', 'rich', 'cupy', 'jax') if m in sys.modules])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(7):
        out = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
        seconds, loaded = out.splitlines()
        assert loaded == "[]"
        times.append(float(seconds))
    assert min(times) < 0.030, times


def test_a_flat_gradient_that_is_the_memory_of_another_group_is_refused(backend):
    f, g = fused_adam.flatten([np.ones(200)]), fused_adam.flatten([np.ones(200)])
    opt = fused_adam.SGD([{"params": [f[0]]}, {"params": g}], lr=0.5, backend=backend)
    with pytest.raises(ValueError, match=r"grads\[1\] overlaps"):
        opt.step([[np.ones(200)], f])
    assert (f.data[:200] == 1).all()
    assert opt.t == 0


def test_the_data_of_a_flat_buffer_cannot_be_replaced():
    flat = fused_adam.flatten({"a": np.ones(3)})
    flat.data *= 2
    assert (flat["a"] == 2).all()
    assert "a" in flat
    assert list(flat) == ["a"]
    assert len(flat) == 1
    with pytest.raises(AttributeError, match="cannot be replaced"):
        flat.data = np.ones(128)


def test_auto_falls_back_where_numba_cannot_run():
    script = "import numpy as np, fused_adam; print(fused_adam.AdamW(np.ones(100_000)).backend)"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "FUSED_ADAM_BACKEND": ""}
    assert subprocess.check_output([sys.executable, "-c", script], text=True, env=environment) == "numpy\n"
