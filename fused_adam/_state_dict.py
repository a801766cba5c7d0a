"""What an optimizer needs to continue bit for bit, as plain dicts of numbers and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_adam import _checks, _numbers
from fused_adam.backends import DeferredInterrupt

if TYPE_CHECKING:
    from fused_adam._base import Optimizer

FORMAT = 1
Write = tuple[Callable[..., Any], tuple[Any, ...]]  # a call that can no longer fail


def numbers(optimizer: Optimizer) -> dict[str, Any]:
    """A state dict without its arrays."""
    groups = []
    number = 0
    for group, index in zip(optimizer.param_groups, optimizer._index, strict=True):
        groups.append({**optimizer._check(group), "params": list(range(number, number + len(index)))})
        number += len(index)
    return {"format": FORMAT, "optimizer": type(optimizer).__name__, "t": optimizer.t, "param_groups": groups}


def save(optimizer: Optimizer) -> dict[str, Any]:
    """See `Optimizer.state_dict`."""
    parts = [(optimizer._parts[k], j) for index in optimizer._index for k, j in index]
    return {**numbers(optimizer), "state": [part.saved(j) for part, j in parts]}


def load(optimizer: Optimizer, d: Mapping[str, Any]) -> None:
    """See `Optimizer.load_state_dict`. Everything is checked, and copied to the host, before anything is written."""
    _checks.same_keys("state_dict", d, ("format", "optimizer", "t", "param_groups", "state"))
    if d["format"] != FORMAT:
        raise ValueError(f"state_dict has format {d['format']!r}; this version reads {FORMAT}")
    t, last = checked_numbers(optimizer, d, "state_dict")
    parts = [(optimizer._parts[k], j) for index in optimizer._index for k, j in index]
    if not isinstance(d["state"], list | tuple) or len(d["state"]) != len(parts):
        raise ValueError(f'state_dict["state"] should be a list of {len(parts)}, got {_checks.kind(d["state"])}')
    writes: list[Write] = []
    for number, (part, j) in enumerate(parts):
        name = f'state_dict["state"][{number}]'
        writes += part.writes(j, name, d["state"][number], t)
    with DeferredInterrupt():
        for write, arguments in writes + last:
            write(*arguments)


def checked_numbers(optimizer: Optimizer, d: Mapping[str, Any], what: str) -> tuple[int, list[Write]]:
    """t, and what writes it and the hyperparameters of a state dict, which a message calls `what`.

    Raises TypeError or ValueError if they do not fit the optimizer.
    """
    if d["optimizer"] != type(optimizer).__name__:
        raise ValueError(f"{what} is of {d['optimizer']!r} but this is {type(optimizer).__name__}")
    t = _numbers.step_number(d["t"], least=0, name=f'{what}["t"]')
    groups, have = d["param_groups"], len(optimizer.param_groups)
    if not isinstance(groups, list | tuple) or len(groups) != have:
        raise ValueError(f'{what}["param_groups"] should be a list of {have}, got {_checks.kind(groups)}')
    writes: list[Write] = []
    number = 0
    for k, (index, given) in enumerate(zip(optimizer._index, groups, strict=True)):
        path = f'{what}["param_groups"][{k}]'
        if isinstance(given, Mapping):
            given = {**optimizer._later, **given}
        _checks.same_keys(path, given, (*optimizer._names, "params"))
        expected = list(range(number, number + len(index)))
        number += len(index)
        if not isinstance(given["params"], list | tuple) or list(given["params"]) != expected:
            raise ValueError(f'{path}["params"] should be {expected}, got {given["params"]!r}')
        values = optimizer._check(given)
        update = optimizer._update(values)
        update.at(t + 1)  # a rule of the user's may refuse them
        for part in (optimizer._parts[n] for n, _ in index):
            if tuple(part.states) != update.rule.states:
                raise ValueError(
                    f"{path} asks for states {update.rule.states} but this optimizer has {tuple(part.states)}"
                )
        writes.append((optimizer.param_groups[k].update, (values,)))
    if optimizer._on_device:
        upload = optimizer._runner.upload
        writes.append((lambda: upload(optimizer._updates(), wait=True), ()))
        writes.append((optimizer._stepper.set_t, (t,)))
    writes.append((np.copyto, (optimizer._t, np.array([t], np.int64))))
    return t, writes
