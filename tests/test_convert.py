"""Checkpoints of other libraries: converted ones continue as theirs do, and wrong ones are refused by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import fake_cupy
import numpy as np
import pytest
from conftest import require
from peers import PEERS, Bitsandbytes, TensorFlow, arrays
from test_numerics import LR, gradients, tree
from watch import memory

import fused_adam
from fused_adam._layout import rebuild
from fused_adam.checkpoint import LAYOUTS, convert

HYPER = {"lr": LR, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}
ROWS = [
    *((layout, "AdamW", HYPER) for layout in LAYOUTS),
    ("torch", "Adam", HYPER | {"amsgrad": True}),
    ("keras", "AdamW", HYPER | {"amsgrad": True}),
    ("optax", "Adam", HYPER | {"amsgrad": True}),
    ("apex", "Adam", HYPER),
]
HELD = {
    **dict.fromkeys(("torch", "apex", "bitsandbytes"), ("lr", "betas", "eps", "weight_decay")),
    **dict.fromkeys(("keras", "mlx"), ("lr",)),
}


def trained(layout: str, name: str = "AdamW", hyper: dict[str, Any] = HYPER, steps: int = 10) -> tuple[Any, Any]:
    """A library's optimizer after some steps, and its parameters then, as ours."""
    rng = np.random.default_rng(2)
    params = tree(lambda shape: np.asarray(rng.normal(size=shape)))
    peer = PEERS[layout](name, params, hyper)
    for t in range(1, steps + 1):
        peer.step(gradients(rng, t))
    values = iter(peer.params())
    return peer, tree(lambda shape: np.array(next(values)).reshape(shape))


def ours(layout: str, params: Any, name: str = "AdamW", hyper: dict[str, Any] = HYPER, backend: str = "numpy") -> Any:
    return getattr(fused_adam, name)(params, **hyper, numerics=layout, backend=backend)


def continued(optimizer: Any, params: Any, peer: Any, steps: int = 10) -> float:
    """Both step on; the largest difference, as a share of the way that they went."""
    rng = np.random.default_rng(3)
    start = [p.copy() for p in arrays(params)]
    for t in range(1, steps + 1):
        grads = gradients(rng, 10 + t)
        optimizer.step(grads)
        peer.step(grads)
    rows = zip(arrays(params), peer.params(), start, strict=True)
    return max(float(np.max(np.abs(p - q)) / np.max(np.abs(q - p0))) for p, q, p0 in rows)


@pytest.mark.parametrize(("layout", "name", "hyper"), ROWS, ids=[f"{r[0]}-{r[1]}-{len(r[2])}" for r in ROWS])
def test_continues(layout: str, name: str, hyper: dict[str, Any], backend: str) -> None:
    """As the library does; what its layout holds of the hyperparameters comes with it, and nothing else does."""
    peer, params = trained(layout, name, hyper)
    held = HELD.get(layout, ())
    other = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 0.5, "weight_decay": 0.5}
    optimizer = ours(layout, params, name, hyper | {key: other[key] for key in held}, backend)
    before = memory([optimizer, params])
    converted = convert(peer.state(), optimizer, layout)
    assert memory([optimizer, params]) == before
    optimizer.load_state_dict(converted)
    assert optimizer.t == 10
    assert {key: optimizer.param_groups[0][key] for key in hyper} == hyper
    assert continued(optimizer, params, peer) <= 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lost", ["m", "v", "t"])
def test_what_is_lost_is_noticed(layout: str, lost: str) -> None:
    """Each of the three is needed to continue within 1e-6; MLX does not use its count."""
    peer, params = trained(layout)
    optimizer = ours(layout, params)
    converted = convert(peer.state(), optimizer, layout)
    for state in converted["state"] if lost != "t" else []:
        state[lost] *= 0
    optimizer.load_state_dict(converted | ({"t": 9} if lost == "t" else {}))
    assert (continued(optimizer, params, peer) > 1e-6) == (layout != "mlx" or lost != "t")


