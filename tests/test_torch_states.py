"""States of `fused_adam.torch` that somebody else holds, and may replace between steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import same_bits
from torch_cases import STEPS, give, parameters, torch

import fused_adam.torch as ours


def _kept(opt: Any) -> Any:
    return opt.state


def _from_before_a_save(opt: Any) -> Any:
    found: list[Any] = []
    opt.register_state_dict_pre_hook(lambda o: found.append(o.state))
    opt.state_dict()
    return found[0]


def _from_within_a_save(opt: Any) -> Any:
    found: list[Any] = []
    opt.register_state_dict_post_hook(lambda o, saved: found.append({**saved["state"]}))
    opt.state_dict()
    return {opt.param_groups[0]["params"][k]: state for k, state in found[0].items()}


def _from_a_step(opt: Any) -> Any:
    found: list[Any] = []
    opt.register_step_post_hook(lambda o, args, kwargs: found.append(o.state))
    opt.step()
    return found[0]


def _from_what_is_pickled(opt: Any) -> Any:
    return opt.__getstate__()["state"]


def _from_a_shallow_copy(opt: Any) -> Any:
    return copy.copy(opt).state


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "get", [_kept, _from_before_a_save, _from_within_a_save, _from_a_step, _from_what_is_pickled, _from_a_shallow_copy]
)
def test_a_state_that_is_replaced_through_what_was_kept(get: Any, flat: bool) -> None:
    """The next step takes the new tensor, whoever holds the dict, and however long since."""
    ends = []
    for kept in (True, False):
        params = parameters()
        opt = ours.Adam(params, flat=flat)
        for n in range(STEPS):
            for p in params:
                p.grad.fill_(n + 1.0) if p.grad is not None else setattr(p, "grad", torch.full_like(p, n + 1.0))
            if n == 2:
                states = get(opt)
            if n == 4:
                if kept:
                    states[params[0]]["exp_avg"] = torch.full_like(params[0], 7.0)
                else:
                    opt.state[params[0]]["exp_avg"].fill_(7.0)
            opt.step()
        ends.append([p.detach().numpy() for p in params])
    assert all(map(same_bits, *ends))


@pytest.mark.parametrize("flat", [False, True])
def test_states_that_nobody_else_holds(flat: bool) -> None:
    """Saving, loading, zeroing and schedules do not make steps look at states, which costs a fifth of a small one."""
    params = parameters()
    opt = ours.AdamW(params, flat=flat)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for n in range(STEPS):
        give(params, n)
        opt.step()
        schedule.step()
        saved = opt.state_dict()
        opt.zero_grad()
        if n == 2:
            opt.load_state_dict(saved)
        for state in saved["state"].values():
            state.clear()  # what was saved is the caller's
    assert not opt._asked_for_state[0]
    assert all(len(opt.state[p]) == 3 for p in params)


class Wrapper(ours.AdamW):
    """As Lightning's: of the class that it wraps, without attributes of its own, and asks the one inside for them."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["opt"], name)

    def step(self, *args: Any) -> Any:
        return self.opt.step(*args)


@pytest.mark.parametrize("flat", [False, True])
def test_a_state_that_is_replaced_through_a_wrapper(flat: bool) -> None:
    ends = []
    for wrapped in (True, False):
        params = parameters()
        opt = ours.AdamW(params, flat=flat)
        outside = Wrapper(opt) if wrapped else opt
        for n in range(STEPS):
            for p in params:
                p.grad.fill_(n + 1.0) if p.grad is not None else setattr(p, "grad", torch.full_like(p, n + 1.0))
            if n == 3 and wrapped:
                outside.state[params[0]]["exp_avg"] = torch.full_like(params[0], 7.0)
            elif n == 3:
                opt.state[params[0]]["exp_avg"].fill_(7.0)
            outside.step()
        outside.zero_grad()
        assert all((p.grad is not None) is flat for p in params)
        ends.append([p.detach().numpy() for p in params])
    assert all(map(same_bits, *ends))
