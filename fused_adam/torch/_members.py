"""The parameters of an optimizer that have gradients, and the states they are stepped with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_adam._update import Update
from fused_adam.torch import _tensors
from fused_adam.torch._flat import Flat

Groups = Sequence[Mapping[str, Any]]
State = dict[Tensor, dict[str, Any]]


class Family(NamedTuple):
    """What torch calls the states of a class.

    states: the rules' names -> torch's. counted: whether torch keeps a `step` beside them; without one, a parameter is
    at its first step as long as it has no state.
    """

    states: Mapping[str, str]
    counted: bool = True


class Part(NamedTuple):
    """What parameters have in common that take the same rule and coefficients. device: None for host memory."""

    device: int | None
    group: int
    dtype: np.dtype[Any]
    t: int


class Member(NamedTuple):
    """A parameter that has a gradient.

    states: in the order of the rule. new: those of them, by torch's names, that the optimizer does not hold yet.
    """

    name: str
    part: Part
    p: Tensor
    states: list[Tensor]
    new: dict[str, Tensor]


class Found(NamedTuple):
    """A parameter that has a gradient, and those of its states that there are. held: all that torch has of it."""

    name: str
    part: Part
    p: Tensor
    states: dict[str, Tensor | None]
    held: Mapping[str, Any]


def members_of(
    groups: Groups,
    state: State,
    updates: Sequence[Update],
    family: Family,
    initial: Callable[[Tensor], complex],
    flat: Flat | None,
) -> list[Member]:
    """Checked, with the states that are missing made; see `Binding` for the arguments and what it raises."""
    members = _with_states([*_found(groups, state, updates, family)], initial, flat)
    _refuse_shared(members)
    return members


def _found(
    groups: Groups,
    state: State,
    updates: Sequence[Update],
    family: Family,
) -> Iterator[Found]:
    for k, (group, update) in enumerate(zip(groups, updates, strict=True)):
        for j, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = f"params[{k}][{j}]"
            if "param_names" in group:
                name = f"{name} ({group['param_names'][j]})"
            _tensors.check_parameter(name, p)
            held = {key: s for key, s in state.get(p, {}).items() if s is not None}
            needed = [family.states[s] for s in update.rule.states]
            missing = [s for s in (*needed, *("step",) * family.counted) if s not in held]
            if held and missing and family.counted:
                raise ValueError(
                    f"the state of {name} has no {missing[0]!r}, only {[*held]}; load one that is complete"
                )
            states = {
                called: None if called in missing else _tensors.state(f"{called!r} of {name}", held[called], p)
                for called in needed
            }
            t = int(not missing)
            if family.counted:
                t = _tensors.steps(f"'step' of {name}", held["step"]) if held else 0
            yield Found(name, Part(_tensors.device(p), k, _tensors.DTYPES[p.dtype], t), p, states, held)


def _with_states(found: list[Found], initial: Callable[[Tensor], complex], flat: Flat | None) -> list[Member]:
    """Make the states that are missing, and move those of the flat layout to their places."""
    for called in dict.fromkeys(called for f in found for called in f.states):
        some = [f for f in found if called in f.states]
        placed = [f for f in some if flat is not None and f.p in flat]
        if flat is not None and placed:
            there = flat.states(called, [(f.p, f.states[called], initial(f.p)) for f in placed])
            for f, s in zip(placed, there, strict=True):
                f.states[called] = s
        for f in some:
            if f.states[called] is None:
                f.states[called] = first(f.p, initial(f.p))
    members = []
    for f in found:
        states = {called: s for called, s in f.states.items() if s is not None}
        new = {called: s for called, s in states.items() if s is not f.held.get(called)}
        members.append(Member(f.name, f.part, f.p, [*states.values()], new))
    return members


def first(p: Tensor, value: complex) -> Tensor:
    """A state before the first step, in the memory order of its parameter."""
    return torch.full_like(p, value, memory_format=torch.preserve_format, requires_grad=False)


def _refuse_shared(members: list[Member]) -> None:
    """Raises ValueError if any two parameters or states share memory."""
    extents = sorted(
        (start := t.data_ptr(), start + t.nbytes, f"a state of {m.name}" if k else m.name)
        for m in members
        for k, t in enumerate(map(_tensors.local, (m.p, *m.states)))
        if t.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(extents):
        if start < end:
            raise ValueError(f"{one} and {other} share memory; pass each parameter once, and no state twice")
