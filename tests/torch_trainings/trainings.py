"""One training loop for every optimizer, and how far the losses of two may be apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch_cases import ours, torch

SEEDS = range(5)
FIRST = 30  # losses that are compared one by one
Make = Callable[..., Any]  # of an optimizer: (class name, parameter groups, **hyperparameters)


@dataclass(frozen=True)
class Training:
    """What torch's seed determines: the initial parameters, and the batches. All is in float32."""

    model: Any
    loss: Callable[[], Any]  # of the next batch
    figure: Callable[[], float]  # how well the model does; less is better


@dataclass(frozen=True, eq=False)
class Problem:
    """A training of `steps` steps, after which its figure is below `goal`; before them it is far above."""

    name: str
    make: Callable[[], Training]
    optimizer: str
    hyperparameters: dict[str, Any]
    steps: int
    goal: float
    cosine: bool = False  # lr falls to zero over the steps
    biases_decay: bool = True  # else they are a parameter group of their own


@dataclass(frozen=True)
class Outcome:
    """Of one training: the loss before each step, the figure before the first and after the last, the parameters."""

    losses: np.ndarray
    before: float
    after: float
    params: tuple[np.ndarray, ...]


def of_torch(**how: Any) -> Make:
    return lambda name, groups, **kwargs: getattr(torch.optim, name)(groups, **kwargs, **how)


def of_ours(**how: Any) -> Make:
    return lambda name, groups, **kwargs: getattr(ours, name)(groups, **kwargs, **how)


TORCHS = {
    "for-loop": of_torch(foreach=False, fused=False),
    "foreach": of_torch(foreach=True),
    "fused": of_torch(fused=True),
}
OURS = {
    "in place": of_ours(backend="numba"),
    "flat": of_ours(backend="numba", flat=True),
    "numpy": of_ours(backend="numpy"),
}


# --- training ---------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's seed, and one thread: models this small gain nothing from a second."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train(problem: Problem, seed: int, make: Make, steps: int) -> Outcome:
    """The first `steps` steps of a problem's training from a seed."""
    with seeded(seed):
        training = problem.make()
        before = training.figure()
        opt = make(problem.optimizer, groups(problem, training.model), **problem.hyperparameters)
        falling = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: (1 + math.cos(math.pi * k / problem.steps)) / 2)
        losses = []
        for _ in range(steps):
            opt.zero_grad()
            loss = training.loss()
            loss.backward()
            opt.step()
            if problem.cosine:
                falling.step()
            losses.append(loss.item())
        params = tuple(p.detach().numpy().copy() for p in training.model.parameters())
        return Outcome(np.array(losses), before, training.figure(), params)


def groups(problem: Problem, model: Any) -> list[dict[str, Any]]:
    if problem.biases_decay:
        return [{"params": [*model.parameters()]}]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    return [{"params": others}, {"params": biases, "weight_decay": 0.0}]


def starts(problem: Problem, make: Make) -> list[Outcome]:
    """The steps whose losses are compared, from every seed."""
    return [train(problem, seed, make, FIRST) for seed in SEEDS]


@cache
def started(problem: Problem, who: str) -> list[Outcome]:
    """`starts`, by one of `TORCHS` or `OURS`."""
    return starts(problem, {**TORCHS, **OURS}[who])


@cache
def finished(problem: Problem, who: str) -> list[Outcome]:
    """All steps from every seed, by one of `TORCHS` or `OURS`."""
    return [train(problem, seed, {**TORCHS, **OURS}[who], problem.steps) for seed in SEEDS]


# --- comparing --------------------------------------------------------------------------------------------------------


def losses(outcomes: Sequence[Outcome]) -> np.ndarray:
    """(seeds, FIRST)"""
    return np.stack([outcome.losses[:FIRST] for outcome in outcomes])


def spread(problem: Problem) -> np.ndarray:
    """How far torch's implementations have been apart up to each step: (FIRST,).

    Over all seeds, since the rounding of one training says little. At least one ulp of the largest loss so far: losses
    are float32, and torch's are often the same to the last bit.
    """
    all_losses = np.stack([losses(started(problem, who)) for who in TORCHS])
    apart = np.ptp(all_losses, axis=0).max(axis=0)
    ulp = np.spacing(np.abs(all_losses).max(axis=(0, 1)).astype(np.float32))
    return np.maximum.accumulate(np.maximum(apart, ulp))


def deviation(problem: Problem, outcomes: Sequence[Outcome]) -> np.ndarray:
    """How far losses are from those of torch's for-loop, in its `spread`: (seeds, FIRST)."""
    return np.abs(losses(outcomes) - losses(started(problem, "for-loop"))) / spread(problem)


def seed_deviation(problem: Problem, outcomes: Sequence[Outcome]) -> np.ndarray:
    """How far figures at the end are from those of torch's for-loop, in its standard deviation over seeds: (seeds,)."""
    theirs = [outcome.after for outcome in finished(problem, "for-loop")]
    mine = [outcome.after for outcome in outcomes]
    return np.abs(np.subtract(mine, theirs[: len(mine)])) / np.std(theirs, ddof=1)
