"""Data-parallel training, and torch's optimizer that divides its states among the ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import same_bits
from framework_cases import WORLDS, loss, network, part, torchs
from ranks import ranks
from torch.nn.parallel import DistributedDataParallel
from torch_cases import STEPS, close, full, same_states

import fused_adam.torch as ours

worlds = pytest.mark.parametrize("world", WORLDS)


def train(model: Any, opt: Any, steps: range) -> None:
    """Steps of two backward passes each; the second of them exchanges the gradients."""
    for n in steps:
        opt.zero_grad()
        with model.no_sync():
            (loss(model, n, part()) / 2).backward()
        (loss(model, n + 1000, part()) / 2).backward()
        opt.step()


def wrapped(model: Any, views: bool = False) -> Any:
    """With buckets of one tensor or two."""
    return DistributedDataParallel(model, gradient_as_bucket_view=views, bucket_cap_mb=0.0002)


def parity(name: str, kwargs: dict[str, Any], views: bool) -> Any:
    start = [p.detach() for p in network().parameters()]
    models = wrapped(network(), views), wrapped(network(), views)
    mine = getattr(ours, name)(models[0].parameters(), **kwargs)
    other = torchs(name)(models[1].parameters(), **kwargs)
    for model, opt in zip(models, (mine, other), strict=True):
        train(model, opt, range(STEPS))
    close([*models[0].parameters()], [*models[1].parameters()], start)
    same_states(mine.state_dict(), other.state_dict())
    whole = network()  # in one process, with all of each batch
    alone = torchs(name)(whole.parameters(), **kwargs)
    for n in range(STEPS):
        alone.zero_grad()
        ((loss(whole, n) + loss(whole, n + 1000)) / 2).backward()
        alone.step()
    close([*models[0].parameters()], [*whole.parameters()], start)
    return [p.detach().numpy() for p in models[0].parameters()]


@worlds
@pytest.mark.parametrize("views", [False, True])
@full
def test_ddp(name: str, kwargs: dict[str, Any], views: bool, world: int) -> None:
    first, *others = ranks(world).run(parity, name, kwargs, views)
    for other in others:
        assert all(map(same_bits, first, other))


def flat_parity(views: bool, first: str) -> None:
    models = network(), network()
    if first == "optimizer":
        mine = ours.AdamW(models[0].parameters(), flat=True)
    models = wrapped(models[0], views), wrapped(models[1], views)
    if first == "wrapper":
        mine = ours.AdamW(models[0].parameters(), flat=True)
    other = ours.AdamW(models[1].parameters())
    for steps in (range(2), range(2, 2 * STEPS)):
        for model, opt in zip(models, (mine, other), strict=True):
            train(model, opt, steps)
        assert all(
            same_bits(p.detach(), q.detach())
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True)
        )
    distances = {p.grad.data_ptr() - p.data_ptr() for p in models[0].parameters()}
    assert (len(distances) == 1) is not views, "gradients are where they were, or in DDP's buckets"


@worlds
@pytest.mark.parametrize("first", ["optimizer", "wrapper"])
@pytest.mark.parametrize("views", [False, True])
def test_ddp_of_a_flat_buffer(views: bool, first: str, world: int) -> None:
    """The bits of the other layout. Gradients that are views of DDP's buckets are not views of the buffer's."""
    ranks(world).run(flat_parity, views, first)


def zero(name: str, kwargs: dict[str, Any], layout: str) -> None:
    start = [p.detach() for p in network().parameters()]
    mine, more = getattr(ours, name), {"flat": layout == "flat"}
    models = [wrapped(network()) for _ in range(3)]

    def divided(model: Any, cls: Any) -> Any:
        return torch.distributed.optim.ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=cls,
            parameters_as_bucket_view=layout == "views",
            **{**kwargs, **(more if cls is mine else {})},
        )

    first, other, steady = map(divided, models, (mine, torchs(name), mine))
    for model, opt in zip(models, (first, other, steady), strict=True):
        train(model, opt, range(STEPS))
    close([*models[0].parameters()], [*models[1].parameters()], start)
    first.consolidate_state_dict(to=0)
    saved = [first.state_dict() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(saved, src=0)
    before = copy.deepcopy(saved[0])
    again = divided(models[0], mine)
    again.load_state_dict(saved[0])
    whole = copy.deepcopy(models[0])
    alone = mine(whole.parameters(), lr=123.0)
    alone.load_state_dict(before)
    for model, opt in zip((models[0], models[2], whole), (again, steady, alone), strict=True):
        train(model, opt, range(STEPS, 2 * STEPS))
    for model in (models[0], whole):
        for p, q in zip(model.parameters(), models[2].parameters(), strict=True):
            assert same_bits(p.detach(), q.detach())


@worlds
@pytest.mark.parametrize("layout", ["plain", "views", "flat"])
@full
def test_zero_redundancy_optimizer(name: str, kwargs: dict[str, Any], layout: str, world: int) -> None:
    """Its states gathered and loaded, by it or by an optimizer that holds all of them: it goes on bit for bit."""
    ranks(world).run(zero, name, kwargs, layout)
