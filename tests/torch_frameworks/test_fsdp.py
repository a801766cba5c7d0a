"""FSDP2: parameters that are DTensors, of which each rank holds a part, or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import same_bits
from framework_cases import WORLDS, loss, mesh, network, part, sharded, torchs
from ranks import ranks
from torch_cases import STEPS, close, full

import fused_adam.torch as ours

worlds = pytest.mark.parametrize("world", WORLDS)


def train(model: Any, opt: Any, steps: range) -> None:
    for n in steps:
        loss(model, n, part()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
        opt.zero_grad()


def whole(tensors: Any) -> list[Any]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def parity(name: str, kwargs: dict[str, Any]) -> list[int]:
    start = [p.detach() for p in network().parameters()]
    mine, theirs = sharded(), sharded()
    opt = getattr(ours, name)(mine.parameters(), **kwargs)
    other = torchs(name)(theirs.parameters(), **kwargs)
    train(mine, opt, range(STEPS))
    train(theirs, other, range(STEPS))
    close(whole(mine.parameters()), whole(theirs.parameters()), start)
    alone = network()
    single = torchs(name)(alone.parameters(), **kwargs)
    for n in range(STEPS):
        single.zero_grad()
        loss(alone, n).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 5.0)
        single.step()
    close(whole(mine.parameters()), [*alone.parameters()], start)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for key, s in opt.state[p].items():
            t = other.state[q][key]
            assert type(s) is type(t) and s.dtype == t.dtype and s.shape == t.shape, key
            if key != "step":
                assert s.placements == p.placements and s.to_local().stride() == t.to_local().stride()
        assert opt.state[p].get("step", STEPS) == STEPS
    return [p.to_local().numel() for p in mine.parameters()]


@worlds
@full
def test_fsdp(name: str, kwargs: dict[str, Any], world: int) -> None:
    held = ranks(world).run(parity, name, kwargs)
    assert [*map(sum, zip(*held, strict=True))] == [p.numel() for p in network().parameters()]
    assert (0 in held[-1]) == (world == 2), "a rank without elements"


def nothing_here() -> None:
    model = torch.distributed.fsdp.fully_shard(torch.nn.Linear(3, 1, dtype=torch.float64), mesh=mesh())
    opt = ours.AdamW(model.parameters())
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    for n in range(3):
        model(x).sum().backward()
        opt.step()
        opt.zero_grad()
        assert {float(s["step"]) for s in opt.state.values()} == {n + 1}
    assert sum(p.to_local().numel() for p in model.parameters()) == (0 if torch.distributed.get_rank() else 4)
    assert opt.state_dict()["state"].keys() == {0, 1}


@worlds
def test_a_rank_without_any_elements(world: int) -> None:
    ranks(world).run(nothing_here)


def copies() -> None:
    model = sharded()
    opt = ours.AdamW(model.parameters(), lr=0.1)
    train(model, opt, range(2))
    params = [*model.parameters()]
    others, other = copy.deepcopy((params, opt))
    loaded = ours.AdamW(params)
    loaded.load_state_dict(opt.state_dict())
    for p, q in zip(params, others, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
        for key, s in loaded.state[p].items():
            assert (
                key == "step"
                or s.to_local().data_ptr() != opt.state[p][key].to_local().data_ptr()
                or not s.to_local().numel()
            )
    other.step()
    loaded.step()
    for p, q in zip(params, others, strict=True):
        assert same_bits(p.to_local().detach(), q.to_local().detach())


@worlds
def test_copied_and_loaded(world: int) -> None:
    ranks(world).run(copies)


def scaled(amp_scaling: bool) -> None:
    """An infinite gradient in one rank is skipped in all; scales are powers of two, which leave no trace."""
    mine, plain = sharded(), sharded()
    opt, other = ours.AdamW(mine.parameters(), amp_scaling=amp_scaling), ours.AdamW(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for n in range(STEPS):
        opt.zero_grad()
        other.zero_grad()
        scaler.scale(loss(mine, n, part())).backward()
        if n == 2 and torch.distributed.get_rank() == 0:
            next(mine.parameters()).grad.to_local()[0] = float("inf")
        scaler.step(opt)
        scaler.update()
        loss(plain, n, part()).backward()
        if n != 2:
            other.step()
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            assert same_bits(p.to_local().detach(), q.to_local().detach()), n
    assert scaler.get_scale() == 2.0**9


@worlds
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_grad_scaler(amp_scaling: bool, world: int) -> None:
    ranks(world).run(scaled, amp_scaling)


def in_hooks() -> None:
    """An optimizer for each parameter, stepped as soon as its gradient has been reduced."""
    mine, plain = sharded(), sharded()
    single = {p: ours.AdamW([p], lr=0.1) for p in mine.parameters()}
    together = ours.AdamW(plain.parameters(), lr=0.1)

    def step(p: Any) -> None:
        single[p].step()
        single[p].zero_grad()

    for p in mine.parameters():
        p.register_post_accumulate_grad_hook(step)
    for n in range(STEPS):
        loss(mine, n, part()).backward()
        loss(plain, n, part()).backward()
        together.step()
        together.zero_grad()
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        assert same_bits(p.to_local().detach(), q.to_local().detach())


@worlds
def test_an_optimizer_for_each_parameter_in_hooks(world: int) -> None:
    ranks(world).run(in_hooks)


def mixed() -> None:
    """Parameters in float32 that FSDP gathers in bfloat16."""
    import torch.distributed.fsdp as fsdp

    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = []
    for cls in (ours.AdamW, torch.optim.AdamW):
        model = network(torch.float32)
        fsdp.fully_shard(model, mesh=mesh(), mp_policy=policy)
        opt = cls(model.parameters(), lr=0.01)
        train(model, opt, range(STEPS))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        models.append(model)
    close(
        whole(models[0].parameters()),
        whole(models[1].parameters()),
        [p.detach() for p in network(torch.float32).parameters()],
        1e-2,
    )


@worlds
def test_mixed_precision(world: int) -> None:
    ranks(world).run(mixed)
