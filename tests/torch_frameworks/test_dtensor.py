"""Tensors that are divided among ranks in other ways than FSDP2's, and what of them does not fit."""

from __future__ import annotations

import pytest
import torch
from conftest import same_bits
from framework_cases import WORLDS, mesh
from ranks import ranks
from torch_cases import refuses

import fused_adam.torch as ours

worlds = pytest.mark.parametrize("world", WORLDS)


def placed(later: bool) -> None:
    """Replicated, divided by rows or columns, and gradients that are placed otherwise or have yet to be summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    full_p, full_g = torch.arange(24.0).reshape(4, 6), torch.linspace(-1, 2, 24).reshape(4, 6)
    alone = torch.nn.Parameter(full_p.clone())
    alone.grad = full_g.clone()
    single = ours.AdamW([alone], lr=0.1)
    single.step()
    single.step()
    world = torch.distributed.get_world_size()
    for p_place in (Replicate(), Shard(0), Shard(1)):
        for g_place in (p_place, Replicate(), Shard(0), Shard(1), Partial()):
            p = torch.nn.Parameter(distribute_tensor(full_p.clone(), mesh(), [p_place]))
            if g_place == Partial():
                g = DTensor.from_local(full_g / world, mesh(), [g_place])
            else:
                g = distribute_tensor(full_g, mesh(), [g_place])
            if later:
                g = g.redistribute(placements=[p_place], async_op=True)
            p.grad = g
            opt = ours.AdamW([p], lr=0.1)
            opt.step()
            p._local_tensor = p._local_tensor.clone()  # another place, as when FSDP moves it
            opt.step()
            assert p.grad is g
            assert same_bits(p.full_tensor().detach(), alone.detach()), (p_place, g_place)
            assert opt.state[p]["exp_avg"].placements == p.placements


@worlds
@pytest.mark.parametrize("later", [False, True])
def test_placements(later: bool, world: int) -> None:
    """later: whether a gradient may still be on its way to where its parameter is."""
    ranks(world).run(placed, later)


def refused() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh(), [Shard(0)]))
    q = torch.nn.Parameter(torch.ones(4, 2))
    with pytest.raises(
        TypeError, match=r"parameter 0 .* is a DTensor, which has no place in a buffer; leave flat=True out"
    ):
        ours.AdamW([p], flat=True)
    p.grad, q.grad = torch.ones_like(p), torch.ones(4, 2)
    for option, value in (("max_grad_norm", 1.0), ("skip_nonfinite", True)):
        opt = ours.AdamW([p], **{option: value})
        with pytest.raises(ValueError, match=f"{option}: of a DTensor's gradient this process sees no more than"):
            opt.step()
        assert not opt.state
    opt, plain = ours.AdamW([p]), ours.AdamW([q])
    opt.step()
    plain.step()
    saved = opt.state_dict(), plain.state_dict()
    with pytest.raises(
        TypeError, match=r'\["exp_avg"\] is a plain tensor but its parameter is a DTensor; .*set_optimizer_state_dict'
    ):
        opt.load_state_dict(saved[1])
    with pytest.raises(TypeError, match=r"is a DTensor but its parameter is a plain tensor"):
        plain.load_state_dict(saved[0])
    opt.state[p]["exp_avg"] = distribute_tensor(torch.ones(4, 2), mesh(), [Replicate()])
    before = p.to_local().clone()
    with pytest.raises(ValueError, match=r"'exp_avg' of params\[0\]\[0\] is spread by \(\(Replicate\(\),\), .*\(Shard"):
        opt.step()
    assert torch.equal(p.to_local(), before)
    q.grad = torch.ones_like(p)
    refuses(plain, TypeError, r"the gradient of params\[0\]\[0\] is a DTensor, which is no plain memory")
    opt.state.clear()
    p.grad = torch.ones(4, 2)
    with pytest.raises(
        TypeError, match=r"the gradient of params\[0\]\[0\] is a plain tensor but its parameter is a DTensor"
    ):
        opt.step()
    assert torch.equal(p.to_local(), before) and not opt.state


@worlds
def test_what_does_not_fit_is_refused(world: int) -> None:
    ranks(world).run(refused)


def noticed() -> None:
    """By autograd: that a step has changed what a loss needs."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    for part_of in (lambda p: p, lambda p: p.to_local()):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh(), [Replicate()]))
        loss = (part_of(p) ** 2).sum()
        p.grad = torch.ones_like(p)
        ours.SGD([p]).step()
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            loss.backward()


@worlds
def test_autograd_notices_the_step(world: int) -> None:
    ranks(world).run(noticed)
