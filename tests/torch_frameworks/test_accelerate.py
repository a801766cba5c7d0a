"""Accelerate: a prepared loop with accumulated and clipped gradients, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import same_bits
from framework_cases import batch, network, torchs
from ranks import ranks
from torch_cases import close, full

import fused_adam.torch as ours

ACCUMULATED = 2
EPOCHS, BATCHES = 3, 6


class Run:
    """A prepared model, optimizer, scheduler and loader."""

    def __init__(self, cls: Any, kwargs: dict[str, Any], precision: str = "no") -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=precision,
            gradient_accumulation_steps=ACCUMULATED,
            step_scheduler_with_optimizer=True,
        )
        dtype = torch.float64 if precision == "no" else torch.float32
        model = network(dtype)
        opt = cls(model.parameters(), **kwargs)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.7)
        x, y = batch(0, dtype, size=4 * BATCHES)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        self.model, self.opt, self.scheduler, self.loader = self.accelerator.prepare(model, opt, scheduler, loader)
        self.rates: list[float] = []

    def train(self, epochs: int) -> list[Any]:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model), self.accelerator.autocast():
                    loss = ((self.model(x) - y) ** 2).mean()
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.opt.step()
                    self.scheduler.step()
                    self.opt.zero_grad()
                self.rates.append(self.opt.param_groups[0]["lr"])
        return [p.detach() for p in self.model.parameters()]


@pytest.mark.parametrize("flat", [False, True])
@full
def test_a_prepared_loop(name: str, kwargs: dict[str, Any], flat: bool) -> None:
    start = [p.detach() for p in network().parameters()]
    mine, other = Run(getattr(ours, name), {**kwargs, "flat": flat}), Run(torchs(name), kwargs)
    close(mine.train(EPOCHS), other.train(EPOCHS), start)
    assert mine.rates == other.rates and mine.rates[0] > mine.rates[-1]
    assert not mine.opt.step_was_skipped
    if name != "SGD":
        assert {float(s["step"]) for s in mine.opt.state.values()} == {EPOCHS * BATCHES / ACCUMULATED}


def parted(name: str, kwargs: dict[str, Any], folder: str) -> None:
    """One of several processes: as torch's class, and resumed bit for bit."""
    start = [p.detach() for p in network().parameters()]
    cls = getattr(ours, name)
    first, other, steady = Run(cls, kwargs), Run(torchs(name), kwargs), Run(cls, kwargs)
    assert first.accelerator.num_processes == torch.distributed.get_world_size()
    close(first.train(EPOCHS), other.train(EPOCHS), start)
    first.accelerator.save_state(folder)
    second = Run(cls, {**kwargs, "lr": 0.5})
    second.accelerator.load_state(folder)
    for p, q in zip(second.train(EPOCHS), steady.train(2 * EPOCHS), strict=True):
        assert same_bits(p, q)


@full
def test_two_processes(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    ranks(2).run(parted, name, kwargs, str(tmp_path))


def test_bfloat16() -> None:
    """Parameters stay in float32, and the loss is computed in bfloat16: losses agree to what that leaves."""
    start = [p.detach() for p in network(torch.float32).parameters()]
    runs = [Run(module.AdamW, {"lr": 0.01}, "bf16") for module in (ours, torch.optim)]
    mine, other = (run.train(EPOCHS) for run in runs)
    assert {p.dtype for p in mine} == {torch.float32}
    close(mine, other, start, 0.02)


@pytest.mark.parametrize("flat", [False, True])
@full
def test_resumes_bit_for_bit(name: str, kwargs: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    cls, kwargs = getattr(ours, name), {**kwargs, "flat": flat}
    expected = Run(cls, kwargs).train(2 * EPOCHS)
    first = Run(cls, kwargs)
    first.train(EPOCHS)
    first.accelerator.save_state(str(tmp_path))
    second = Run(cls, {**kwargs, "lr": 0.5})
    second.accelerator.load_state(str(tmp_path))
    for p, q in zip(second.train(EPOCHS), expected, strict=True):
        assert same_bits(p, q)
