"""What the tests of `fused_adam.torch` within other frameworks share: a small network, and batches for it."""

from __future__ import annotations

from typing import Any

import torch

import fused_adam.torch as ours

torch.set_num_threads(1)  # as many as these networks need, while other tests run beside them

IN, HIDDEN = 5, 7
WORLDS = (1, 2)


def network(dtype: Any = torch.float64) -> Any:
    """The same each time. Its last layer has one row, so that of two ranks the second holds no element of it."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(IN, HIDDEN),
        torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, HIDDEN),
        torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, 1),
    ).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) / 2)
    return model


def batch(n: int, dtype: Any = torch.float64, size: int = 8) -> tuple[Any, Any]:
    """The n-th batch: inputs and what they should give."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(size, IN, generator=generator, dtype=dtype)
    return x, x.sin().sum(1, keepdim=True)


def loss(model: Any, n: int, part: slice = slice(None)) -> Any:
    x, y = batch(n, next(model.parameters()).dtype)
    return ((model(x[part]) - y[part]) ** 2).mean()


def torchs(name: str) -> Any:
    """torch's class of that name; this package's Lion, for torch has none."""
    return getattr(torch.optim, name, ours.Lion)


# --- within a rank ----------------------------------------------------------------------------------------------------


def part() -> slice:
    """This rank's part of a batch."""
    return slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def mesh() -> Any:
    """All ranks in a row."""
    return torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def sharded() -> Any:
    """The network under FSDP2."""
    model = network()
    for layer in (model[0], model[2], model[4], model):
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh())
    return model