def test_importing_the_package_does_not_import_it() -> None:
    code = "import sys, fused_adam; sys.exit('fused_adam.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_groups_of_torch() -> None:
    torch = require("torch")
    a, b, c = (np.random.default_rng(k).normal(size=4).astype(np.float32) for k in range(3))
    tensors = [torch.tensor(p, requires_grad=True) for p in (a, b, c)]
    theirs = torch.optim.AdamW([{"params": tensors[:1], "lr": 0.1}, {"params": tensors[1:], "eps": 1e-3}])
    optimizer = fused_adam.AdamW([{"params": [a]}, {"params": {"b": b, "c": c}}], lr=0.5)
    for t in range(8):
        for tensor in tensors:
            tensor.grad = torch.full((4,), 0.1 * t + 0.1)
        theirs.step()
        if t == 3:
            for p, tensor in zip((a, b, c), tensors, strict=True):
                p[...] = tensor.detach().numpy()
            optimizer.load_state_dict(convert(theirs.state_dict(), optimizer, "torch"))
        elif t > 3:
            g = np.full(4, 0.1 * t + 0.1, np.float32)
            optimizer.step([[g], {"b": g, "c": g}])
    assert [(g["lr"], g["eps"]) for g in optimizer.param_groups] == [(0.1, 1e-8), (1e-3, 1e-3)]
    for p, tensor in zip((a, b, c), tensors, strict=True):
        assert np.max(np.abs(p - tensor.detach().numpy())) < 1e-6


def test_moments_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FusedAdam's always are; here on one that is not there."""
    peer, params = trained("apex")
    state = peer.state()
    expected = convert(state, ours("apex", params), "apex")
    with fake_cupy.installed(monkeypatch) as cupy:
        moments = {k: {name: cupy.asarray(a) for name, a in s.items()} for k, s in state["state"].items()}
        groups = [state["param_groups"][0] | {"step": cupy.asarray(np.array([10], np.int32))}]
        for p, backend in ((params, "numpy"), (rebuild(params, cupy.asarray), "cupy")):
            optimizer = ours("apex", p, backend=backend)
            got = convert({"state": moments, "param_groups": groups}, optimizer, "apex")
            assert memory(got["state"]) == memory(expected["state"]) and got["t"] == 10
            optimizer.load_state_dict(got)


def test_bitsandbytes_before_it_wrapped_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bitsandbytes, "wrapped", False)
    peer, params = trained("bitsandbytes")
    assert "state1" in peer.state()["state"][0]
    optimizer = ours("bitsandbytes", params)
    optimizer.load_state_dict(convert(peer.state(), optimizer, "bitsandbytes"))
    assert continued(optimizer, params, peer) <= 1e-10


def test_keras_in_other_forms() -> None:
    """Its live variables, and a state without the learning rate, as a schedule leaves it."""
    peer, params = trained("keras")
    optimizer = ours("keras", params)
    stored, live = (convert(x, optimizer, "keras") for x in (peer.state(), peer.optimizer.variables))
    values = list(peer.state().values())
    scheduled = convert([values[0], *values[2:]], ours("keras", params, hyper=HYPER | {"lr": 0.5}), "keras")
    assert scheduled["param_groups"][0]["lr"] == 0.5
    for other in (live, scheduled):
        assert memory(other["state"]) == memory(stored["state"]) and other["t"] == stored["t"] == 10


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keras_order_of_variables(amsgrad: bool) -> None:
    """The names that it gives them say what is what."""
    peer, _ = trained("keras", "AdamW", HYPER | {"amsgrad": amsgrad}, steps=1)
    kinds = [variable.path.split("/")[-1].rsplit("_", 1)[-1] for variable in peer.optimizer.variables]
    assert kinds == ["iteration", "rate"] + ["momentum", "velocity"] * 4 + ["hat"] * (4 * amsgrad)


