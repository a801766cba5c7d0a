"""What an optimizer needs to continue bit for bit, as plain dicts of numbers and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_adam import _checks, _numbers
from fused_adam._arrays import Array
from fused_adam.backends import DeferredInterrupt

if TYPE_CHECKING:
    from fused_adam._base import Optimizer

_FORMAT = 1


def save(optimizer: Optimizer) -> dict[str, Any]:
    """See `Optimizer.state_dict`."""
    state: list[dict[str, Array]] = []
    groups = []
    for group, index in zip(optimizer.param_groups, optimizer._index, strict=True):
        numbers = list(range(len(state), len(state) + len(index)))
        groups.append({**optimizer._check(group), "params": numbers})
        parts = [(optimizer._parts[k], j) for k, j in index]
        state += [part.saved(j) for part, j in parts]
    return {
        "format": _FORMAT,
        "optimizer": type(optimizer).__name__,
        "t": optimizer.t,
        "param_groups": groups,
        "state": state,
    }


def load(optimizer: Optimizer, d: Mapping[str, Any]) -> None:
    """See `Optimizer.load_state_dict`. Everything is checked, and copied to the host, before anything is written."""
    _checks.same_keys("state_dict", d, ("format", "optimizer", "t", "param_groups", "state"))
    if d["format"] != _FORMAT:
        raise ValueError(f"state_dict has format {d['format']!r}; this version reads {_FORMAT}")
    if d["optimizer"] != type(optimizer).__name__:
        raise ValueError(f"state_dict is of {d['optimizer']!r} but this is {type(optimizer).__name__}")
    t = _numbers.step_number(d["t"], least=0, name='state_dict["t"]')
    for name, have in (("param_groups", len(optimizer.param_groups)), ("state", sum(map(len, optimizer._index)))):
        if not isinstance(d[name], list | tuple) or len(d[name]) != have:
            raise ValueError(f'state_dict["{name}"] should be a list of {have}, got {_checks.kind(d[name])}')
    hyperparameters = []
    writes: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    number = 0
    for k, index in enumerate(optimizer._index):
        path = f'state_dict["param_groups"][{k}]'
        given = d["param_groups"][k]
        if isinstance(given, Mapping):
            given = {**optimizer._later, **given}
        _checks.same_keys(path, given, (*optimizer._names, "params"))
        numbers = list(range(number, number + len(index)))
        if not isinstance(given["params"], list | tuple) or list(given["params"]) != numbers:
            raise ValueError(f'{path}["params"] should be {numbers}, got {given["params"]!r}')
        hyperparameters.append(optimizer._check(given))
        update = optimizer._update(hyperparameters[-1])
        update.at(t + 1)  # a rule of the user's may refuse them
        wanted = update.rule.states
        for part, j in ((optimizer._parts[k], j) for k, j in index):
            if tuple(part.states) != wanted:
                raise ValueError(f"{path} asks for states {wanted} but this optimizer has {tuple(part.states)}")
            name = f'state_dict["state"][{number}]'
            writes += part.writes(j, name, d["state"][number], t)
            number += 1
    writes += [(g.update, (values,)) for g, values in zip(optimizer.param_groups, hyperparameters, strict=True)]
    if optimizer._on_device:
        upload = optimizer._runner.upload
        writes.append((lambda: upload(optimizer._updates(), wait=True), ()))
        writes.append((optimizer._stepper.set_t, (t,)))
    writes.append((np.copyto, (optimizer._t, np.array([t], np.int64))))
    with DeferredInterrupt():
        for write, arguments in writes:
            write(*arguments)
