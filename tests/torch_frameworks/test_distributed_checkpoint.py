"""torch.distributed.checkpoint: saved by some ranks, loaded by as many or fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import same_bits
from framework_cases import loss, network, sharded
from ranks import ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch_cases import STEPS, close, full

import fused_adam.torch as ours

worlds = pytest.mark.parametrize(("saving", "loading"), [(1, 1), (2, 2), (2, 1)])


def made(cls: Any, kwargs: dict[str, Any], layout: str) -> tuple[Any, Any]:
    model = sharded() if layout == "fsdp" else network()
    return model, cls(model.parameters(), **kwargs, **({"flat": True} if layout == "flat" else {}))


def train(model: Any, opt: Any, steps: range) -> Any:
    """All ranks take the same batches, so that their number changes no bit. Returns the parameters."""
    for n in steps:
        opt.zero_grad()
        loss(model, n).backward()
        opt.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().numpy() for p in model.parameters()]


def save(name: str, kwargs: dict[str, Any], layout: str, folder: str) -> None:
    model, opt = made(getattr(ours, name), kwargs, layout)
    train(model, opt, range(STEPS))
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def load(name: str, kwargs: dict[str, Any], layout: str, folder: str) -> Any:
    model, opt = made(getattr(ours, name), {**kwargs, "lr": 0.5}, layout)
    weights, states = get_state_dict(model, opt)
    saved = {"model": weights, "optimizer": states}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return train(model, opt, range(STEPS, 2 * STEPS))


@worlds
@pytest.mark.parametrize("layouts", ["plain-plain", "fsdp-fsdp", "plain-fsdp", "fsdp-flat"])
@full
def test_goes_on_bit_for_bit(
    name: str, kwargs: dict[str, Any], layouts: str, saving: int, loading: int, tmp_path: Path
) -> None:
    before, after = layouts.split("-")
    ranks(saving).run(save, name, kwargs, before, str(tmp_path))
    expected = train(*made(getattr(ours, name), kwargs, "plain"), range(2 * STEPS))
    for found in ranks(loading).run(load, name, kwargs, after, str(tmp_path)):
        assert all(map(same_bits, found, expected))


def change_classes(layout: str, first: str) -> None:
    """The class after half of the steps, with the states gathered and divided again."""
    classes = [torch.optim.AdamW, ours.AdamW] if first == "torch" else [ours.AdamW, torch.optim.AdamW]
    kwargs = {"lr": 0.01, "amsgrad": True}
    model, opt = made(classes[0], kwargs, layout)
    train(model, opt, range(STEPS))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, opt, options=options)
    if torch.distributed.get_rank() == 0:
        assert not any(hasattr(s, "to_local") for state in saved["state"].values() for s in state.values())
    else:
        saved = {}
    model.zero_grad()
    opt = classes[1](model.parameters(), lr=0.5, amsgrad=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, opt, saved, options=options)
    found = train(model, opt, range(STEPS, 2 * STEPS))
    expected = train(*made(torch.optim.AdamW, kwargs, "plain"), range(2 * STEPS))
    start = [p.detach() for p in network().parameters()]
    close([*map(torch.from_numpy, found)], [*map(torch.from_numpy, expected)], start)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("first", ["torch", "ours"])
@pytest.mark.parametrize("layout", ["plain", "fsdp"])
def test_whole_states_go_both_ways(layout: str, first: str, world: int) -> None:
    ranks(world).run(change_classes, layout, first)
