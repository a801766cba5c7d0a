"""What the tests of refusals share: a call must raise, name what is wrong, and leave every byte as it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


def owner(a: Any) -> Any:
    """The array that owns the memory of `a`: a write beside the view must be seen too."""
    while isinstance(getattr(a, "base", None), np.ndarray):
        a = a.base
    return a


def memory(things: Any) -> list[Any]:
    """Every byte of arrays and optimizers in nested dicts, lists and tuples, as something to compare."""
    if isinstance(things, dict):
        things = list(things.values())
    if isinstance(things, list | tuple):
        return [memory(thing) for thing in things]
    if hasattr(things, "state_dict"):
        d = things.state_dict()
        hyper = repr([{k: v for k, v in group.items() if k != "params"} for group in things.param_groups])
        return [d["t"], hyper, memory([list(state.values()) for state in d["state"]])]
    return [owner(things).tobytes()] if isinstance(things, np.ndarray) else [type(things)]


@contextlib.contextmanager
def refused(match: str, *things: Any, errors: Any = (TypeError, ValueError)) -> Iterator[None]:
    """The block raises with `match` somewhere in the message, and none of `things` changes."""
    before = memory(things)
    with pytest.raises(errors) as caught:
        yield
    assert re.search(match, str(caught.value)), f"{str(caught.value)!r} does not say {match!r}"
    assert memory(things) == before, "something was written before it was refused"


def random(seed: int, *shapes: Any, dtype: Any = np.float32) -> list[np.ndarray]:
    """Arrays with standard normal values; the moments of Adam are to be made positive by the caller."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def adam_arrays(seed: int, shape: Any = 10, dtype: Any = np.float32, max_v: bool = False) -> dict[str, np.ndarray]:
    """p, g, m, v (and max_v) as adam_step takes them."""
    names = ("p", "g", "m", "v", "max_v")[: 5 if max_v else 4]
    arrays = dict(zip(names, random(seed, *[shape] * len(names), dtype=dtype), strict=True))
    return {name: np.asarray(np.abs(a)) if "v" in name else a for name, a in arrays.items()}


def misaligned(a: np.ndarray, offset: int = 1) -> np.ndarray:
    """A copy of `a` that starts `offset` bytes past an aligned address."""
    raw = np.zeros(a.nbytes + offset + 8, np.uint8)
    view = raw[offset : offset + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view