# --- TensorFlow's count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 7, 100, 800, 1000, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tensorflow_steps(steps: int, dtype: Any) -> None:
    """From powers that were multiplied up in float32; from 829 steps on that of 0.9 is no number any more."""
    betas = (0.9, 0.999)
    powers = [dtype(1)] * 2
    for k, beta in enumerate(betas):
        for _ in range(steps + 1):
            powers[k] = dtype(powers[k] * dtype(beta))
    params = {"w": np.ones(2)}
    foreign = {"w/Adam": np.ones(2), "w/Adam_1": np.ones(2), "beta1_power": powers[0], "beta2_power": powers[1]}
    optimizer = ours("tf", params, "Adam", {})
    assert convert(foreign, optimizer, "tf")["t"] == steps
    for wrong in ({"betas": (0.95, 0.999)}, {"betas": (0.9, 0.998)}) if 0 < steps < 800 else ():
        with pytest.raises(ValueError, match=r"foreign says t = .*, no count; give the optimizer TensorFlow's betas"):
            convert(foreign, ours("tf", params, "Adam", wrong), "tf")


def test_tensorflow_without_powers() -> None:
    foreign: dict[str, Any] = {"w/Adam": np.ones(2), "w/Adam_1": np.ones(2)}
    optimizer = ours("tf", {"w": np.ones(2)}, "Adam", {})
    vanished = {"beta1_power": np.float32(0), "beta2_power": np.float32(1e-42)}
    for powers in ({}, vanished):
        with pytest.raises(ValueError, match="are missing or have vanished; pass t="):
            convert(foreign | powers, optimizer, "tf")
        assert convert(foreign | powers, optimizer, "tf", t=123_456)["t"] == 123_456
        assert convert(foreign | powers | {"global_step": np.int64(5)}, optimizer, "tf")["t"] == 5


