"""The parameters of an optimizer that have gradients, and the states they are stepped with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fused_adam import _formats
from fused_adam._arrays import BLOCK
from fused_adam._codegen import Rule
from fused_adam._formats import Storage
from fused_adam._storage import Format
from fused_adam._update import Update
from fused_adam.torch import _kept, _tensors
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
    """What parameters have in common that take the same rule and coefficients.

    device: None for host memory. dtype: what is computed in. form: how they are kept, if in anything else.
    """

    device: int | None
    group: int
    dtype: np.dtype[Any]
    t: int
    form: Format | None


class Member(NamedTuple):
    """A parameter that has a gradient.

    at: its canonical index. states: what is kept of it, in the order of a row of memory. new: those of them, by torch's
    names, that the optimizer does not hold yet.
    """

    name: str
    part: Part
    p: Tensor
    at: int
    states: list[Tensor]
    new: dict[str, Tensor]


class Found(NamedTuple):
    """A parameter that has a gradient, and what is kept of it. held: all that torch has of it."""

    name: str
    part: Part
    p: Tensor
    at: int
    states: dict[str, Tensor]
    held: Mapping[str, Any]


def members_of(
    groups: Groups,
    state: State,
    updates: Sequence[Update],
    family: Family,
    initial: Callable[[Tensor], complex],
    flat: Flat | None,
    storage: Storage,
) -> list[Member]:
    """Checked, with what is missing made; see `Binding` for the arguments and what it raises."""
    members = _placed([*_found(groups, state, updates, family, initial, storage)], flat)
    _refuse_shared(members)
    return members


def canonical(groups: Groups) -> dict[Tensor, int]:
    """Where each parameter starts if all lie behind each other, from a multiple of 128 on."""
    found: dict[Tensor, int] = {}
    at = 0
    for group in groups:
        for p in group["params"]:
            found[p] = at
            at += -(-p.numel() // BLOCK) * BLOCK
    return found


def _found(
    groups: Groups,
    state: State,
    updates: Sequence[Update],
    family: Family,
    initial: Callable[[Tensor], complex],
    storage: Storage,
) -> Iterator[Found]:
    places = canonical(groups)
    for k, (group, update) in enumerate(zip(groups, updates, strict=True)):
        called = [family.states[s] for s in update.rule.states]
        for j, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = f"params[{k}][{j}]"
            if "param_names" in group:
                name = f"{name} ({group['param_names'][j]})"
            _tensors.check_parameter(name, p)
            held = {key: s for key, s in state.get(p, {}).items() if s is not None}
            form = _form(name, storage, p, held, update.rule, called)
            wanted = _kept.dtypes(form, update.rule, family.states, p)
            # A master starts from its parameter whenever there is none.
            missing = [s for s in (*wanted, *("step",) * family.counted) if s not in held and s not in _kept.MASTERS]
            if held and missing and family.counted:
                raise ValueError(
                    f"the state of {name} has no {missing[0]!r}, only {[*held]}; load one that is complete"
                )
            states = {
                s: _tensors.state(f"{s!r} of {name}", held[s], p, dtype, _kept.shape(s, p), s.endswith(_kept.CODES))
                if s in held
                else _kept.first(s, dtype, p, initial(p))
                for s, dtype in wanted.items()
            }
            t = int(not missing)
            if family.counted:
                t = _tensors.steps(f"'step' of {name}", held["step"]) if held else 0
            dtype = np.dtype(np.float64 if _tensors.KINDS[p.dtype] == "float64" else np.float32)
            yield Found(name, Part(_tensors.device(p), k, dtype, t, form), p, places[p], states, held)


def _form(
    name: str, storage: Storage, p: Tensor, held: Mapping[str, Any], rule: Rule, called: Sequence[str]
) -> Format | None:
    """How a parameter is kept. Raises ValueError if that is not offered."""
    form = _kept.form_of(storage, p, held, called)
    if form is None:
        return None
    _formats.refuse_rule(rule, form, name)
    _formats.refuse_gradient(form, f"the gradient of {name}")
    if _tensors.is_spread(p) and (form.states == "int8" or form.stochastic_rounding):
        raise ValueError(
            f"{name} is a DTensor, of which this process does not know the canonical index that dither and stochastic "
            "rounding go by; use states of float32 or bfloat16, and leave stochastic_rounding out"
        )
    return form


def _placed(found: list[Found], flat: Flat | None) -> list[Member]:
    """With the states of the flat layout moved to their places."""
    for called in dict.fromkeys(called for f in found for called in f.states):
        if flat is None or called == _kept.SCALES:
            continue
        if placed := [f for f in found if f.p in flat and called in f.states]:
            there = flat.states(called, [(f.p, f.states[called]) for f in placed])
            for f, s in zip(placed, there, strict=True):
                f.states[called] = s
    members = []
    for f in found:
        new = {called: s for called, s in f.states.items() if s is not f.held.get(called)}
        members.append(Member(f.name, f.part, f.p, f.at, [*f.states.values()], new))
    return members


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
