"""`fused_adam.torch` with parameters of 16 bits, and with states of fewer bits than 32."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import same_bits
from kept_cases import BF16, CLASSES, F16, F32, backends, each, give, make, numbers, run, same
from torch_cases import STEPS, torch

import fused_adam
import fused_adam.torch as ours


@backends
@pytest.mark.parametrize("flat", [False, True])
@each
def test_bits_of_the_core(
    name: str, kwargs: dict[str, Any], dtype: Any, options: dict[str, Any], flat: bool, backend: str
) -> None:
    """Parameters and masters as those of the class for arrays, of which other tests take all formats."""
    params = make(dtype)
    arrays = [numbers(p) for p in params]
    opt = getattr(ours, name)(params, flat=flat, backend=backend, **kwargs, **options)
    if dtype == BF16 and "state_dtype" not in options and "master" not in options:
        options = {**options, "state_dtype": "bfloat16"}  # as torch's states
    core = getattr(fused_adam, name)(
        arrays, backend=backend, **kwargs, **options, **({"dtype": "bfloat16"} if dtype == BF16 else {})
    )
    for n in range(STEPS):
        give(params, n)
        opt.step()
        core.step([numbers(p.grad) for p in params])
    assert all(same_bits(numbers(p), a) for p, a in zip(params, arrays, strict=True))
    for p, saved in zip(params, core.state_dict()["state"], strict=True):
        if "master" in saved and saved["master"].size and options["master"] == "float32":
            assert same_bits(numbers(opt.state[p]["master"]), saved["master"])
    assert not any(p.isnan().any() for p in params)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_states_that_torch_would_have(dtype: Any) -> None:
    """Of bfloat16 as torch's; of float16 in float32, for in float16 a v of 1e-8 is 0."""
    params = make(dtype)
    opt = ours.AdamW(params)
    run(params, opt)
    expected = F32 if dtype == F16 else dtype
    assert {s.dtype for k, s in opt.state[params[0]].items() if k != "step"} == {expected}
    assert {*opt.state[params[0]]} == {"step", "exp_avg", "exp_avg_sq"}


def test_beside_torch() -> None:
    """Of bfloat16 parameters and states: as near to a float64 run as torch's fused step is, or nearer."""
    ends = []
    for cls, options, dtype in [
        (ours.AdamW, {}, BF16),
        (torch.optim.AdamW, {"fused": True}, BF16),
        (torch.optim.AdamW, {}, torch.float64),
    ]:
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in make(BF16)]
        opt = cls(params, lr=0.05, **options)
        for n in range(40):
            for p, q in zip(params, grads := make(BF16, n + 1), strict=True):
                p.grad = q.detach().to(dtype)
            opt.step()
        del grads
        ends.append(torch.cat([p.detach().double().reshape(-1) for p in params]))
    mine, theirs = ((end - ends[2]).norm() for end in ends[:2])
    assert 0 < mine <= 1.02 * theirs


@backends
@pytest.mark.parametrize("options", [{}, {"master": "split8", "state_dtype": "int8"}])
def test_clipped_skipped_and_zeroed(options: dict[str, Any], backend: str) -> None:
    """As the class for arrays, of which other tests take all formats."""
    guard = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True}
    params = make(BF16)
    arrays = [numbers(p) for p in params]
    opt = ours.AdamW(params, backend=backend, **guard, **options)
    core_options = options or {"state_dtype": "bfloat16"}
    core = fused_adam.AdamW(arrays, backend=backend, dtype="bfloat16", **guard, **core_options)
    for n in range(STEPS):
        give(params, n)
        if n == 3:
            with torch.no_grad():
                params[1].grad[5] = float("inf")
        given = [numbers(p.grad) for p in params]
        opt.step()
        core.step(given)
        assert not any(p.grad.any() for p in params)
        assert opt.last_stats() == core.last_stats()
    assert opt.last_stats().skipped == 1
    assert all(same_bits(numbers(p), a) for p, a in zip(params, arrays, strict=True))


def test_norms_of_float32_among_parameters_of_16_bits() -> None:
    """What is asked for 16 bits leaves float32 and float64 parameters as they are."""
    wide = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5, dtype=torch.float64))]
    params = [*make(BF16), *wide]
    opt = ours.AdamW(params, master="split16", stochastic_rounding=True, lr=0.01)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in wide]
    other = ours.AdamW(alone, lr=0.01)
    for n in range(STEPS):
        give(params, n)
        for p, q in zip(wide, alone, strict=True):
            q.grad = p.grad
        opt.step()
        other.step()
    assert same(wide, alone)
    assert "master_low" not in opt.state[wide[0]] and "master_low" in opt.state[params[0]]


