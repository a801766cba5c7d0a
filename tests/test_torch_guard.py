"""Gradients that `fused_adam.torch` clips, checks, counts and zeroes in its step: the bytes of the flat classes."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
from conftest import same_bits
from torch_cases import STEPS, full, give, ours, parameters, refuses, torch

import fused_adam

OPTIONS: list[dict[str, Any]] = [
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 1e9, "count_unmoved": True},
    {"skip_nonfinite": True},
    {"zero_grads": True},
    {"max_grad_norm": 2.0, "skip_nonfinite": True, "zero_grads": True, "count_unmoved": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(some) for some in OPTIONS])


@full
@options
def test_bytes_of_the_flat_class(name: str, kwargs: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    params = parameters(torch.float32)
    arrays = [p.detach().numpy().copy() for p in params]
    mine = getattr(ours, name)(params, **kwargs, **options, backend=backend)
    flat = getattr(fused_adam, name)(arrays, **kwargs, **options, backend=backend)
    for n in range(STEPS):
        give(params, n)
        if n in (0, 3) and "skip_nonfinite" in options:
            params[1].grad[3] = torch.inf
        grads = [p.grad.numpy().copy() for p in params]
        mine.step()
        flat.step(grads)
        assert mine.last_stats() == flat.last_stats()
        assert all(same_bits(p.grad.numpy(), g) for p, g in zip(params, grads, strict=True))
        skipped = n == 0 and "skip_nonfinite" in options
        assert len(mine.state) == (
            0 if skipped and name != "Adagrad" else len(params)
        )  # which torch gives some at once
    assert all(same_bits(p.detach().numpy(), a) for p, a in zip(params, arrays, strict=True))


def test_gradients_in_another_order_are_zeroed_too(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    opt = ours.AdamW([p], zero_grads=True, backend=backend)
    for _ in range(2):
        p.grad = torch.ones(4, 3).T
        before = p.grad._version
        opt.step()
        assert not p.grad.any() and p.grad._version > before


def test_gradients_that_share_memory_are_not_zeroed(backend: str) -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    p.grad = q.grad = torch.ones(3)
    message = "the gradients of two parameters share memory; zero_grads needs a gradient of its own for each"
    refuses(ours.AdamW([p, q], zero_grads=True, backend=backend), ValueError, message)


def test_what_was_counted_outlives_a_change_of_parameters(backend: str) -> None:
    params = parameters()
    opt = ours.AdamW(params, skip_nonfinite=True, max_grad_norm=1.0, backend=backend)
    for n, absent in enumerate([(), (1,), (1,), ()]):
        give(params, n, absent)
        params[0].grad[0, 0] = torch.nan if n in (0, 2) else 1.0
        opt.step()
    assert opt.last_stats().skipped == 2 and opt.last_stats().grad_norm > 1
    assert [opt.state[p]["step"].item() for p in params] == [2, 1, 2, 2, 2]


def test_copies_keep_the_options() -> None:
    params = parameters()
    opt = ours.AdamW(params, max_grad_norm=0.25, zero_grads=True)
    for mine, again in (copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt)))):
        give(mine, 0)
        again.step()
        assert again.last_stats().clip_factor < 1 and not any(p.grad.any() for p in mine)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm should be above 0"),
    ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite should be True or False"),
    ({"zero_grads": None}, TypeError, "zero_grads should be True or False"),
    ({"device_scalars": True}, TypeError, "device_scalars"),
    ({"fusd": True}, TypeError, "fusd"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[next(iter(row[0])) for row in WRONG])
def test_wrong_options_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ours.AdamW(parameters(), **options)
