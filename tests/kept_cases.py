"""Parameters of 16 bits for `fused_adam.torch`, each way that a tensor is kept, and how runs are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import same_bits
from torch_cases import STEPS, torch

SHAPES = [(3, 50), (129,), (), (2, 3, 40), (0, 2)]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CODED = {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8, "scales": torch.int16}
CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
]
OF_ADAM = CLASSES[1:3]
ROWS = [
    (name, kwargs, dtype, options)
    for classes, dtype, options in [
        (CLASSES, BF16, {}),
        (CLASSES, BF16, {"state_dtype": "float32"}),
        (CLASSES, BF16, {"stochastic_rounding": True, "seed": 7}),
        (CLASSES, F16, {}),
        (CLASSES, F32, {"state_dtype": "bfloat16"}),
        (CLASSES, BF16, {"master": "float32"}),
        (CLASSES, F16, {"master": "float32"}),
        (CLASSES, BF16, {"master": "split16"}),
        (CLASSES, BF16, {"master": "split16", "state_dtype": "bfloat16"}),
        (OF_ADAM, F32, {"state_dtype": "int8"}),
        (OF_ADAM, BF16, {"state_dtype": "int8"}),
        (OF_ADAM, BF16, {"master": "split8", "state_dtype": "int8", "stochastic_rounding": True}),
        (OF_ADAM, BF16, {"master": "split8", "state_dtype": "bfloat16"}),
    ]
    for name, kwargs in classes
]
# What is there is `Format`'s business; here it is each way that a tensor is kept, once.
FEW = [row for row in ROWS if row[0] == "AdamW"]
each = pytest.mark.parametrize(("name", "kwargs", "dtype", "options"), ROWS)
few = pytest.mark.parametrize(("name", "kwargs", "dtype", "options"), FEW)
backends = pytest.mark.parametrize("backend", ["numpy", "numba"])


def make(dtype: Any, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give(params: list[Any], n: int) -> None:
    generator = torch.Generator().manual_seed(n + 1000)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def numbers(t: Any) -> Any:
    """As NumPy holds them, bfloat16 as uint16, on a copy."""
    t = t.detach().clone()
    return (t.view(torch.int16).numpy().view(np.uint16) if t.dtype == BF16 else t.numpy()).copy()


def run(params: list[Any], opt: Any, start: int = 0, stop: int = STEPS) -> None:
    for n in range(start, stop):
        give(params, n)
        opt.step()


def same(a: list[Any], b: list[Any]) -> bool:
    return all(same_bits(numbers(p), numbers(q)) for p, q in zip(a, b, strict=True))


def same_saved(a: Any, b: Any) -> bool:
    found = a.state_dict()["state"], b.state_dict()["state"]
    return found[0].keys() == found[1].keys() and all(
        state.keys() == found[1][k].keys()
        and all(same_bits(numbers(s), numbers(found[1][k][called])) for called, s in state.items())
        for k, state in found[0].items()
    )