def test_parameters_at_different_steps() -> None:
    """Random bits go by the parameter's own t: one that starts later is rounded as if all were at its step."""
    options = {"stochastic_rounding": True, "state_dtype": "float32", "lr": 0.01}
    params, late, early = make(BF16), make(BF16), make(BF16)
    opt, other, third = (ours.AdamW(some, **options) for some in (params, late, early))
    run(late, other, 0, 2)
    for n in range(4):
        for some, by in ((params, opt), (early, third)):
            give(some, n % 2)
            if n < 2 and some is params:
                params[1].grad = None
            by.step()
    assert same_bits(numbers(params[1]), numbers(late[1]))
    assert all(same_bits(numbers(params[k]), numbers(early[k])) for k in (0, 2, 3))
    assert float(opt.state[params[0]]["step"]) == 4 and float(opt.state[params[1]]["step"]) == 2


def test_a_transposed_parameter() -> None:
    """Blocks and random bits go by memory, which a turned parameter shares with the one it was."""
    ends = []
    for turned in (False, True):
        p = torch.nn.Parameter(make(BF16)[0].detach().T.contiguous().T if turned else make(BF16)[0].detach())
        opt = ours.AdamW([p], lr=0.01)
        run([p], opt)
        ends.append(numbers(p))
    assert same_bits(*ends)
    p = torch.nn.Parameter(make(BF16)[0].detach().T.contiguous().T)
    opt = ours.AdamW([p], lr=0.01, state_dtype="int8", master="split8")
    run([p], opt)
    assert opt.state[p]["exp_avg_codes"].stride() == p.stride()
    turned_back = opt.state_dict()
    turned_back["state"][0]["exp_avg_codes"] = turned_back["state"][0]["exp_avg_codes"].contiguous()
    with pytest.raises(ValueError, match="is not in the memory order of its parameter"):
        opt.load_state_dict(turned_back)


def broken(change: Any, **options: Any) -> Any:
    """An optimizer after a step whose state was changed."""
    params = make(BF16)
    opt = ours.AdamW(params, **options)
    run(params, opt, 0, 1)
    change(opt.state[params[0]])
    give(params, 1)
    return opt


def fresh(dtype: Any = BF16, **options: Any) -> Any:
    """One before its first step."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype))]
    params[0].grad = torch.ones_like(params[0])
    return ours.AdamW(params, **options)


def _without(called: str) -> Any:
    return lambda state: state.pop(called)


def _as(called: str, dtype: Any) -> Any:
    return lambda state: state.update({called: state[called].to(dtype)})


WRONG: list[tuple[str, Any, str]] = [
    ("no scales", lambda: broken(_without("scales"), state_dtype="int8"), "has no 'scales'"),
    ("codes", lambda: broken(_as("exp_avg_codes", torch.uint8), state_dtype="int8"), "has dtype torch.uint8, expected"),
    ("short scales", lambda: broken(lambda s: s.update(scales=s["scales"][:2].clone()), state_dtype="int8"), "shape"),
    ("a rule", lambda: fresh(amsgrad=True), "the rule amsgradw is not offered with bfloat16"),
    ("a master of float16", lambda: broken(_as("master", F16), master="float32"), "expected torch.float32"),
    ("counting", lambda: fresh(count_unmoved=True), "count_unmoved is not offered with bfloat16"),
    ("complex", lambda: fresh(torch.complex64, state_dtype="int8"), "complex parameters are not offered"),
]


@pytest.mark.parametrize(("name", "get", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_what_is_refused(name: str, get: Any, message: str) -> None:
    opt = get()
    params = opt.param_groups[0]["params"]
    before = [numbers(p) for p in params]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        opt.step()
    assert all(same_bits(numbers(p), b) for p, b in zip(params, before, strict=True))


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="master should be None or one of"):
        ours.AdamW(make(BF16), master="split64")


@backends
def test_one_norm_of_16_and_32_bits(backend: str) -> None:
    """A model of bfloat16 with norms in float32 is clipped as a whole."""
    params = [*make(BF16), *make(F32, 1)]
    opt = ours.AdamW(params, max_grad_norm=1.0, backend=backend)
    for n in range(3):
        give(params, n)
        expected = float(torch.cat([p.grad.double().reshape(-1) for p in params]).norm())
        opt.step()
        assert opt.last_stats().grad_norm == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), CLASSES)
def test_hyperparameters_that_stay_are_looked_at_once(name: str, kwargs: dict[str, Any]) -> None:
    params = make(BF16)
    opt = getattr(ours, name)(params, **kwargs)
    run(params, opt, 0, 1)
    assert opt._updates() is opt._updates()
