"""Wrong hyperparameters, step counts, keywords, backends and state dicts are refused before anything changes."""

from __future__ import annotations

import copy
import sys
from fractions import Fraction

import numpy as np
import pytest
from watch import adam_arrays, memory, random, refused

import fused_adam

INF, NAN = float("inf"), float("nan")
# What each kind of hyperparameter refuses, with what the message says after its name.
NOT_FINITE = [(INF, "finite, got inf"), (-INF, "finite, got -inf"), (NAN, "finite, got nan"), (10**5000, "finite")]
NOT_NUMBERS = [
    (x, "a number, got")
    for x in (
        True,
        np.True_,
        "0.1",
        b"1",
        None,
        1j,
        [0.1],
        np.array(0.1),
        np.array([0.1]),
        Fraction(1, 3),
        {},
        object(),
    )
]
REAL = NOT_FINITE + NOT_NUMBERS
NONNEGATIVE = [*REAL, *((x, "at least 0, got") for x in (-1e-9, -5e-324, -1, np.float32(-0.5)))]
RATE = [*REAL, *((x, r"in \[0, 1\), got") for x in (1.0, 1, 1.5, -0.1, -5e-324, np.float64(1)))]
FLAG = [(x, "True or False, got") for x in (1, 0, 0.0, "yes", None, np.int64(1), [])]
BETAS = [
    *(
        (x, "betas should be a pair")
        for x in (0.9, None, (0.9,), (0.9, 0.9, 0.9), "ab", {0.9, 0.8}, np.array([0.9, 0.9]))
    ),
    *(((x, 0.9), f"beta1 should be {message}") for x, message in RATE),
    *(((0.9, x), f"beta2 should be {message}") for x, message in RATE),
]

KINDS = {"lr": NONNEGATIVE, "eps": NONNEGATIVE, "weight_decay": NONNEGATIVE, "betas": BETAS, "maximize": FLAG}
STRING = [(x, "a string, got") for x in (None, 1, True, b"torch", ["torch"], np.array("torch"))]
LIBRARY = [
    *STRING,
    *((x, "one of torch, tf, keras, apex, optax, bitsandbytes, mlx, got") for x in ("", "Torch", "jax")),
]
ADAM = {"amsgrad": FLAG, "numerics": LIBRARY, "eps_root": NONNEGATIVE}
CLASSES = [
    (fused_adam.SGD, {"momentum": NONNEGATIVE, "dampening": REAL, "nesterov": FLAG}, "eps betas"),
    (fused_adam.Adagrad, {"lr_decay": NONNEGATIVE, "initial_accumulator_value": NONNEGATIVE}, "betas"),
    (fused_adam.RMSprop, {"alpha": RATE, "momentum": NONNEGATIVE, "centered": FLAG}, "betas"),
    (fused_adam.Adam, ADAM, ""),
    (fused_adam.AdamW, ADAM, ""),
    (fused_adam.Lion, {}, "eps"),
]
ROWS = [
    (cls, name, bad)
    for cls, own, without in CLASSES
    for name, bad in {**{k: v for k, v in KINDS.items() if k not in without.split()}, **own}.items()
]


@pytest.mark.parametrize(("cls", "name", "bad"), ROWS, ids=[f"{c.__name__}-{n}" for c, n, _ in ROWS])
def test_optimizers_refuse_a_wrong_hyperparameter(cls, name, bad, backend):
    p, q, g = random(0, 10, 10, 10)
    opt = cls([{"params": p}, {"params": q}], backend=backend)
    opt.step([g, g])
    good = opt.param_groups[1][name]
    for value, message in bad:
        message = message if name == "betas" else f"{name} should be .*{message}"
        with refused(message, p):
            cls(p.copy(), **{name: value}, backend=backend)
        with refused(message, p, q):
            cls([{"params": p.copy()}, {"params": q.copy(), name: value}], backend=backend)
        opt.param_groups[1][name] = value
        before = memory([p, q, opt._parts[0].states["m"].data if "m" in opt._parts[0].states else p])
        for call in (lambda: opt.step([g, g]), lambda: opt.apply_gradients([(g, p), (g, q)]), opt.prepare):
            with refused(message, p, q):
                call()
        assert opt.t == 1
        assert memory([p, q, opt._parts[0].states["m"].data if "m" in opt._parts[0].states else p]) == before
        opt.param_groups[1][name] = good
        d = opt.state_dict()
        d["param_groups"][1][name] = value
        with refused(message, opt, p, q):
            opt.load_state_dict(d)
    opt.step([g, g])


