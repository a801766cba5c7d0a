"""Unscaled, checked, clipped and zeroed gradients on a GPU that is not there: the bytes of NumPy, nothing waits."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import fake_cupy
import fake_numba
import numpy as np
import pytest
from conftest import require, same_bits

import fused_adam

OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 1e9},
    {"skip_nonfinite": True},
    {"max_grad_norm": 2.0, "skip_nonfinite": True, "zero_grads": True, "count_unmoved": True},
    {"device_scalars": True},
    {"zero_grads": True},
]
CLASSES = {
    "sgd": lambda p, **k: fused_adam.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, maximize=True, **k),
    "adagrad": lambda p, **k: fused_adam.Adagrad(p, lr_decay=0.1, **k),
    "rmsprop": lambda p, **k: fused_adam.RMSprop(p, centered=True, momentum=0.5, **k),
    "adam": lambda p, **k: fused_adam.Adam(p, amsgrad=True, numerics="optax", eps_root=1e-6, **k),
    "adamw": lambda p, **k: fused_adam.AdamW(p, **k),
    "lion": lambda p, **k: fused_adam.Lion(p, weight_decay=0.1, **k),
}
# Every class with all that there is, and one with each of it; the rest is compiled for nothing.
ROWS = [(name, OPTIONS[4], k % 2 == 0) for k, name in enumerate(CLASSES)]
ROWS += [("adamw", options, flat) for options in OPTIONS for flat in (False, True)]
SHAPES = [(10, 13), (1,), (0, 3), (), (64, 128), (5000,)]


@pytest.fixture
def cupy(monkeypatch):
    with fake_cupy.installed(monkeypatch) as module:
        yield module


def arrays(dtype: Any = np.float32, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), dtype) for shape in SHAPES]


class Pair:
    """One optimizer on the host and one on the device, stepped side by side."""

    def __init__(self, cupy: Any, make: Any, dtype: Any = np.float32, flat: bool = False, **options: Any) -> None:
        self.host = arrays(dtype)
        self.to_device = cupy.asarray if hasattr(cupy, "asarray") else cupy.to_device
        device = [self.to_device(a) for a in self.host]
        self.flat = fused_adam.flatten(device) if flat else None
        self.device = list(self.flat) if flat else device
        self.expected = make(self.host, backend="numpy", **options)
        self.ours = make(device if self.flat is None else self.flat, **options)

    def step(self, gradients: list[Any], **arguments: Any) -> list[Any]:
        """Returns the device's gradients."""
        gradients = [np.asarray(g) for g in gradients]
        host = [g.copy() for g in gradients]
        self.expected.step(host, **arguments)
        if self.flat is None:
            device = [self.to_device(g) for g in gradients]
            self.ours.step(device, **arguments)
        else:
            buffer = self.flat.zeros_like()
            for k, g in enumerate(gradients):
                buffer[k] = self.to_device(g)
            self.ours.step(buffer, **arguments)
            device = list(buffer)
        assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))
        return device

    def check(self) -> None:
        assert all(same_bits(a, b.get()) for a, b in zip(self.host, self.device, strict=True))
        ours, theirs = self.ours.state_dict(), self.expected.state_dict()
        assert ours["t"] == theirs["t"] == self.ours.t
        for mine, other in zip(ours["state"], theirs["state"], strict=True):
            assert all(same_bits(mine[name], other[name]) for name in other)
        assert self.ours.last_stats() == self.expected.last_stats()


def infinite(seed: int, dtype: Any, value: float = np.inf) -> list[Any]:
    gs = arrays(dtype, seed)
    gs[4][3, 5] = value
    return gs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options", "flat"), ROWS, ids=str)
def test_the_bytes_of_numpy(cupy, name, options, dtype, flat):
    pair = Pair(cupy, CLASSES[name], dtype, flat, **options)
    assert pair.ours.backend == "cupy"
    for k in range(3):
        pair.step(arrays(dtype, k + 1))
    pair.step([8 * g for g in arrays(dtype, 7)], grad_scale=8.0)
    pair.step(infinite(8, dtype))
    pair.step(arrays(dtype, 9), found_inf=True)
    pair.step(arrays(dtype, 10), grad_scale=3.0, found_inf=0)
    pair.check()


@pytest.mark.parametrize("options", OPTIONS[1:5], ids=str)
def test_scalars_on_the_device(cupy, options):
    """A scale and a flag in device memory, as a gradient scaler keeps them; scales that make no sense skip the step."""
    pair = Pair(cupy, CLASSES["adamw"], **options)
    for kind in (np.float32, np.float64):
        for scale in (4.0, 0.0, -1.0, np.nan, np.inf, 1e-45):
            gs = [np.asarray(g * 4) for g in arrays(seed=int(kind is np.float32))]
            host, device = [g.copy() for g in gs], [cupy.asarray(g) for g in gs]
            held = np.array([scale], kind)
            pair.expected.step(host, grad_scale=held)
            pair.ours.step(device, grad_scale=cupy.asarray(held))
    for kind, value in itertools.product((np.float32, np.float64, np.bool_), (0, 1)):
        held = np.array(value, kind)
        pair.expected.step(arrays(), found_inf=held)
        pair.ours.step([cupy.asarray(g) for g in arrays()], found_inf=cupy.asarray(held))
    pair.check()
    assert pair.ours.last_stats().skipped == 13 and pair.ours.t == 5


