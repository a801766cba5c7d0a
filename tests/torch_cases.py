"""What the tests of `fused_adam.torch` share: parameters, gradients, and how near two runs have to be."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from conftest import missing, require, same_bits

torch = require("torch")
if tuple(torch.__version__.split("+")[0].split(".")[:2]) != ("2", "13"):
    missing(f"torch {torch.__version__} is installed; the behaviour tested is that of 2.13")
ours = importlib.import_module("fused_adam.torch")

SHAPES = [(3, 5), (17,), (), (2, 3, 4), (0, 2)]
STEPS = 6
# One of each class with all its states, for what does not depend on the rest.
FULL: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
]
full = pytest.mark.parametrize(("name", "kwargs"), FULL, ids=[name for name, _ in FULL])


def parameters(dtype: Any = None, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float64
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give(params: list[Any], seed: int, absent: tuple[int, ...] = ()) -> None:
    """The same gradients for the same seed."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for k, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if k in absent else g


def close(a: list[Any], b: list[Any], start: list[Any], tolerance: float = 1e-9) -> None:
    """Parameters agree to a part of the way that they have moved."""
    for k, (x, y, s) in enumerate(zip(a, b, start, strict=True)):
        way = float((y.detach() - s).abs().max()) if s.numel() else 0.0
        apart = float((x.detach() - y.detach()).abs().max()) if s.numel() else 0.0
        assert apart <= tolerance * way, f"parameter {k}: {apart} apart after a way of {way}"


def same_states(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    """Two state dicts with the same keys, and the same numbers to a part of each state's largest."""
    assert a["state"].keys() == b["state"].keys()
    for key, theirs in b["state"].items():
        mine = a["state"][key]
        assert mine.keys() == theirs.keys()
        for name in theirs:
            x, y = mine[name], theirs[name]
            assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride(), name
            if y.numel():
                assert float((x - y).abs().max()) <= tolerance * float(y.abs().max()), name


def snapshot(opt: Any) -> list[Any]:
    """Copies of all that a step writes."""
    params = [p for group in opt.param_groups for p in group["params"]]
    states = [s for p in params for s in opt.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params, *states)]


def refuses(opt: Any, kind: type[Exception], message: str) -> None:
    """The next step raises, and changes nothing."""
    before = snapshot(opt)
    with pytest.raises(kind, match=message):
        opt.step()
    after = snapshot(opt)
    assert len(before) == len(after) and all(map(same_bits, before, after))


def one(shape: tuple[int, ...] = (4, 3), **kwargs: Any) -> tuple[Any, Any, Any]:
    """A parameter with a gradient in ours and in torch's optimizer, stepped once."""
    a = torch.nn.Parameter(torch.arange(float(np.prod(shape))).reshape(shape) / 7)
    b = torch.nn.Parameter(a.detach().clone())
    pair = ours.AdamW([a], lr=0.1, **kwargs), torch.optim.AdamW([b], lr=0.1, **kwargs)
    for p, opt in zip((a, b), pair, strict=True):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(shape)
        opt.step()
    return a, b, pair


def image(memory_format: Any) -> Any:
    return torch.linspace(-1, 1, 120).reshape(2, 3, 4, 5).to(memory_format=memory_format)