@pytest.mark.parametrize("name", [*KINDS, "decoupled_weight_decay"])
def test_adam_step_refuses_a_wrong_hyperparameter(name, backend):
    arrays = adam_arrays(0)
    for value, message in (KINDS | {"decoupled_weight_decay": FLAG})[name]:
        with refused(message if name == "betas" else f"{name} should be .*{message}", arrays):
            fused_adam.adam_step(**arrays, step=1, **{name: value}, backend=backend)


def test_nesterov_needs_momentum(backend):
    p = np.ones(3)
    for wrong in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}):
        with refused("nesterov needs momentum > 0 and dampening = 0", p):
            fused_adam.SGD(p, nesterov=True, backend=backend, **wrong)


def test_the_step_count(backend):
    for step in (0, -1, 2**63, 2**64, -(2**63), -(2**64), 10**5000, np.int64(0), np.uint64(2**63)):
        arrays = adam_arrays(0)
        with refused(r"step should be in \[1, 2\*\*63\), got .*; it is 1 on the first call", arrays):
            fused_adam.adam_step(**arrays, step=step, backend=backend)
    for step in (True, np.True_, 1.0, np.float64(1), "1", None, np.array(1), [1], Fraction(1)):
        with refused("step should be an int, got", arrays):
            fused_adam.adam_step(**arrays, step=step, backend=backend)
    for step in (3, 2**31, 2**62 + 1, 2**63 - 1):
        results = []
        for kind in (int, np.int64, np.uint64) + ((np.int32, np.uint8) if step == 3 else ()):
            arrays = adam_arrays(0)
            fused_adam.adam_step(**arrays, step=kind(step), backend=backend)
            results.append(memory(arrays))
        assert all(r == results[0] for r in results)


def test_an_optimizer_stops_at_the_last_step_count(backend):
    p, g = random(0, 10, 10)
    opt = fused_adam.Adam(p, backend=backend)
    d = opt.state_dict()
    opt.load_state_dict(d | {"t": 2**63 - 2})
    opt.step(g)
    assert opt.t == 2**63 - 1
    with refused("step count has reached", opt, p):
        opt.step(g)


@pytest.mark.parametrize("number", [float, np.float32, np.float64, np.longdouble, np.float16])
def test_numbers_of_numpy_are_numbers(number, backend):
    p, g = random(0, 10, 10)
    values = {"lr": number(0.5), "betas": [number(0.5), number(0.75)], "eps": number(0.125), "weight_decay": number(2)}
    fused_adam.AdamW(p, **values, backend=backend).step(g)
    q, _ = random(0, 10, 10)
    fused_adam.AdamW(q, lr=0.5, betas=(0.5, 0.75), eps=0.125, weight_decay=2, backend=backend).step(g)
    assert p.tobytes() == q.tobytes()


# lr, weight_decay; eps is 1e-8: what float32 cannot hold, and float64 can
@pytest.mark.parametrize("values", [{"lr": 1e39}, {"lr": 1e20, "weight_decay": 1e20}, {"eps": 1e40}])
def test_a_coefficient_beyond_the_compute_type_is_refused(values, backend):
    values = {"weight_decay": 0.1, **values}
    message = r"coefficient \w+ is .*, which float32 cannot hold; use smaller hyperparameters"
    for large in (False, True):
        arrays = adam_arrays(0, 2**18 if large else 10)
        with refused(message, arrays):
            fused_adam.adam_step(**arrays, step=1000, decoupled_weight_decay=True, **values, backend=backend)
    p, q, g = random(0, 10, 10, 10)
    opt = fused_adam.AdamW([{"params": p}, {"params": q, **values}], backend=backend)
    opt.load_state_dict(opt.state_dict() | {"t": 1000})
    with refused(message, opt, p, q):
        opt.step([g, g])
    arrays = adam_arrays(0, dtype=np.float64)
    fused_adam.adam_step(**arrays, step=1000, decoupled_weight_decay=True, **values, backend=backend)
    with refused("float32 cannot hold", p):
        fused_adam.Adagrad(p, initial_accumulator_value=1e39, backend=backend)