def test_tensorflow_names() -> None:
    peer, params = trained("tf")
    assert isinstance(peer, TensorFlow) and peer.names == ["dense/kernel", "dense/bias", "scale", "a/b"]
    wanted = convert(peer.state(), ours("tf", params), "tf")
    listed = ours("tf", arrays(params))
    assert memory(convert(peer.state(), listed, "tf", names=peer.names)["state"]) == memory(wanted["state"])
    with pytest.raises(ValueError, match=r'foreign\["0/Adam"\] is missing; pass names='):
        convert(peer.state(), listed, "tf")
    with pytest.raises(ValueError, match="names has 3 entries but there are 4 parameters"):
        convert(peer.state(), listed, "tf", names=peer.names[1:])


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals() -> Any:
    """(layout, what to change in its state, what the message says)."""

    def at(*keys: Any, to: Any) -> Any:
        def change(state: Any) -> Any:
            *path, last = keys
            place = state
            for key in path:
                place = place[key]
            place[last] = to(place[last]) if callable(to) else to
            return state

        return change

    single = lambda a: np.asarray(a).astype(np.float32)  # noqa: E731
    half = lambda a: np.asarray(a).astype(np.float16)  # noqa: E731
    shorter = lambda a: np.asarray(a)[:-1]  # noqa: E731
    negative = lambda a: -np.abs(np.asarray(a)) - 1  # noqa: E731
    state, group = ("state", 1), ("param_groups", 0)
    yield "torch", lambda s: {"model": s}, r"foreign should have the keys \['state', 'param_groups'\]"
    yield "torch", lambda s: None, "foreign should be a dict, got None"
    yield "torch", at("param_groups", to=[]), r'foreign\["param_groups"\] should be a list of 1'
    yield "torch", at("state", to=[]), r'foreign\["state"\] should be a dict, got a list'
    yield "torch", at("state", 1, to=None), r'foreign\["state"\]\[1\] should be a dict, got None'
    yield "torch", at("param_groups", 0, to=[]), r'foreign\["param_groups"\]\[0\] should be a dict, got a list'
    yield "torch", at(*group, "params", to=[0, 1, 2]), r'\["param_groups"\]\[0\] has 3 parameters but .* has 4'
    yield "torch", at(*group, "decoupled_weight_decay", to=False), "is of Adam; make the optimizer fused_adam.Adam"
    yield "torch", at(*group, "eps", to=-1.0), "eps should be at least 0"
    yield "torch", at(*group, "lr", to=np.ones(2)), r"lr of group 0 should be a number, got .* of shape \(2,\)"
    yield "torch", at(*group, "amsgrad", to=None), "amsgrad should be True or False"
    yield "torch", at("state", to=lambda s: {k: s[k] for k in (0, 2, 3)}), r'\["state"\]\[1\] is missing: .* no step'
    yield "torch", at(*state, "step", to=11.0), r'\["state"\]\[1\]\["step"\] is 11 but .*\["state"\]\[0\].* is 10'
    yield "torch", at(*state, "step", to=10.5), r'\["state"\]\[1\]\["step"\] should be an int, got 10.5'
    yield "torch", at(*state, "step", to=-1), r'\["state"\]\[1\]\["step"\] should be in \[0, 2\*\*63\), got -1'
    yield "torch", at("state", 0, "step", to=np.float32(2**24)), "a float32 counts no further than .*pass t="
    yield (
        "torch",
        at(*state, "exp_avg", to=single),
        r'\["state"\]\[1\]\["exp_avg"\] has .* float32; expected .* float64',
    )
    yield "torch", at(*state, "exp_avg", to=half), r'\["state"\]\[1\]\["exp_avg"\] has dtype float16'
    yield "torch", at(*state, "exp_avg", to=shorter), r'\["exp_avg"\] has shape \(4,\) .*expected \(5,\)'
    yield "torch", at(*state, "exp_avg", to=[[1], [1, 2]]), r'\["exp_avg"\] should be an array that NumPy can read'
    yield "torch", at(*state, "exp_avg_sq", to=negative), r'\["exp_avg_sq"\] is a second moment but has negative'
    yield "torch", at(*state, "max_exp_avg_sq", to=np.ones(5)), r"is of an optimizer with amsgrad; .* amsgrad=True"
    yield "torch", at(*state, "extra", to=1), r'\["state"\]\[1\] should have the keys'
    yield "apex", at(*group, "step", to=None), r'foreign\["param_groups"\]\[0\]\["step"\] should be an int, got None'
    yield "apex", at(*group, "bias_correction", to=False), 'bias_correction=False; make .* with numerics="mlx"'
    yield "bitsandbytes", at(*state, "qmap1", to=1), r'\["state"\]\[1\] has 8-bit states; only 32-bit'
    yield "bitsandbytes", at(*state, "unorm_vec", to=1), r'\["state"\]\[1\] should have the keys'
    yield "bitsandbytes", at(*group, "betas", to=(0.9, 0.99, 0.999)), "betas should be a pair"
    yield "tf", lambda s: [s], "foreign should be a dict, got a list"
    yield "tf", at("a/b/Adam_1", to=shorter), r'foreign\["a/b/Adam_1"\] has shape'
    yield "keras", lambda s: 3, "foreign should be a list or dict of variables, got a int"
    yield "keras", lambda s: [*s.values()][:-2], "foreign has 8 variables but should have 10: iteration, learning_rate"
    yield "keras", lambda s: [*s.values()][:-1], r"foreign\[1\] has shape \(\) .* expected \(3, 5\)"
    yield "keras", lambda s: {**s, "8": s["9"], "9": s["8"]}, r"foreign\[9\] is a second moment but has negative"
    yield (
        "keras",
        lambda s: {"x" if k == "9" else k: s[k] for k in s},
        r"foreign should have the keys \['0', .* got .*'x'",
    )
    yield "keras", at("0", to=1.5), r"foreign\[0\] should be an int, got 1.5"
    yield "optax", lambda s: s[1:], "foreign should hold one ScaleByAdamState or ScaleByAmsgradState, .* has 0"
    yield "optax", lambda s: (s, s), "foreign should hold one .* it has 2"
    yield "optax", lambda s: s[0]._replace(count=np.int32(-2)), r"foreign.count should be in \[0"
    yield "optax", lambda s: s[0]._replace(mu=s[0].mu["dense"]), r"foreign\.mu\[.*\] has no parameter"
    yield "optax", lambda s: s[0]._replace(nu=s[0].nu | {"scale": 1.5j}), r'foreign\.nu\["scale"\] has dtype complex128'
    yield "mlx", lambda s: 3, "foreign should be a dict, got a int"
    yield "mlx", lambda s: s["dense"], 'foreign has no "step"; pass the whole state'
    yield "mlx", lambda s: s | {"scale": 1}, r'foreign\["scale"\] should be a dict with "m" and "v", got a int'
    yield "mlx", lambda s: {k: s[k] for k in s if k != "a"}, r'foreign\["a"\] is missing'


