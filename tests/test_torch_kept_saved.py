"""State dicts of `fused_adam.torch` with 16 and 8 bits: saved, loaded, converted, refused."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
from conftest import same_bits
from kept_cases import BF16, CODED, F32, few, make, numbers, run, same, same_saved
from torch_cases import STEPS, torch

import fused_adam.torch as ours


@few
@pytest.mark.parametrize("flat", [False, True])
def test_saved_and_loaded(name: str, kwargs: dict[str, Any], dtype: Any, options: dict[str, Any], flat: bool) -> None:
    """Through torch.save, pickle's safe subset, into the other layout; and by deepcopy: bit for bit."""
    params, straight = make(dtype), make(dtype)
    opt = getattr(ours, name)(params, flat=flat, **kwargs, **options)
    other = getattr(ours, name)(straight, **kwargs, **options)
    run(params, opt, 0, 3)
    run(straight, other)
    file = io.BytesIO()
    torch.save({"params": params, "opt": opt.state_dict()}, file)
    file.seek(0)
    with torch.serialization.safe_globals([torch.nn.Parameter]):
        loaded = torch.load(file, weights_only=True)
    again = getattr(ours, name)(loaded["params"], flat=not flat, **kwargs, **options)
    again.load_state_dict(loaded["opt"])
    run(loaded["params"], again, 3)
    copied = copy.deepcopy(opt)
    mine = copied.param_groups[0]["params"]
    run(mine, copied, 3)
    for found, by in ((loaded["params"], again), (mine, copied)):
        assert same(found, straight)
        assert same_saved(by, other)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"exp_avg": BF16, "exp_avg_sq": BF16}),
        ({"state_dtype": "float32"}, {"exp_avg": F32, "exp_avg_sq": F32}),
        ({"master": "float32"}, {"exp_avg": F32, "exp_avg_sq": F32, "master": F32}),
        ({"state_dtype": "int8"}, CODED),
        (
            {"state_dtype": "int8", "master": "split8"},
            {**CODED, "master_low": torch.uint8},
        ),
    ],
)
def test_torch_states_are_taken_over(options: dict[str, Any], keys: dict[str, Any]) -> None:
    """A run of torch's fused bfloat16 step goes on; states become what was asked for."""
    params = make(BF16)
    theirs = torch.optim.AdamW(params, lr=0.01, fused=True)
    run(params, theirs, 0, 3)
    opt = ours.AdamW(params, lr=0.01, **options)
    opt.load_state_dict(theirs.state_dict())
    before = numbers(params[0])
    run(params, opt, 3, 4)
    run(params, theirs, 3, 4)  # a second step by the same gradients, from its own states
    found = opt.state[params[0]]
    assert {called: s.dtype for called, s in found.items() if called != "step"} == keys
    assert float(found["step"]) == 4
    assert not same_bits(numbers(params[0]), before)
    if "scales" not in found:
        tolerance = 2**-7 * float(theirs.state[params[0]]["exp_avg"].abs().max())
        assert torch.allclose(found["exp_avg"].float(), theirs.state[params[0]]["exp_avg"].float(), atol=tolerance)


def test_codes_become_floats_and_codes_again() -> None:
    params = make(F32)
    opt = ours.AdamW(params, state_dtype="int8")
    run(params, opt)
    saved = opt.state_dict()
    plain = ours.AdamW(params)
    plain.load_state_dict(saved)
    assert {*plain.state[params[0]]} == {"step", "exp_avg", "exp_avg_sq"}
    assert plain.state[params[0]]["exp_avg_sq"].dtype == F32
    again = ours.AdamW(params, state_dtype="int8")
    again.load_state_dict(plain.state_dict())
    for key in range(len(params)):
        ours_, theirs = again.state_dict()["state"][key], saved["state"][key]
        same_codes = (ours_["exp_avg_codes"].int() - theirs["exp_avg_codes"].int()).abs() <= 1
        assert same_codes.all(), "a code is encoded to itself or, by its dither, to the next"


def test_random_bits_of_sgd_go_on_after_a_load() -> None:
    """torch's SGD has no step; with stochastic rounding ours has one, or its random bits would come again."""
    options = {"lr": 0.1, "momentum": 0.9, "stochastic_rounding": True}
    params, straight = make(BF16), make(BF16)
    opt, other = ours.SGD(params, **options), ours.SGD(straight, **options)
    run(straight, other)
    for n in range(STEPS):
        run(params, opt, n, n + 1)
        saved = opt.state_dict()
        opt = ours.SGD(params, **options)
        opt.load_state_dict(saved)
    assert same(params, straight)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("master", ["float32", "split16"])
def test_what_is_loaded_before_the_first_step_counts(master: str, flat: bool) -> None:
    """A wrapper may save and load a fresh optimizer; its masters are not of the numbers that come later."""
    params = make(BF16)
    opt = ours.AdamW(params, lr=0.01, flat=flat, master=master)
    opt.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p in params:
            p.fill_(5.0)
    run(params, opt, 0, 1)
    assert all((p > 4.9).all() for p in params)


@pytest.mark.parametrize(("one", "other"), [("split16", "float32"), ("float32", "split16"), ("split16", "split8")])
def test_masters_of_another_kind(one: str, other: str) -> None:
    """float32 and split16 are the same numbers, so a run goes on as it was."""
    params = make(BF16)
    opt = ours.AdamW(params, lr=0.01, master=one)
    run(params, opt)
    straight = [torch.nn.Parameter(p.detach().clone()) for p in params]
    narrow = {"state_dtype": "bfloat16"} if other == "split8" else {}
    again = ours.AdamW(params, lr=0.01, master=other, **narrow)
    third = ours.AdamW(straight, lr=0.01, master=one)
    again.load_state_dict(opt.state_dict())
    third.load_state_dict(opt.state_dict())
    run(params, again, STEPS, STEPS + 2)
    run(straight, third, STEPS, STEPS + 2)
    if other != "split8":
        assert same(params, straight)
    assert all(torch.allclose(p, q, rtol=2**-7, atol=1e-3) for p, q in zip(params, straight, strict=True))


def test_a_master_of_other_parameters_does_not_load() -> None:
    params = make(BF16)
    opt = ours.AdamW(params, lr=0.01, master="float32")
    run(params, opt)
    other = ours.AdamW(make(BF16, 1), master="split16")
    with pytest.raises(ValueError, match="master does not round to the parameter"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scales"), "has no"),
        (lambda s: s["scales"].fill_(0x7FC0), "block 0 of its codes, or its scales, holds what no step has made"),
        (lambda s: s["exp_avg_codes"].fill_(-128), "holds what no step has made"),
        (lambda s: s.update(exp_avg_codes=s["exp_avg_codes"].float()), "so should have 'exp_avg_codes' of torch.int8"),
    ],
)
def test_codes_that_are_none_do_not_load(change: Any, message: str) -> None:
    params = make(F32)
    opt = ours.AdamW(params, state_dtype="int8")
    run(params, opt, 0, 2)
    saved, kept = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt)
    change(saved["state"][0])
    for other in (opt, ours.AdamW(params)):
        with pytest.raises(ValueError, match=re.escape(message)):
            other.load_state_dict(saved)
    assert same_saved(opt, kept)
