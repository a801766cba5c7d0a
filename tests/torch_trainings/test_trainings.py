"""Seven trainings by `fused_adam.torch` beside the same by torch.optim, from five seeds each.

The first 30 losses are within 10 times what torch's own implementations differ by, the ends within two standard
deviations over seeds. Planted mistakes show that neither bound holds of itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_bits
from problems import PROBLEMS
from torch_cases import torch
from trainings import OURS, TORCHS, Problem, deviation, finished, seed_deviation, started, starts, train

SPREADS, SEED_DEVIATIONS = 10, 2
# What a process has trained is kept for all tests of the problem: with processes, `--dist loadfile` is best.
problems = pytest.mark.parametrize("problem", [pytest.param(p, id=p.name) for p in PROBLEMS])
ours = pytest.mark.parametrize("who", OURS)
to_the_end = pytest.mark.parametrize("who", ["in place", "flat"])


def with_lr(problem: Problem, factor: float) -> Problem:
    return replace(problem, hyperparameters={**problem.hyperparameters, "lr": factor * problem.hyperparameters["lr"]})


@problems
@ours
def test_first_losses_are_torchs(problem: Problem, who: str) -> None:
    apart = deviation(problem, started(problem, who))
    assert np.all(apart[:, 0] == 0), "the trainings do not start alike"
    seed, k = np.unravel_index(apart.argmax(), apart.shape)
    assert apart[seed, k] <= SPREADS, f"{apart[seed, k]:.3g} spreads apart at step {k} from seed {seed}"


@problems
@to_the_end
def test_ends_are_torchs(problem: Problem, who: str) -> None:
    apart = seed_deviation(problem, finished(problem, who))
    assert np.all(apart <= SEED_DEVIATIONS), f"{apart} seed standard deviations apart"


@problems
@to_the_end
def test_goals_are_reached(problem: Problem, who: str) -> None:
    """Of the convex problems: the optimum that another package found."""
    for seed, outcome in enumerate(finished(problem, who)):
        assert outcome.after < problem.goal < outcome.before / 1.5, f"from seed {seed}"


@problems
def test_all_forms_have_the_same_bits(problem: Problem) -> None:
    """In place and flat, on each backend: 30 steps, and all of them in place and flat."""
    for outcomes, who in ((started, "flat"), (started, "numpy"), (finished, "flat")):
        for a, b in zip(outcomes(problem, "in place"), outcomes(problem, who), strict=True):
            names = ["losses", *(f"parameter {k}" for k in range(len(a.params)))]
            assert_same_bits(names, [a.losses, *a.params], [b.losses, *b.params], who)


# --- the bounds can fail ----------------------------------------------------------------------------------------------


@problems
def test_one_percent_of_lr_is_caught(problem: Problem) -> None:
    apart = deviation(problem, starts(with_lr(problem, 1.01), OURS["flat"]))
    assert np.all(apart.max(axis=1) > SPREADS), "from each seed"


@problems
def test_a_tenth_of_lr_misses_goal_and_end(problem: Problem) -> None:
    outcome = train(with_lr(problem, 0.1), 0, OURS["flat"], problem.steps)
    assert outcome.after > problem.goal
    assert np.all(seed_deviation(problem, [outcome]) > SEED_DEVIATIONS)


class TextbookAdamW(torch.optim.Optimizer):
    """Loshchilov & Hutter 2019, algorithm 2, in so many words, with a mistake."""

    def __init__(self, params: Any, mistake: str, lr: float, weight_decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.mistake = mistake

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, self.state[p], group["lr"], group["weight_decay"])

    def update(self, p: Any, g: Any, state: dict[str, Any], lr: float, decay: float) -> None:
        wrong = self.mistake.__eq__
        beta1, beta2, eps = 0.9, 0.99 if wrong("another beta2") else 0.999, 1e-8
        if wrong("L2") or wrong("no decay"):
            g, decay = g + (decay * p if wrong("L2") else 0), 0.0
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
        v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
        late = t + wrong("t one too large")
        q1, q2 = (1, 1) if wrong("no bias correction") else (1 - beta1**late, 1 - beta2**late)
        root = (v / q2 + eps).sqrt() if wrong("eps inside the root") else (v / q2).sqrt() + eps
        p -= lr * (decay * p + (1.01 if wrong("1 % too long") else 1.0) * (m / q1) / root)


MISTAKES = [
    "1 % too long",
    "eps inside the root",
    "no bias correction",
    "t one too large",
    "another beta2",
    "L2",
    "no decay",
]


def textbook(problem: Problem, mistake: str) -> np.ndarray:
    """The largest deviation from each seed."""
    made = starts(problem, lambda _, params, **kwargs: TextbookAdamW(params, mistake, **kwargs))
    return deviation(problem, made).max(axis=1)


adamw = pytest.mark.parametrize("problem", [pytest.param(p, id=p.name) for p in PROBLEMS if p.optimizer == "AdamW"])


@adamw
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(problem: Problem, mistake: str) -> None:
    assert np.all(textbook(problem, mistake) > SPREADS), "from each seed"


@adamw
def test_the_textbook_itself_is_not(problem: Problem) -> None:
    assert np.all(textbook(problem, "none") <= SPREADS)


@problems
def test_torchs_own_implementations_differ(problem: Problem) -> None:
    """The yardstick is alive: torch's implementations are three, and not all the same bits after 30 steps."""
    params = [[*zip(*(outcome.params for outcome in started(problem, who)), strict=True)] for who in TORCHS]
    assert any(not np.array_equal(a, b) for theirs in params[1:] for a, b in zip(params[0], theirs, strict=True))
