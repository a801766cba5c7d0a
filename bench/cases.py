"""Our steps and the memory roof, and the candidates that the speed targets of `ratios` are about."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, cycle
from typing import Any

import numpy as np
import numpy.typing as npt

import fused_adam
from fused_adam.cli.tasks import RULES

from .peers import textbook, torch_optimizer
from .problem import HYPER as HYPERS
from .problem import Candidate as Candidate
from .problem import Problem as Problem
from .problem import Skipped, bytes_per_parameter
from .problem import missing as missing
from .timing import Call

HYPER = HYPERS["adamw"]
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare() -> None:
    """Load the libraries in the order, and with the threads, that make a fair race.

    torch comes first: it then has an OpenMP runtime of its own with its own defaults; loaded after Numba it
    would silently share Numba's. A step of ours comes next, so that Numba's pool starts as it does for users.
    """
    if not missing("torch"):
        import torch

        torch.set_num_threads(THREADS)
    if not missing("numba"):
        ours("numba")(Problem(2**20))()


def roof(x: Problem) -> Call:
    """The stream of a rule with two states; for another, of as many elements as make its bytes."""
    from ._roof import stream

    n = x.n * bytes_per_parameter(x.rule, x.dtype.name) // (7 * x.dtype.itemsize)
    arrays = [buffer.data[:n] for buffer in (x.params, x.grads, *x.states.values())]
    if len(arrays) != 4:
        arrays = [np.ones(n, x.dtype) for _ in range(4)]
    p, g, m, v = arrays
    return lambda: stream(p, g, m, v)


def gpu_roof(x: Problem) -> Call:
    """The same kernel around the least arithmetic."""
    if len(x.states) != 2:
        raise Skipped("on a GPU it is measured for rules with two states")
    from .gpu import rules

    make: Any = rules.roof
    opt = make(x.params, backend="cupy")
    return lambda: opt.step(x.grads)


def ours(backend: str) -> Callable[[Problem], Call]:
    """fused_adam's step, all checks included: the function where there is one and one parameter in host memory to take
    it, else the class over a flat buffer.
    """

    def build(x: Problem) -> Call:
        function = {"adam": fused_adam.adam_step, "adamw": fused_adam.adamw_step}.get(x.rule)
        if function is None or x.tensors > 1 or x.on_gpu:
            return _class(x, x.params, [x.grads], backend)
        t = count(1)
        return lambda: function(x.p, x.g, x.m, x.v, step=next(t), backend=backend, **x.hyper)

    return build


def ours_list(backend: str) -> Callable[[Problem], Call]:
    """The class over a list of arrays. Training code hands over a new list of new arrays each step, so nothing may be
    remembered about them; views made beforehand are that, without timing how they are made.
    """
    return lambda x: _class(x, list(x.params.tree), [[g[:] for g in x.grads.tree] for _ in range(8)], backend)


def _class(x: Problem, params: Any, grads: Sequence[Any], backend: str) -> Call:
    """With states of its own, of the problem's values, and the gradients in turn."""
    opt = RULES[x.rule](params, backend=backend, **x.hyper)
    saved = opt.state_dict()
    for name in x.states:
        for state, values in zip(saved["state"], x.host(name), strict=True):
            state[name][...] = values
    opt.load_state_dict(saved)
    turns = cycle(grads)
    return lambda: opt.step(next(turns))


def candidates(backend: str, tensors: int, on_gpu: bool) -> list[Candidate]:
    """A backend's: over a flat buffer, and over a list where there is more than one parameter."""
    needs = ("numba",) if backend == "numba" else ()
    # one launch per rule is the package's first promise; tests/test_cupy.py counts them
    make = partial(Candidate, needs=needs, kind="ours", backend=backend, launches=1 if on_gpu else None)
    found = [make(f"fused_adam {backend}", ours(backend), graph=ours(backend) if backend == "cupy" else None)]
    return found + ([make(f"fused_adam {backend} list", ours_list(backend))] if tensors > 1 else [])