def test_nothing_waits_for_the_device(cupy, monkeypatch):
    pair = Pair(cupy, CLASSES["adamw"], **OPTIONS[4])
    pair.ours.prepare()

    def wait(*_: Any) -> None:
        raise AssertionError("the host waited for the device")

    for name in ("streamSynchronize", "deviceSynchronize", "memcpy"):
        monkeypatch.setattr(cupy.cuda.runtime, name, wait)
    device = [cupy.asarray(g) for g in arrays(seed=1)]
    fake_cupy.copies.clear()
    for lr in (0.1, 0.2, 0.3):
        pair.ours.set_lr(lr)
        pair.ours.step(device)
    assert len(fake_cupy.launches) == 9  # norm, prologue, step
    assert len(fake_cupy.copies) == 3 + 2  # each learning rate, and gradients' addresses for two launches


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{"device_scalars": True}, OPTIONS[4]], ids=str)
def test_a_captured_step_replays_with_its_own_t_and_lr(cupy, options, flat):
    """Groups, a schedule, skipped steps in between; and a captured graph keeps its gradients' places."""

    def make(params: Any, **k: Any) -> Any:
        return fused_adam.AdamW(params, lr=0.01, **k)

    pair = Pair(cupy, make, flat=flat, **options)
    gs = arrays(seed=1)
    device = pair.flat.zeros_like() if flat else [cupy.asarray(g) for g in gs]

    def fill(values: list[Any]) -> None:
        for k, g in enumerate(values):
            if flat:
                device[k] = cupy.asarray(g)
            else:
                device[k][...] = cupy.asarray(g)

    fill(gs)
    pair.ours.step(device, stream=5)
    pair.expected.step([g.copy() for g in gs])
    fake_cupy.capturing.add(5)
    pair.ours.step(device, stream=5)
    fake_cupy.capturing.clear()
    assert pair.ours.t == 1  # a capture does nothing
    other = [cupy.asarray(g) for g in arrays(seed=99)]
    for k in range(30):
        values = infinite(k, np.float32) if k % 7 == 3 and "skip_nonfinite" in options else arrays(seed=k)
        pair.ours.set_lr(0.01 / (k + 1))
        pair.expected.set_lr(0.01 / (k + 1))
        fill(values)
        pair.expected.step([g.copy() for g in values])
        fake_cupy.replay()
        if k == 10:  # an ordinary step with other arrays in between
            pair.expected.step(arrays(seed=99))
            pair.ours.step(other)
    pair.check()
    assert any(
        gradients is device or getattr(gradients, "given", None) for gradients in pair.ours._stepper._graphs[0][0]
    )


def test_what_cannot_be_captured(cupy):
    opt = fused_adam.AdamW([cupy.asarray(a) for a in arrays()], device_scalars=True)
    gs = [cupy.asarray(g) for g in arrays()]
    opt.step(gs, stream=5)
    opt.param_groups[0]["lr"] = 0.5
    fake_cupy.capturing.add(5)
    with pytest.raises(RuntimeError, match="a hyperparameter changed since the last step"):
        opt.step(gs, stream=5)
    opt.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match="moved during a capture"):
        opt.step([cupy.asarray(g) for g in arrays()], stream=5)
    fake_cupy.capturing.clear()
    assert not fake_cupy.graph and opt.t == 1


def captured(cupy, make, **options):
    """A pair after one step, which is then captured; and the gradients."""
    pair = Pair(cupy, make, **options)
    device = [cupy.asarray(g) for g in arrays(seed=1)]
    pair.ours.step(device, stream=5)
    pair.expected.step(arrays(seed=1))
    fake_cupy.capturing.add(5)
    pair.ours.step(device, stream=5)
    fake_cupy.capturing.clear()
    return pair, device


def test_another_rule_is_refused_after_a_capture(cupy):
    """Its coefficients would reach the captured kernel as others."""
    pair, _ = captured(cupy, CLASSES["adamw"], device_scalars=True)
    pair.ours.param_groups[0]["weight_decay"] = 0.0
    for change in (lambda: pair.ours.set_lr(0.5), lambda: pair.ours.step([cupy.asarray(g) for g in arrays()])):
        with pytest.raises(
            RuntimeError, match="asks for another rule was changed: a step of this optimizer was captured"
        ):
            change()
    assert pair.ours.param_groups[0]["lr"] == 1e-3
    pair.ours.param_groups[0]["weight_decay"] = 1e-2
    fake_cupy.replay()
    pair.expected.step(arrays(seed=1))
    pair.check()


