"""State dicts: gathered from the shards of all ranks, and cut up for them again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_adam import _checks, _int8, _state_dict
from fused_adam._arrays import Array
from fused_adam._base import Optimizer
from fused_adam._memory import on_host
from fused_adam._part import SCALES, Part
from fused_adam.backends import DeferredInterrupt
from fused_adam.distributed._agree import agree, exchange

if TYPE_CHECKING:
    from fused_adam.distributed._sharded import Sharded


def interval(key: str, start: int, stop: int) -> tuple[int, int]:
    """Where elements [start, stop) of a parameter are in its array `key`: scales are two for a block of 64."""
    return (start // 32, start // 32 + 2 * _int8.blocks(stop - start)) if key == SCALES else (start, stop)


def gathered(sharded: Sharded) -> dict[str, Any]:
    """See `Sharded.state_dict`."""
    model, plan, collective = sharded._model, sharded._plan, sharded.collective
    error: Exception | None = None
    lines: list[str] = []
    try:
        lines = [f"t = {sharded.t}", *model.hyperparameters()]
        prototype = model.prototype.state_dict()
    except Exception as wrong:
        error = wrong
    agree(collective, "made a state dict", lines, error)
    state: list[dict[str, Array]] = []
    for size, found in zip(model.sizes, prototype["state"], strict=True):
        state.append({key: np.zeros(interval(key, 0, size)[1], a.dtype) for key, a in found.items()})
    for k in range(plan.buckets):
        mine = sharded._pipeline.shards[k].optimizer.state_dict()["state"] if k in sharded._pipeline.shards else []
        data = b"".join(a.tobytes() for found in mine for a in found.values())
        for rank, theirs in enumerate(exchange(collective, data)):
            at = 0
            for piece in plan.pieces(*plan.owned(k, rank)):
                for key, whole in state[piece.number].items():
                    lo, hi = interval(key, piece.start, piece.stop)
                    whole[lo:hi] = np.frombuffer(theirs, whole.dtype, hi - lo, at)
                    at += (hi - lo) * whole.itemsize
    for shape, found in zip(model.shapes, state, strict=True):
        for key in found.keys() - {SCALES}:
            found[key] = found[key].reshape(shape)
    return {**prototype, "state": state}


def load(sharded: Sharded, d: Mapping[str, Any]) -> None:
    """See `Sharded.load_state_dict`."""
    error: Exception | None = None
    writes: list[_state_dict.Write] = []
    lines: list[str] = []
    try:
        writes = _writes(sharded, d)
        lines = [f"t = {d['t']}", f"hyperparameters {d['param_groups']}"]
    except Exception as wrong:
        error = wrong
    agree(sharded.collective, "loaded the state dict", lines, error)
    with DeferredInterrupt():
        for write, arguments in writes:
            write(*arguments)


def _writes(sharded: Sharded, d: Mapping[str, Any]) -> list[_state_dict.Write]:
    """The calls that put a state dict back; nothing in them fails. Raises TypeError or ValueError."""
    model = sharded._model
    _checks.same_keys("state_dict", d, ("format", "optimizer", "t", "param_groups", "state"))
    if d["format"] != _state_dict.FORMAT:
        raise ValueError(f"state_dict has format {d['format']!r}; this version reads {_state_dict.FORMAT}")
    t, last = _state_dict.checked_numbers(model.prototype, d, "state_dict")
    if not isinstance(d["state"], list | tuple) or len(d["state"]) != len(model.sizes):
        raise ValueError(f'state_dict["state"] should be a list of {len(model.sizes)}, got {_checks.kind(d["state"])}')
    state: list[dict[str, Array]] = []
    for number, (given, shape) in enumerate(zip(d["state"], model.shapes, strict=True)):
        name = f'state_dict["state"][{number}]'
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} should be a dict, got {_checks.kind(given)}")
        found = {key: on_host(a) for key, a in given.items()}
        for key, a in found.items():
            expected = (interval(SCALES, 0, math.prod(shape))[1],) if key == SCALES else shape
            if np.shape(a) != expected:
                raise ValueError(f'{name}["{key}"] has shape {np.shape(a)}; expected {expected}')
        state.append({key: np.asarray(a).reshape(-1) for key, a in found.items()})
    for number, part, j in _numbered(model.prototype):  # which has no elements, but all names and dtypes
        none = {key: a[:0] for key, a in state[number].items()}
        part.writes(j, f'state_dict["state"][{number}]', none, t)
    writes: list[_state_dict.Write] = []
    for shard in sharded._pipeline.shards.values():
        for piece, (_, part, j) in zip(shard.pieces, _numbered(shard.optimizer), strict=True):
            own = {key: a[slice(*interval(key, piece.start, piece.stop))] for key, a in state[piece.number].items()}
            writes += part.writes(j, f'state_dict["state"][{piece.number}]', own, t)
    return writes + last


def _numbered(optimizer: Optimizer) -> list[tuple[int, Part, int]]:
    """Of each parameter its number, its part, and its place there."""
    places = [(optimizer._parts[n], j) for index in optimizer._index for n, j in index]
    return [(number, part, j) for number, (part, j) in enumerate(places)]
