"""Trainings whose parameters, gradients and states are kept in 16 and 8 bits: in NumPy arrays, beside torch's model.

The model computes in float32, from parameters that are decoded before each step; its gradients are rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from torch_cases import torch
from trainings import Problem, groups, seeded

import fused_adam

HALF: dict[str, Any] = {"dtype": "bfloat16", "master": "split8", "state_dtype": "int8"}  # 5.1 bytes a parameter


def encoded(x: Any) -> Any:
    """A tensor's numbers in bfloat16, as uint16."""
    return x.detach().to(torch.bfloat16).view(torch.uint16).numpy().copy()


def decode(p: Any, x: Any) -> None:
    """The other way, into a tensor."""
    x.data.copy_(torch.from_numpy(p).view(torch.bfloat16))


@cache
def figure(problem: Problem, seed: int, backend: str = "numba", **how: Any) -> float:
    """At the end of a training. how: options of the optimizer; without any, all is kept in float32."""
    with seeded(seed):
        training = problem.make()
        asked = groups(problem, training.model)
        tensors = [group.pop("params") for group in asked]
        kept = [[encoded(x) if how else x.detach().numpy() for x in some] for some in tensors]
        params = [{"params": some, **group} for some, group in zip(kept, asked, strict=True)]
        opt = getattr(fused_adam, problem.optimizer)(params, backend=backend, **problem.hyperparameters, **how)
        for _ in range(problem.steps):
            for some, mine in zip(tensors, kept, strict=True):
                for x, p in zip(some, mine, strict=True):
                    if how:
                        decode(p, x)
                    x.grad = None
            training.loss().backward()
            opt.step([[encoded(x.grad) if how else x.grad.numpy() for x in some] for some in tensors])
        if how:
            for some, mine in zip(tensors, kept, strict=True):
                for x, p in zip(some, mine, strict=True):
                    decode(p, x)
        return training.figure()


def difference(problem: Problem, seeds: Any, **how: Any) -> tuple[float, float]:
    """From float32, from the same seeds: the mean, and its standard error, in float32's deviation over these seeds."""
    plain = np.array([figure(problem, seed) for seed in seeds])
    other = np.array([figure(problem, seed, **how) for seed in seeds])
    apart = (other - plain) / plain.std(ddof=1)
    return float(apart.mean()), float(apart.std(ddof=1) / len(apart) ** 0.5)