def test_a_loaded_learning_rate_reaches_replays(cupy):
    pair, _ = captured(cupy, CLASSES["adamw"], device_scalars=True)
    for opt in (pair.ours, pair.expected):
        saved = opt.state_dict()
        saved["param_groups"][0]["lr"] = 0.5
        opt.load_state_dict(saved)
    fake_cupy.replay()
    pair.expected.step(arrays(seed=1))
    pair.check()


def test_before_a_capture(cupy):
    """What was neither prepared nor done is refused; what was prepared is not."""
    flat = fused_adam.flatten([cupy.asarray(a) for a in arrays()])
    grads = flat.zeros_like()
    opt = fused_adam.AdamW(flat, max_grad_norm=1.0)
    fake_cupy.capturing.add(5)
    with pytest.raises(RuntimeError, match=r"not prepared for a capture; call prepare\(\)"):
        opt.step(grads, stream=5)
    fake_cupy.capturing.clear()
    single = fused_adam.flatten([cupy.asarray(arrays()[0])])
    opt, grads = fused_adam.AdamW(single, max_grad_norm=1.0), single.zeros_like()
    opt.param_groups[0]["lr"] = 0.5
    opt.prepare()
    fake_cupy.capturing.add(5)
    opt.step(grads, stream=5)
    fake_cupy.capturing.clear()
    assert len(fake_cupy.graph) == 3 and opt.t == 0


def test_scalars_are_not_kept_for_longer_than_a_step(cupy):
    pair = Pair(cupy, CLASSES["adamw"], max_grad_norm=1.0)
    device = [cupy.asarray(g) for g in arrays(seed=1)]
    for _ in range(5):
        pair.ours.step(device, grad_scale=cupy.asarray(np.ones(1, np.float32)))
    assert len(pair.ours._stepper._alive) + len(pair.ours._stepper._lent) == 1


def test_set_lr_changes_nothing_when_it_raises(cupy):
    pair = Pair(cupy, CLASSES["adamw"], device_scalars=True)
    for lr, options, kind in ((1e300, {}, ValueError), (0.5, {"stream": "x"}, TypeError), (-1.0, {}, ValueError)):
        with pytest.raises(kind):
            pair.ours.set_lr(lr, **options)
        assert pair.ours.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ValueError, match="stream is for scalars that are kept on a GPU"):
        pair.expected.set_lr(0.5, stream=5)


def test_coefficients_that_overflow_later_are_refused(cupy):
    for make, arguments in (
        (fused_adam.SGD, {"momentum": 0.9, "dampening": 1e39}),
        (fused_adam.Adam, {"lr": 5e39, "betas": (0.0, 0.999)}),
    ):
        with pytest.raises(ValueError, match="which float32 cannot hold"):
            make([cupy.asarray(arrays()[0])], **arguments, device_scalars=True)


def test_groups_and_mixed_dtypes(cupy):
    """Each group its own rule and learning rate; one norm over all of them."""

    def make(a: Any, b: Any, c: Any, d: Any) -> Any:
        groups = [{"params": [a, b]}, {"params": [c], "amsgrad": True, "weight_decay": 0.1, "lr": 0.5}, {"params": d}]
        return fused_adam.Adam(groups, max_grad_norm=1.0, skip_nonfinite=True)

    rng = np.random.default_rng(1)
    host = [rng.normal(size=n).astype(t) for n, t in ((300, "f4"), (129, "f8"), (1, "f4"), (5000, "f8"))]
    device = [cupy.asarray(a) for a in host]
    expected, ours = make(*host), make(*device)
    for k in range(4):
        gs = [np.asarray(rng.normal(size=a.shape), a.dtype) for a in host]
        gs[k][0] = np.nan if k == 2 else gs[k][0]
        for opt in (expected, ours):
            opt.set_lr(0.1 * (k + 1), group=2)
        expected.step([gs[:2], gs[2:3], gs[3]])
        ds = [cupy.asarray(g) for g in gs]
        ours.step([ds[:2], ds[2:3], ds[3]])
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))
    assert expected.last_stats() == ours.last_stats() and ours.t == 3
    assert [g["lr"] for g in ours.param_groups] == [1e-3, 0.5, 0.4]