ROOF = Candidate("memory roof", roof, ("numba",), kind="roof")
GPU_ROOF = Candidate("memory roof", gpu_roof, kind="roof", graph=gpu_roof, launches=1)
NUMBA, NUMPY = (candidates(backend, 1, on_gpu=False)[0] for backend in ("numba", "numpy"))
TORCH_FUSED = Candidate("torch fused", torch_optimizer(fused=True), ("torch",))
TEXTBOOK = Candidate("textbook NumPy", textbook)


def splats() -> dict[str, Call]:
    """Adam over 10^6 rows of 59 numbers, as 3D Gaussian splatting has them: all, and the tenth of them that is seen."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal((10**6, 59), dtype=np.float32)
    g = p * np.float32(1e-3)
    seen = rng.random(len(p)) < 0.1
    rows = np.flatnonzero(seen)
    lazy = fused_adam.SparseGrad(rows, g[rows], lazy=True)
    opt = fused_adam.Adam(p, backend="numba")
    return {
        "all rows": lambda: opt.step(g),
        "a tenth, masked": lambda: opt.step(g, mask=seen),
        "a tenth, lazy": lambda: opt.step(lazy),
    }


def clipping(n: int) -> dict[str, Call]:
    """AdamW of one parameter whose gradient is clipped to a global norm: ours in the step, PyTorch's before it."""
    import torch

    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(n, dtype=np.float32) * np.float32(1e-3) for _ in range(2))
    plain, clipped = (fused_adam.AdamW(p.copy(), **HYPER, max_grad_norm=most) for most in (None, 1e-2))
    tensor = torch.nn.Parameter(torch.from_numpy(p))
    tensor.grad = torch.from_numpy(g.copy())
    by_torch = torch.optim.AdamW([tensor], fused=True, **HYPER)

    def step_torch() -> None:
        torch.nn.utils.clip_grad_norm_([tensor], 1e-2)
        by_torch.step()

    return {
        "fused_adam": lambda: plain.step(g),
        "fused_adam clip": lambda: clipped.step(g),
        "torch clip": step_torch,
    }


def many(shapes: Sequence[int]) -> dict[str, Call]:
    """One AdamW over many small parameters: ours flat, ours as a list, torch fused."""
    import torch

    rng = np.random.default_rng(0)

    def draw() -> list[npt.NDArray[np.float32]]:
        return [rng.standard_normal(n, dtype=np.float32) * np.float32(1e-3) for n in shapes]

    params, grads = draw(), draw()
    by_list = fused_adam.AdamW(params, **HYPER)

    flat = fused_adam.flatten(draw())
    by_flat = fused_adam.AdamW(flat, **HYPER)
    flat_grads = flat.zeros_like()
    flat_grads.data[:] = 1e-3

    tensors = [torch.nn.Parameter(torch.from_numpy(x)) for x in draw()]
    for tensor, g in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(g)
    by_torch = torch.optim.AdamW(tensors, fused=True, **HYPER)

    # Training code hands over a new list of new arrays each step, so nothing may be remembered about them.
    # Views made beforehand are that, without timing how they are made.
    fresh = cycle([[g[:] for g in grads] for _ in range(8)])

    return {
        "fused_adam flat": lambda: by_flat.step(flat_grads),
        "fused_adam list": lambda: by_list.step(next(fresh)),
        "torch fused": by_torch.step,
    }


def dropin(shapes: Sequence[int]) -> dict[str, Call]:
    """AdamW over tensors of PyTorch's: its own, fused, and ours in both layouts, each with tensors of its own."""
    import torch

    import fused_adam.torch

    def step(cls: Any, **options: Any) -> Call:
        rng = np.random.default_rng(0)
        values = [torch.from_numpy(rng.standard_normal(n, dtype=np.float32)) for n in shapes]
        params = [torch.nn.Parameter(value.clone()) for value in values]
        opt = cls(params, **HYPER, **options)
        for p, value in zip(params, values, strict=True):
            if p.grad is None:
                p.grad = 1e-3 * value
            else:
                p.grad.copy_(1e-3 * value)
        run: Call = opt.step
        return run

    return {
        "fused_adam.torch": step(fused_adam.torch.AdamW),
        "its flat layout": step(fused_adam.torch.AdamW, flat=True),
        "torch fused": step(torch.optim.AdamW, fused=True),
    }
