"""Byte for byte what NumPy gives, through the public names: classes, layouts, groups, states, long runs, no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fused_adam

from . import rules
from .arrays import Library, same
from .worker import Different

Row = tuple[Any, ...]  # a case: its name, its function and what that takes after the library and the backend

_OWN: Any = rules.clipped
CLASSES: dict[str, Callable[..., Any]] = {
    "SGD": lambda p, **k: fused_adam.SGD(p, lr=0.1, **k),
    "momentum": lambda p, **k: fused_adam.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, maximize=True, **k),
    "Adagrad": lambda p, **k: fused_adam.Adagrad(p, initial_accumulator_value=0.1, **k),
    "RMSprop": lambda p, **k: fused_adam.RMSprop(p, centered=True, momentum=0.5, **k),
    "Adam": lambda p, **k: fused_adam.Adam(p, amsgrad=True, **k),
    "AdamW": lambda p, **k: fused_adam.AdamW(p, **k),
    "Lion": lambda p, **k: fused_adam.Lion(p, weight_decay=0.1, **k),
    "own rule": lambda p, **k: _OWN(p, c=0.1, lr=0.01, most=0.5, eps=1e-8, **k),
}
LAYOUTS = ("arrays", "flat", "flat, loose gradients", "list")
_SHAPES: dict[str, tuple[int, ...]] = {
    "W1": (10, 13), "b1": (13,), "empty": (0, 3), "W2": (64, 128), "long": (50_001,), "one": (1,)
}  # fmt: skip
_LARGE = 2**48  # elements that no GPU has room for


def _tree(dtype: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in _SHAPES.items()}


def _put(lib: Library, tree: dict[str, Any]) -> dict[str, Any]:
    return {name: lib.put(a) for name, a in tree.items()}


def _same_states(what: str, ours: Any, expected: Any) -> None:
    for k, (mine, theirs) in enumerate(zip(ours.state_dict()["state"], expected.state_dict()["state"], strict=True)):
        for name in theirs:
            same(f"{what}: {name} of parameter {k}", mine[name], theirs[name])


def class_case(lib: Library, backend: str, name: str, dtype: Any) -> None:
    """Three steps of a class in every layout."""
    make = CLASSES[name]
    for layout in LAYOUTS:
        host = _tree(dtype, 0)
        device: Any = _put(lib, host)
        params = fused_adam.flatten(device) if layout.startswith("flat") else device
        aslist = list if layout == "list" else dict
        ours, expected = make(_as(aslist, params), backend=backend), make(_as(aslist, host), backend="numpy")
        flat = params.zeros_like() if layout == "flat" else None
        for step in range(1, 4):
            gradients = _tree(dtype, step)
            given: Any = _put(lib, gradients)
            if flat is not None:
                for key, g in given.items():
                    lib.copy(flat[key], g)
            ours.step(_as(aslist, given) if flat is None else flat)
            expected.step(_as(aslist, gradients))
        for key, a in host.items():
            same(f"{layout}: {key}", lib.get(params[key]), a)
        _same_states(layout, ours, expected)


def _as(kind: type, tree: Any) -> Any:
    return list(tree.values()) if kind is list else tree


def steps_case(lib: Library, backend: str, dtype: Any, steps: int) -> None:
    """A long run: the bias corrections, and every state that rounding can reach."""
    host = _tree(dtype, 0)
    device = _put(lib, host)
    ours, expected = fused_adam.AdamW(device, backend=backend), fused_adam.AdamW(host, backend="numpy")
    gradients = [_tree(dtype, seed) for seed in range(1, 5)]
    given = [_put(lib, tree) for tree in gradients]
    for step in range(steps):
        ours.step(given[step % 4])
        expected.step(gradients[step % 4])
    for key, a in host.items():
        same(f"{key} after {steps} steps", lib.get(device[key]), a)
    _same_states(f"after {steps} steps", ours, expected)


def kinds_case(lib: Library, backend: str) -> None:
    """Groups of other hyperparameters, rules and dtypes in one optimizer, and an array without an axis."""
    rng = np.random.default_rng(1)
    shapes = [((300,), np.float32), ((77, 5), np.float64), ((4100,), np.float32), ((), np.float32)]

    def draw() -> list[Any]:
        return [np.asarray(rng.normal(size=shape), dtype) for shape, dtype in shapes]

    def make(a: list[Any], backend: str) -> Any:
        other = {"params": a[2:], "amsgrad": True, "weight_decay": 0.1, "maximize": True}
        return fused_adam.Adam([{"params": a[:2], "lr": 0.1}, other], backend=backend)

    host = draw()
    device = [lib.put(a) for a in host]
    ours, expected = make(device, backend), make(host, "numpy")
    for _ in range(3):
        gradients = draw()
        given = [lib.put(g) for g in gradients]
        ours.step([given[:2], given[2:]])
        expected.step([gradients[:2], gradients[2:]])
    for k, (a, b) in enumerate(zip(device, host, strict=True)):
        same(f"parameter {k}", lib.get(a), b)
    _same_states("groups", ours, expected)


def function_case(lib: Library, backend: str, dtype: Any) -> None:
    """`adam_step` on arrays on a multiple of 16 bytes, and an element later."""
    rng = np.random.default_rng(2)
    for n in (1, 77, 100_003):
        for late in (0, 1):
            host = [np.abs(rng.normal(size=n + 1)).astype(dtype) for _ in range(5)]
            device = [lib.put(a) for a in host]
            for step in (1, 2, 1000):
                for arrays, on in ((host, "numpy"), (device, backend)):
                    p, g, m, v, top = (a[late:] for a in arrays)
                    fused_adam.adamw_step(p, g, m, v, step=step, max_v=top, backend=on)
            for name, a, b in zip(("p", "g", "m", "v", "max_v"), device, host, strict=True):
                same(f"{name} of {n}, late {late}", lib.get(a), b)


def states_case(lib: Library, backend: str) -> None:
    """A run that moves from the GPU to the host and back goes on bit for bit."""
    names = ("W1", "W2", "long")
    host, moving = ({n: a for n, a in _tree(np.float32, 0).items() if n in names} for _ in range(2))
    expected = fused_adam.AdamW(host, lr=0.1, backend="numpy")
    saved = None
    for leg, on in enumerate((backend, "numpy", backend)):
        params: Any = _put(lib, moving) if on == backend else moving
        ours = fused_adam.AdamW(params, lr=0.1, backend=on)
        if saved is not None:
            ours.load_state_dict(saved)
        for step in (1, 2):
            gradients = {n: a for n, a in _tree(np.float32, 10 * leg + step).items() if n in names}
            expected.step(gradients)
            ours.step(_put(lib, gradients) if on == backend else gradients)
        saved = ours.state_dict()
        moving = {n: lib.get(a) for n, a in params.items()} if on == backend else params
    for name, a in host.items():
        same(name, moving[name], a)
    _same_states("after two moves", ours, expected)


class _Claim:
    """An array that claims more memory than there is, from the address of one that exists."""

    def __init__(self, a: Any) -> None:
        interface = a.__cuda_array_interface__
        data = (interface["data"][0], False)
        self.__cuda_array_interface__ = {
            "shape": (_LARGE,), "typestr": "<f4", "data": data, "version": 3, "strides": None, "stream": None
        }  # fmt: skip
        self._a = a


def memory_case(lib: Library, backend: str) -> dict[str, Any]:
    """Without memory for the states there is no optimizer, nothing is written, and the next one works."""
    host = np.random.default_rng(3).normal(size=2000).astype(np.float32)
    device = lib.put(host)
    p, g, rest = device[:500], device[500:1000], device[1000:]
    try:
        fused_adam.AdamW([p, _Claim(rest)], backend=backend)
    except MemoryError as error:
        message = str(error)
    else:
        raise Different(f"{_LARGE} elements of states were allocated")
    same("everything after MemoryError", lib.get(device), host)
    fused_adam.AdamW([p], backend=backend).step([g])
    fused_adam.AdamW([host[:500]], backend="numpy").step([host[500:1000]])
    same("everything after the next step", lib.get(device), host)
    return {"note": message[:200]}


_FIRST = ("AdamW", "own rule")


def first_cases(dtypes: list[Any]) -> list[Row]:
    return [
        *((f"class {name} {t}", class_case, name, t) for name in _FIRST for t in dtypes),
        *((f"1,000 steps of AdamW {t}", steps_case, t, 1000) for t in dtypes),
        *((f"adamw_step {t}", function_case, t) for t in dtypes),
        ("states to the host and back", states_case),
        ("no memory for states", memory_case),
        ("groups of several rules and dtypes", kinds_case),
    ]


def other_cases(dtypes: list[Any]) -> list[Row]:
    others = [name for name in CLASSES if name not in _FIRST]
    return [(f"class {name} {t}", class_case, name, t) for name in others for t in dtypes]