def test_unknown_keywords_are_refused(backend):
    arrays = adam_arrays(0)
    p = arrays["p"]
    for cls, _, _ in CLASSES:
        with refused("'learning_rate'", p, errors=TypeError):
            cls(p, learning_rate=0.1, backend=backend)
        with refused(r"params\[0\] has the unknown key 'learning_rate'; \w+ has \['lr'", p):
            cls([{"params": p, "learning_rate": 0.1}], backend=backend)
    for call in (fused_adam.adam_step, fused_adam.adamw_step):
        with refused("'amsgrad'", arrays, errors=TypeError):
            call(**arrays, step=1, amsgrad=True, backend=backend)
    with refused("decoupled_weight_decay", arrays, errors=TypeError):
        fused_adam.adamw_step(**arrays, step=1, decoupled_weight_decay=False, backend=backend)


def test_unknown_and_missing_backends_are_refused(monkeypatch):
    arrays = adam_arrays(0)
    calls = (
        lambda name: fused_adam.adam_step(**arrays, step=1, backend=name),
        lambda name: fused_adam.Adam(arrays["p"], backend=name),
    )
    for call in calls:
        for name in ("torch", "", "Numba", "numpy "):
            with refused("backend should be 'auto' or one of cupy, numba-cuda, numba, numpy, got", arrays):
                call(name)
        for name in (None, 1, b"numba", ["numba"], np.array(["numba", "numpy"])):
            with refused("backend should be a string, got", arrays, errors=TypeError):
                call(name)
        for name in ("cupy", "numba-cuda"):
            if not {n: ok for n, ok, _ in fused_adam.backends()}[name]:
                with refused(rf"backend '{name}' is not available: .*use", arrays, errors=RuntimeError):
                    call(name)
    for module in ("fused_adam.backends", "fused_adam._adam_step"):  # the function backends() hides its module
        monkeypatch.setattr(sys.modules[module], "OVERRIDE", "torch")
    for call in calls:
        with refused("FUSED_ADAM_BACKEND should be 'auto' or one of .*, got 'torch'", arrays):
            call("auto")


def broken_state_dicts(d):
    """(what the message says, a state dict that is wrong in one way)"""

    def edit(f):
        e = copy.deepcopy(d)
        f(e)
        return e

    def put(*path):
        *keys, last, value = path

        def f(e):
            for key in keys:
                e = e[key]
            e[last] = value

        return f

    m = d["state"][0]["m"]
    yield "should be a dict, got None", None
    yield "should be a dict, got a list", [d]
    for key in d:
        yield r"state_dict should have the keys", {k: v for k, v in d.items() if k != key}
    yield r"state_dict should have the keys", d | {"extra": 1}
    yield r"state_dict should have the keys", {}
    for bad in (0, 2, "1", None, "v1"):
        yield r"state_dict has format .*; this version reads 1", d | {"format": bad}
    for bad in ("AdamW", "SGD", "", None, 3):
        yield r"state_dict is of .* but this is Adam", d | {"optimizer": bad}
    for bad in (-1, 2**63, 1.0, True, "1", None, np.array(1), [1]):
        yield r'state_dict\["t"\] should be', d | {"t": bad}
    for key, have in (("param_groups", 2), ("state", 3)):
        for bad in ([], d[key][:-1], d[key] + d[key][:1], None, {}, iter(d[key]), "ab", dict(enumerate(d[key]))):
            yield rf'state_dict\["{key}"\] should be a list of {have}', d | {key: bad}
    for bad in (None, [], 3):
        yield r'state_dict\["param_groups"\]\[1\] should be a dict', edit(put("param_groups", 1, bad))
        yield r'state_dict\["state"\]\[2\] should be a dict', edit(put("state", 2, bad))
    yield r'\["param_groups"\]\[0\] should have the keys', edit(lambda e: e["param_groups"][0].pop("lr"))
    yield r'\["param_groups"\]\[0\] should have the keys', edit(lambda e: e["param_groups"][0].pop("params"))
    yield r'\["param_groups"\]\[1\] should have the keys', edit(put("param_groups", 1, "momentum", 0.9))
    yield r"(?s)params.*should be \[2\]", edit(put("param_groups", 1, "params", [1]))
    yield r"params.*should be \[0, 1\]", edit(put("param_groups", 0, "params", [1, 0]))
    yield r"params", edit(put("param_groups", 0, "params", None))
    yield r"params", edit(put("param_groups", 0, "params", 5))
    yield r"params", edit(put("param_groups", 0, "params", "ab"))
    yield r"asks for states .*max_v", edit(put("param_groups", 1, "amsgrad", True))
    yield r"lr should be at least 0", edit(put("param_groups", 1, "lr", -1.0))
    yield r"beta2 should be in", edit(put("param_groups", 1, "betas", (0.9, 1.0)))
    yield r'\["state"\]\[0\] should have the keys', edit(lambda e: e["state"][0].pop("v"))
    yield r'\["state"\]\[2\] should have the keys', edit(put("state", 2, "max_v", m))
    for bad, message in (
        (m[:1], r"has shape \(1, 3\)"),
        (m.T.copy(), r"has shape \(3, 2\)"),
        (m.astype(np.float64), "dtype float64"),
        (m.astype(np.float16), "dtype float16"),
        (m.astype(">f4"), "byte order"),
        (np.ma.masked_array(m), "MaskedArray"),
        (m.tolist(), "a list"),
        (None, "None"),
        (0.0, "a float"),
    ):
        yield rf'\["state"\]\[0\]\["m"\].*{message}', edit(put("state", 0, "m", bad))
    yield r'\["state"\]\[2\]\["v"\].*shape', edit(put("state", 2, "v", m))