@pytest.mark.parametrize(("layout", "change", "message"), list(refusals()))
def test_is_refused(layout: str, change: Any, message: str) -> None:
    peer, params = trained(layout, steps=10)
    optimizer = ours(layout, params)
    state = peer.state()
    if layout in ("torch", "bitsandbytes"):  # the library's own dicts are not to be written to
        groups = [dict(group) for group in state["param_groups"]]
        state = {"state": {k: dict(s) for k, s in state["state"].items()}, "param_groups": groups}
    convert(state, optimizer, layout)
    before = memory([optimizer, params])
    with pytest.raises((TypeError, ValueError), match=message):
        convert(change(state), optimizer, layout)
    assert memory([optimizer, params]) == before


@pytest.mark.parametrize(("layout", "numerics"), [("torch", "optax"), ("optax", "torch"), ("keras", "optax")])
def test_amsgrad_means_another_thing_in_optax(layout: str, numerics: str) -> None:
    hyper = HYPER | {"amsgrad": True}
    peer, params = trained(layout, "AdamW", hyper)
    message = f'layout "{layout}" with amsgrad does not go with numerics="{numerics}"'
    with pytest.raises(ValueError, match=message):
        convert(peer.state(), ours(numerics, params, hyper=hyper), layout)


def test_arguments_are_checked() -> None:
    optimizer = fused_adam.Adam(np.ones(2))
    with pytest.raises(TypeError, match=r"optimizer should be an Adam or AdamW, got a fused_adam\.SGD"):
        convert({}, fused_adam.SGD(np.ones(2)), "torch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout should be one of torch, apex, .*, got 'jax'"):
        convert({}, optimizer, "jax")
    with pytest.raises(ValueError, match='names is for layout "tf", not "mlx"'):
        convert({}, optimizer, "mlx", names=["w"])
    peer, params = trained("torch")
    optimizer = ours("torch", params)
    assert convert(peer.state(), optimizer, "torch", t=2**24)["t"] == 2**24
    for t, message in ((-1, r"t should be in \[0, 2"), (1.5, "t should be an int")):
        with pytest.raises((TypeError, ValueError), match=message):
            convert(peer.state(), optimizer, "torch", t=t)  # type: ignore[arg-type]
    adam = fused_adam.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="is of an optimizer without amsgrad; make this one with amsgrad=False"):
        convert({**peer.state(), "param_groups": [{"params": [0, 1, 2, 3]}]}, adam, "torch")


def test_each_row_has_done_the_librarys_steps() -> None:
    peer, params = trained("torch")
    rows = fused_adam.AdamW(params, **HYPER, per_row_step=True, backend="numpy")
    rows.load_state_dict(convert(peer.state(), rows, "torch"))
    assert all((state["row_steps"] == 10).all() for state in rows.state_dict()["state"])
    assert continued(rows, params, peer) <= 1e-10
