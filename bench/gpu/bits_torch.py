"""`fused_adam.torch` on a GPU: byte for byte its steps in host memory; captured steps; what a step costs the host."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import Library, same
from .bits_api import Row
from .worker import Skipped

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "max_grad_norm": 0.5, "skip_nonfinite": True},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
}
SHAPES = [(1000, 257), (1,), (0, 3), (129,), (300_001,), (8, 3, 5, 5)]
STEPS = 5
REPLAYS = 200
# Tensors and elements of each, to measure the host's part of a step.
MANY = (1000, 256)


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise Skipped("PyTorch is not installed")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Skipped("PyTorch finds no GPU")
    return torch


def there(t: Any) -> Any:
    """A tensor on the GPU."""
    return t.cuda()


def _draw(torch: Any, dtype: Any, seed: int, put: Callable[[Any], Any]) -> list[Any]:
    rng = np.random.default_rng(seed)
    drawn = [torch.from_numpy(np.asarray(rng.normal(size=shape), dtype)) for shape in SHAPES]
    drawn[-1] = drawn[-1].to(memory_format=torch.channels_last)
    return [put(t) for t in drawn]


def _here(t: Any) -> Any:
    return t


def _step(torch: Any, opt: Any, params: list[Any], dtype: Any, seed: int, put: Callable[[Any], Any]) -> None:
    for p, g in zip(params, _draw(torch, dtype, seed, put), strict=True):
        if p.grad is None:
            p.grad = g
        else:  # of the flat layout, or of a graph
            p.grad.copy_(g)
    opt.step()


def _compare(what: str, params: list[Any], opt: Any, wanted: list[Any], expected: Any) -> None:
    for k, (p, q) in enumerate(zip(params, wanted, strict=True)):
        same(f"{what}: parameter {k}", p.detach().cpu().numpy(), q.detach().numpy())
    mine, theirs = opt.state_dict()["state"], expected.state_dict()["state"]
    for k, states in theirs.items():
        for name, s in states.items():
            same(f"{what}: {name} of parameter {k}", mine[k][name].cpu().numpy(), s.numpy())


def _pair(torch: Any, name: str, dtype: Any, **options: Any) -> tuple[list[Any], Any, list[Any], Any]:
    ours = importlib.import_module("fused_adam.torch")
    params = [torch.nn.Parameter(t) for t in _draw(torch, dtype, 0, there)]
    wanted = [torch.nn.Parameter(t) for t in _draw(torch, dtype, 0, _here)]
    opt = getattr(ours, name)(params, **CLASSES[name], **options)
    return params, opt, wanted, getattr(ours, name)(wanted, **CLASSES[name], backend="numpy")


def class_case(lib: Library, backend: str, name: str, dtype: Any) -> None:
    """Steps of a class in both layouts."""
    torch = _torch()
    for flat in (False, True):
        params, opt, wanted, expected = _pair(torch, name, dtype, flat=flat, backend=backend)
        for n in range(1, STEPS + 1):
            _step(torch, opt, params, dtype, n, there)
            _step(torch, expected, wanted, dtype, n, _here)
        _compare("flat" if flat else "in place", params, opt, wanted, expected)


def replay_case(lib: Library, backend: str, dtype: Any) -> None:
    """A step captured by PyTorch, replayed with a schedule of learning rates."""
    torch = _torch()
    if backend != "cupy":
        raise Skipped("only CuPy keeps scalars on the device")
    params, opt, wanted, expected = _pair(torch, "AdamW", dtype, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for n in (1, 2):
            _step(torch, opt, params, dtype, n, there)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for n in (1, 2):
        _step(torch, expected, wanted, dtype, n, _here)
    for n in range(REPLAYS):
        for one in (opt, expected):
            one.param_groups[0]["lr"] = 0.01 / (1 + n)
        opt.prepare()
        for p, g in zip(params, _draw(torch, dtype, 3 + n % 3, there), strict=True):
            p.grad.copy_(g)
        graph.replay()
        _step(torch, expected, wanted, dtype, 3 + n % 3, _here)
    _compare(f"after {REPLAYS} replays", params, opt, wanted, expected)


def host_case(lib: Library, backend: str) -> dict[str, Any]:
    """The time in which a step over many small tensors returns, beside PyTorch's."""
    torch = _torch()
    ours = importlib.import_module("fused_adam.torch")
    count, n = MANY

    def stepped(make: Callable[[list[Any]], Any]) -> Any:
        params = [torch.nn.Parameter(there(torch.zeros(n))) for _ in range(count)]
        opt = make(params)
        for p in params:
            if p.grad is None:
                p.grad = there(torch.ones(n))
        return opt

    opts = {
        "in place": stepped(lambda params: ours.AdamW(params, backend=backend)),
        "flat": stepped(lambda params: ours.AdamW(params, backend=backend, flat=True)),
        "torch fused": stepped(lambda params: torch.optim.AdamW(params, fused=True)),
    }
    took: dict[str, list[float]] = {name: [] for name in opts}
    for _ in range(50):
        for name, opt in opts.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            opt.step()
            took[name].append(1e6 * (time.perf_counter() - start))
    medians = {name: float(np.median(times[10:])) for name, times in took.items()}
    return {"note": f"host time of {count} tensors: " + ", ".join(f"{k} {v:.0f} us" for k, v in medians.items())}


def cases(dtypes: list[Any]) -> list[Row]:
    found: list[Row] = [(f"torch {name} {t}", class_case, name, t) for name in CLASSES for t in dtypes]
    found += [(f"torch replays {t}", replay_case, t) for t in dtypes]
    return [*found, ("torch host time", host_case)]