def test_load_state_dict_refuses_what_does_not_fit_and_changes_nothing(backend):
    def make(cls=fused_adam.Adam):
        return cls([{"params": random(0, (2, 3), 4)}, {"params": random(1, 5)[0], "lr": 0.5}], backend=backend)

    grads = [random(2, (2, 3), 4), random(3, 5)[0]]
    source, opt = make(), make()
    for _ in range(3):
        source.step(grads)
    opt.step(grads)
    params = [group["params"] for group in opt.param_groups]
    count = 0
    for message, d in broken_state_dicts(source.state_dict()):
        with refused(message, opt, params):
            opt.load_state_dict(d)
        count += 1
    assert count > 70
    for cls in (fused_adam.AdamW, fused_adam.SGD):
        with refused("but this is Adam", opt, params):
            opt.load_state_dict(make(cls).state_dict())
    with refused("should be a list of 2", opt, params):
        opt.load_state_dict(fused_adam.Adam(random(0, (2, 3), 4, 5), backend=backend).state_dict())
    d = source.state_dict()
    opt.load_state_dict(d)
    assert memory(opt) == memory(source)
    d["state"][0]["m"][...] = 7  # it was copied
    assert memory(opt) == memory(source)
    d = source.state_dict()
    for state in d["state"]:  # any stride and memory order will do: it is only read
        for name, a in state.items():
            state[name] = np.asfortranarray(np.repeat(a, 2, -1))[..., ::2]
    opt.load_state_dict(d)
    assert memory(opt) == memory(source)


def test_changed_groups_are_refused(backend):
    p, g = random(0, 4, 4)
    opt = fused_adam.Adam([p], backend=backend)
    group = opt.param_groups[0]
    for change, message in (
        (lambda: group.update(params=[p.copy()]), r'param_groups\[0\]\["params"\] was replaced'),
        (lambda: group.update(params=None), r'param_groups\[0\]\["params"\] was replaced'),
        (lambda: group.pop("lr"), r"has no 'lr'"),
        (lambda: group.update(amsgrad=True), r"changed from states \('m', 'v'\) to \('m', 'v', 'max_v'\)"),
        (lambda: opt.param_groups.append({"params": [p]}), r"param_groups has 2 groups .* made with 1"),
    ):
        kept = dict(group)
        change()
        with refused(message, p):
            opt.step([g])
        assert opt.t == 0
        group.update(kept)
        del opt.param_groups[1:]
    opt.step([g])


def test_the_callers_containers_may_change(backend):
    """An optimizer keeps its arrays: what happens to the lists and dicts that brought them is no business of it."""
    p, q, g = random(0, 4, 4, 4)
    params = [p]
    opt = fused_adam.SGD(params, lr=1.0, backend=backend)
    params[0] = q
    params.append(q)
    expected = p - g
    opt.step([g])
    np.testing.assert_array_equal(p, expected)
