"""What sharded optimizers refuse: on all ranks, with nothing changed, and a message that says who differs in what."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from distributed_cases import digest, gradients, make, numbers

import fused_adam
from fused_adam.distributed import Sharded, Threads


def reversed_names(p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(reversed(p.items()))


# What rank 1 has otherwise, (change of its parameters, more arguments), and what all ranks say.
DIFFERENCES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "shape": (lambda p: p | {"b": np.ones(8, "f")}, {}, r'params\["b"\] of float32, shape \(7,\), .* shape \(8,\)'),
    "values": (lambda p: p | {"b": p["b"] + 1}, {}, r'rank 0 has params\["b"\] of float32, .* CRC-32 .* 1 of 2 has'),
    "dtype": (
        lambda p: {name: a.astype("d") for name, a in p.items()},
        {},
        r'params\["W"\] of float32.* rank 1 of 2 has params\["W"\] of float64',
    ),
    "order": (reversed_names, {}, r'rank 0 has params\["W"\] .* rank 1 of 2 has params\["V"\]'),
    "fewer": (lambda p: {"W": p["W"]}, {}, r'rank 0 has params\["b"\] .* rank 1 of 2 has nothing more'),
    "mode": (dict, {"mode": "fast"}, "mode = ordered where rank 1 of 2 has mode = fast"),
    "bucket": (dict, {"bucket_elements": 256}, "bucket_elements = 1024 where rank 1 of 2 has bucket_elements = 256"),
    "norm": (dict, {"max_grad_norm": 2.0}, "max_grad_norm = 1.0 where rank 1 of 2 has max_grad_norm = 2.0"),
    "skip": (dict, {"skip_nonfinite": True}, "skip_nonfinite = False where .* skip_nonfinite = True"),
    "lr": (dict, {"lr": 0.5}, "'lr': 0.1, .*'lr': 0.5"),
    "class": (dict, {"rule": fused_adam.Adam, "weight_decay": 0.01}, "the optimizer AdamW where .* the optimizer Adam"),
    "storage": (dict, {"state_dtype": "bfloat16"}, "state_dtype=None where rank 1 of 2 has state_dtype='bfloat16'"),
    "error": (dict, {"betas": 3}, r"no rank made an optimizer, because rank 1 of 2 raised \w+: betas should be"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ(name):
    change, more, message = DIFFERENCES[name]

    def run(c: Any) -> str:
        hyper = {"rule": fused_adam.AdamW, "lr": 0.1, "max_grad_norm": 1.0, "bucket_elements": 1024}
        p = numbers("float32", 0)
        if c.rank == 1:
            p, hyper = change(p), {**hyper, **more}
        rule = hyper.pop("rule")
        with pytest.raises((TypeError, ValueError)) as caught:
            Sharded(rule, p, c, **hyper)
        return str(caught.value)

    zero, one = Threads.run(2, run)
    if name == "error":
        assert one.startswith("betas should be")
    else:
        assert zero == one
    assert re.search(message, zero), zero


def test_parameters_that_differ_in_a_bit_are_noticed():
    def run(c: Any) -> None:
        p = np.zeros(1000, np.float32)
        p[777] = -0.0 if c.rank else 0.0
        with pytest.raises(ValueError, match="CRC-32"):
            Sharded(fused_adam.AdamW, p, c)

    Threads.run(2, run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mode": "best"}, "mode should be one of fast, ordered, invariant, got 'best'"),
        ({"mode": "invariant"}, 'mode="invariant" needs micro_batches, a power of two'),
        ({"mode": "invariant", "micro_batches": 6}, "a power of two and a multiple of the number of ranks, 2, got 6"),
        ({"mode": "invariant", "micro_batches": 1}, "a multiple of the number of ranks, 2, got 1"),
        ({"mode": "invariant", "micro_batches": 2.0}, "micro_batches should be an int"),
        ({"micro_batches": 4}, "micro_batches is for mode=\"invariant\", not 'ordered'"),
        ({"bucket_elements": 100}, "bucket_elements should be a multiple of 128 up to"),
        ({"bucket_elements": 0}, r"bucket_elements should be in \[1"),
        ({"bucket_elements": 2**32}, "up to 2..31, got 4294967296"),
        ({"average": 1}, "average should be True or False"),
        ({"max_grad_norm": -1.0}, "max_grad_norm should be above 0"),
        ({"skip_nonfinite": 1}, "skip_nonfinite should be True or False"),
        ({"zero_grads": True}, "zero_grads is not offered with sharded states"),
        ({"count_unmoved": True}, "count_unmoved is not offered"),
        ({"device_scalars": True}, "device_scalars is not offered"),
        ({"per_row_step": True}, "per_row_step is not offered"),
        ({"lr": -1.0}, "lr should be"),
        ({"unknown": 1}, "unknown"),
        ({"backend": "cupy"}, "cupy"),
        ({"stochastic_rounding": True}, "stochastic_rounding is for what is kept in 16 bits"),
        ({"rule": dict}, "optimizer should be a class of fused_adam"),
    ],
    ids=str,
)
def test_arguments(more, message):
    def run(c: Any) -> None:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            Sharded(
                **{"optimizer": fused_adam.AdamW, "params": np.ones(5, "f"), "collective": c}
                | {{"rule": "optimizer"}.get(name, name): value for name, value in more.items()}
            )

    Threads.run(2, run)


SHORT = np.ones(4, "f2")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params is empty"),
        ([np.ones(3, "f"), [1.0]], r"params\[1\]\[0\] should be a NumPy array"),
        ([np.ones(3, "i4")], r"params\[0\] has dtype int32"),
        ([np.ones(3, "f"), np.ones(3, "d")], r"params\[1\] is float64 but params\[0\] is float32; make them alike"),
        ([np.ones((3, 2), "f", order="F")], r"params\[0\] is in Fortran order"),
        ([np.ones((4, 4), "f")[:, ::2]], r"params\[0\] is not contiguous"),
        ([np.broadcast_to(np.ones(1, "f"), 1)], r"params\[0\] is read-only"),
        ([SHORT, SHORT[2:]], r"params\[0\] and params\[1\] share memory"),
        ([{"params": np.ones(3, "f"), "rate": 1}], "unknown key 'rate'"),
    ],
    ids=range(9),
)
def test_parameters(params, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sharded(fused_adam.AdamW, params)


def some(opt: Any, **more: Any) -> Any:
    return {**gradients(opt, 1), **more}


WRONG_STEPS: dict[str, tuple[Any, str]] = {
    "shape": (lambda opt, p: ((some(opt, b=np.ones(8, "f")),), {}), r'grads\["b"\] has shape \(8,\)'),
    "dtype": (lambda opt, p: ((some(opt, b=np.ones(7, "d")),), {}), r'grads\["b"\] has dtype float64'),
    "missing": (lambda opt, p: (({"W": p["W"]},), {}), r'grads\["b"\] is missing'),
    "none": (lambda opt, p: ((some(opt, b=None),), {}), r'grads\["b"\] is None'),
    "overlap": (lambda opt, p: ((some(opt, b=p["b"]),), {}), r'grads\["b"\] overlaps a parameter'),
    "sparse": (
        lambda opt, p: ((some(opt, V=fused_adam.SparseGrad(np.array([0]), np.ones(1, "f"))),), {}),
        r'grads\["V"\] should be a NumPy array',
    ),
    "scale": (lambda opt, p: ((gradients(opt, 1),), {"grad_scale": 0.0}), "grad_scale should be above 0"),
    "tiny": (lambda opt, p: ((gradients(opt, 1),), {"grad_scale": 1e-60}), "has no inverse"),
    "other scale": (lambda opt, p: ((gradients(opt, 1),), {"grad_scale": 2.0}), "grad_scale = 1.0 where .* = 2.0"),
    "found_inf": (lambda opt, p: ((gradients(opt, 1),), {"found_inf": "yes"}), "found_inf should"),
    "other lr": (lambda opt, p: (opt.set_lr(0.5), ((gradients(opt, 1),), {}))[1], "'lr': 0.01,.*'lr': 0.5"),
    "no lr": (lambda opt, p: (opt.param_groups[0].update(lr=-1.0), ((gradients(opt, 1),), {}))[1], "lr should be"),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_step_that_one_rank_cannot_take_no_rank_takes(name):
    """Nothing is changed, and with the right arguments all go on."""
    wrong, message = WRONG_STEPS[name]

    def run(c: Any) -> Any:
        params, opt = make(c)
        opt.step(gradients(opt, 0))
        before = digest(opt, params)
        arguments, more = wrong(opt, params) if c.rank == 1 else ((gradients(opt, 1),), {})
        with pytest.raises((TypeError, ValueError), match=message):
            opt.step(*arguments, **more)
        assert opt.t == 1
        opt.set_lr(1e-2)
        assert digest(opt, params) == before
        opt.step(gradients(opt, 1))
        return digest(opt, params)

    assert len({*Threads.run(3, run)}) == 1


@pytest.mark.parametrize(("count", "got"), [(1, "1 of them"), (3, "3 of them"), (None, "class 'dict'")])
def test_the_number_of_micro_batches(count, got):
    _, opt = make(None, mode="invariant", micro_batches=2)
    g = numbers("float32", 1)
    with pytest.raises(ValueError, match=f"a list of one for each of 2 micro-batches, got .*{got}"):
        opt.step(g if count is None else [g] * count)
    assert opt.t == 0


def test_gradients_of_two_kinds():
    _, opt = make(None, "bfloat16", mode="invariant", micro_batches=2)
    with pytest.raises(ValueError, match="gradients have the dtypes bfloat16, float32; make them alike"):
        opt.step([numbers("bfloat16", 1), numbers("float32", 1)])


def test_gradients_of_other_16_bits():
    p = [np.ones(5, np.float16)]
    opt = Sharded(fused_adam.AdamW, p)
    with pytest.raises(ValueError, match=r"grads\[0\] has dtype uint16"):
        opt.step([np.ones(5, np.uint16)])
    opt.step([np.ones(5, np.float16)])
    assert opt.t == 1


@pytest.mark.parametrize("what", ["state_dict", "save", "step"])
def test_a_wrong_hyperparameter_on_one_rank_is_refused_by_all(what, tmp_path):
    """Where one raises, no other waits."""

    def run(c: Any) -> Any:
        opt = Sharded(fused_adam.AdamW, np.ones(300, np.float32), c, lr=0.1)
        if c.rank == 1:
            opt.param_groups[0]["lr"] = -1.0
        calls = {"state_dict": opt.state_dict, "save": lambda: opt.save(tmp_path)}
        calls["step"] = lambda: opt.step(np.ones(300, np.float32))
        with pytest.raises(ValueError, match=r"lr should be|because"):
            calls[what]()
        opt.param_groups[0]["lr"] = 0.1
        opt.step(np.ones(300, np.float32))
        return opt.t

    assert Threads.run(2, run) == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(scales=np.tile(s["scales"], 3)), r"\"scales\"\] has shape"),
        (lambda s: s.update(nonsense=np.zeros(0)), "nonsense"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_state_of_any_parameter_is_refused(number, change, message):
    params = [np.ones(300, np.float32), np.ones(0, np.float32)]
    opt = Sharded(fused_adam.AdamW, params, state_dtype="int8")
    opt.step([np.ones_like(p) for p in params])
    d = opt.state_dict()
    if number == 1 and "scales" in message:
        d["state"][1]["scales"] = np.zeros(2, np.uint16)
    else:
        change(d["state"][number])
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(d)