def test_own_rules(cupy):
    @fused_adam.rule
    def signum(p, g, m, lr, c):
        m = (m - c * m) + c * g
        p = p - lr * sign(m)  # noqa: F821
        return p, m

    def make(p: Any, **k: Any) -> Any:
        return signum(p, lr=0.1, c=0.3, **k)

    pair = Pair(cupy, make, **OPTIONS[4])
    for k in range(3):
        pair.step([2 * g for g in arrays(seed=k)], grad_scale=2.0)
    pair.check()

    timed = fused_adam.rule(signed_at, lambda t, lr: {"lr": lr / t})
    with pytest.raises(ValueError, match="'signed_at' are a Python function of t"):
        timed([cupy.asarray(a) for a in arrays()], lr=0.1, max_grad_norm=1.0)


def signed_at(p, g, lr):
    p = p - lr * sign(g)  # noqa: F821
    return p


@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_continuing_is_exact(cupy, how):
    pair = Pair(cupy, CLASSES["adamw"], **OPTIONS[4])
    for k in range(3):
        pair.step(arrays(seed=k))
    if how == "state_dict":
        fresh = [cupy.asarray(b.get()) for b in pair.device]
        again = fused_adam.AdamW(fresh, **OPTIONS[4])
        again.load_state_dict(pair.ours.state_dict())
    else:
        again = pickle.loads(pickle.dumps(pair.ours))
        fresh = again.param_groups[0]["params"]
        assert again.settings == pair.ours.settings
    pair.ours, pair.device = again, fresh
    pair.step(infinite(4, np.float32))
    pair.step(arrays(seed=5))
    assert pair.ours.t == 4
    assert all(same_bits(a, b.get()) for a, b in zip(pair.host, pair.device, strict=True))


@pytest.mark.parametrize("launches", [0, 1, 2])
def test_a_step_whose_launch_fails_can_be_done_again(cupy, launches):
    """Of the norm, the prologue and the step: t and the norm are as if it had not begun; a graph may be next."""
    pair, device = captured(cupy, CLASSES["adamw"], max_grad_norm=2.0, skip_nonfinite=True)
    fake_cupy.fail["launch"] = launches
    with pytest.raises(RuntimeError, match="launching"):
        pair.ours.step(device)
    fake_cupy.fail.clear()
    assert pair.ours.t == 1
    fake_cupy.replay()
    pair.expected.step(arrays(seed=1))
    pair.step(arrays(seed=3))
    pair.check()


def test_refusals(cupy):
    params = [cupy.asarray(a) for a in arrays()]
    gs = [cupy.asarray(g) for g in arrays()]
    before = [p.get() for p in params]
    plain = fused_adam.AdamW(params)
    clipping = fused_adam.AdamW(params, max_grad_norm=1.0, zero_grads=True)
    cases = [
        (plain, gs, {"grad_scale": cupy.zeros(1, np.float32)}, ValueError, "grad_scale is on a GPU, which needs"),
        (
            clipping,
            gs,
            {"grad_scale": cupy.zeros(2, np.float32)},
            TypeError,
            "one float32 or float64, got 2 of float32",
        ),
        (clipping, gs, {"grad_scale": cupy.zeros(1, np.uint8)}, TypeError, "grad_scale should be one float32"),
        (clipping, gs, {"found_inf": cupy.zeros(1, np.int32)}, TypeError, "found_inf should be one float32"),
        (clipping, gs, {"grad_scale": 0.0}, ValueError, "grad_scale should be above 0"),
        (clipping, [*gs[:-1], gs[-2].reshape(-1)[:5000]], {}, ValueError, r"grads\[4\] and grads\[5\] share memory"),
        (clipping, gs, {"mask": np.ones(10, bool)}, ValueError, "does not go with steps over rows"),
    ]
    for opt, given, arguments, kind, match in cases:
        with pytest.raises(kind, match=match):
            opt.step(given, **arguments)
    assert all(same_bits(a, p.get()) for a, p in zip(before, params, strict=True))
    assert clipping.t == plain.t == 0
    assert clipping.last_stats() == fused_adam.AdamW(arrays(), max_grad_norm=1.0).last_stats()
    plain.step(gs, mask=[None] * len(gs))


@pytest.mark.parametrize("options", [OPTIONS[k] for k in (0, 1, 2, 3, 6)], ids=str)
def test_numba(monkeypatch, options):
    """The host decides there; what the device would have to keep is refused."""
    require("numba")
    with fake_numba.installed(monkeypatch) as cuda:
        pair = Pair(cuda, CLASSES["adamw"], **options)
        assert pair.ours.backend == "numba-cuda"
        for k in range(2):
            pair.step(arrays(seed=k))
        pair.step([8 * g for g in arrays(seed=7)], grad_scale=8.0)
        pair.step(infinite(8, np.float32))
        pair.step(infinite(8, np.float32, np.nan))
        pair.step(arrays(seed=9), found_inf=True)
        pair.check()
        for refused in ("device_scalars", "count_unmoved"):
            with pytest.raises(ValueError, match=f"{refused} needs the cupy backend"):
                fused_adam.AdamW(pair.device, **{refused: True})
