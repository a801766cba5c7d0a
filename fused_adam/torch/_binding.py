"""A stepper bound to the memory of an optimizer's tensors, for as long as that stays where and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd.graph import increment_version

from fused_adam import _checks
from fused_adam._arrays import Array
from fused_adam._codegen import behind
from fused_adam._norm import unscaling
from fused_adam._update import Update
from fused_adam.backends import DeferredInterrupt, Placed, Rows, choose, load
from fused_adam.torch import _tensors
from fused_adam.torch._flat import Flat

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Tensor, dict[str, Any]]

# The largest count up to which every one is a float32 number.
_FLOAT32_COUNTS = 2**24
_grad, _params = attrgetter("grad"), itemgetter("params")


class Family(NamedTuple):
    """What torch calls the states of a class.

    states: the rules' names -> torch's. counted: whether torch keeps a `step` beside them; without one, a parameter is
    at its first step as long as it has no state.
    """

    states: Mapping[str, str]
    counted: bool = True


class Member(NamedTuple):
    """A parameter that has a gradient.

    part: its group, dtype and t; those that agree in it take the same rule and coefficients. states: in the order of
    the rule. new: those of them, by torch's names, that the optimizer does not hold yet.
    """

    name: str
    part: tuple[int, np.dtype[Any], int]
    p: Tensor
    states: list[Tensor]
    new: dict[str, Tensor]


class Binding:
    """Steps over the parameters of an optimizer that have gradients now.

    Args:
        groups, state, updates: the optimizer's, and what each group asks for.
        initial: parameter -> what its states start from.
        flat: the buffer that parameters and gradients lie in, if they do.

    Raises:
        TypeError, ValueError, RuntimeError: a parameter or a state cannot be stepped. Nothing is changed then.
    """

    def __init__(
        self,
        groups: Groups,
        state: State,
        updates: Sequence[Update],
        family: Family,
        initial: Callable[[Tensor], Tensor],
        backend: str,
        flat: Flat | None,
    ) -> None:
        members = list(_members(groups, state, updates, family, initial))
        members.sort(key=lambda m: (m.part[0], m.part[1].char, m.part[2]))  # a part is a run of equal ones
        self._members = members
        self._params = [m.p for m in members]
        self._counted = family.counted

        starts = [k for k, m in enumerate(members) if k == 0 or m.part != members[k - 1].part]
        self._slices = [slice(*ends) for ends in pairwise([*starts, len(members)])]
        self._parts = [members[k].part[:2] for k in starts]
        self._t = [members[k].part[2] for k in starts]
        rows = [tuple(map(_tensors.row, (m.p, *m.states))) for m in members]
        _refuse_shared(members)
        self._writes = _checks.Extents(a for row in rows for a in row)
        self._nbytes = np.array([row[0].nbytes for row in rows], np.int64)
        tables = [Rows(dtype, [], rows[s], []) for (_, dtype), s in zip(self._parts, self._slices, strict=True)]
        module = load(choose(backend, sum(row[0].size for row in rows)))
        self._stepper = module.Stepper(tables, np.zeros(1, np.int64), self._writes) if members else None

        # torch's `step` tensors are elements of one array, so that one call writes them all: exactly below `_limit`.
        counts = [m.part[2] for m in members]
        exact = torch.get_default_dtype() == torch.float64 or max(self._t, default=0) >= _FLOAT32_COUNTS
        self._limit = 2**53 if exact else _FLOAT32_COUNTS
        self._steps = torch.tensor(counts, dtype=torch.float64 if exact else torch.float32)
        self._shown = self._steps.numpy()
        self._seen = self._shown.tobytes()

        # What `current` compares.
        self._sizes = [*map(len, map(_params, groups))]
        self._all = _parameters(groups)
        self._active = [p.grad is not None for p in self._all]
        number = {p: k for k, p in enumerate(self._all)}
        self._order = [number[p] for p in self._params]
        self._states = [update.rule.states for update in updates]
        self._written = [*self._params, *(s for m in members for s in m.states)]
        self._pointers = [*map(Tensor.data_ptr, self._written)]
        self._layouts = _layouts(self._written)
        # Types, devices, dtypes, sizes and strides of many tensors in one call; what it does not let pass may be right.
        self._same_layouts = _guard(self._written)
        self._plain = _guard([p.detach() for p in self._params])
        # Gradients that nobody else replaces by other ones: they are known again by identity.
        self._fixed = flat.gradients(self._params) if flat else None
        self._accepted: list[int] = []
        self._addresses: list[Array] = []
        self._committed = False

    def current(self, groups: Groups, state: State, updates: Sequence[Update]) -> list[Tensor] | None:
        """The gradients, if they belong to the same parameters, and these and their states are as they were."""
        params = _parameters(groups)
        if self._sizes != [*map(len, map(_params, groups))] or not all(map(is_, params, self._all)):
            return None
        gradients = [*map(_grad, params)]
        if self._active != [g is not None for g in gradients]:
            return None
        if self._states != [update.rule.states for update in updates]:
            return None
        if len(state) != len(self._every) or not all(map(is_, state.values(), self._every)):
            return None
        values = _values(self._held)
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return None
        if self._counted and (self._shown.tobytes() != self._seen or max(self._t, default=0) >= self._limit):
            return None
        if [*map(Tensor.data_ptr, self._written)] != self._pointers:
            return None
        # Parameters that `flat` has placed, with gradients that it has made, are expected to move but not to turn.
        own = self._fixed
        if own is not None and len(own) == len(gradients) and all(map(is_, gradients, own)):
            return gradients
        if not self._same_layouts(*self._written) and _layouts(self._written) != self._layouts:
            return None
        return [gradients[k] for k in self._order]

    def step(
        self, state: State, updates: Sequence[Update], gradients: list[Tensor], scale: float | None = None
    ) -> None:
        """One step. gradients: from `current`. scale: what they are to be divided by.

        Raises:
            TypeError, ValueError, RuntimeError: a gradient does not fit. Nothing is changed then.
        """
        if self._stepper is None:
            self._commit(state)
            return
        gradients = self._checked(gradients)
        addresses = [*map(Tensor.data_ptr, gradients)]
        if addresses != self._accepted:
            places = np.array(addresses, np.int64)
            hit = self._writes.first_overlap(places, self._nbytes)
            if hit >= 0:
                raise _checks.overlap(f"the gradient of {self._members[hit].name}")
            self._accepted, self._addresses = addresses, [places[s] for s in self._slices]
        rules, coefficients = [], []
        for (group, dtype), t in zip(self._parts, self._t, strict=True):
            rule = updates[group].rule
            values = updates[group].at(t + 1)
            _checks.coefficients(zip(rule.coefficients, values, strict=True), dtype)
            if scale is not None:  # the coefficients of preludes stand behind those of the rule
                rule = behind(rule, ("unscale",))
                values = [*values, unscaling(scale, dtype)]
            rules.append(rule)
            coefficients.append(values)
        placed = [
            Placed(places, lambda s=s: [*map(_tensors.row, gradients[s])])  # type: ignore[misc]
            for places, s in zip(self._addresses, self._slices, strict=True)
        ]
        if not self._committed:
            self._stepper.prepare(rules, False, False)
        with DeferredInterrupt():
            if not self._committed:
                self._commit(state)
            self._stepper.step(0, rules, coefficients, placed)
            self._t = [t + 1 for t in self._t]
            if self._counted:
                for s, t in zip(self._slices, self._t, strict=True):
                    self._shown[s] = t
                self._seen = self._shown.tobytes()
            increment_version(self._params)  # or autograd would not notice what it saved and this step has changed

    def _commit(self, state: State) -> None:
        """Show torch the states: after all else that can fail."""
        for m, step in zip(self._members, self._steps.unbind(), strict=True):
            new = {"step": step, **m.new} if self._counted else m.new
            if new:
                state[m.p].update(new)
        self._every = [*state.values()]
        self._held = [state[p] for p in self._params if p in state]
        self._values = _values(self._held)
        self._committed = True

    def first_gradients(self) -> list[Tensor]:
        """What `current` returns, for a binding that is new."""
        return [*map(_grad, self._params)]

    def _checked(self, gradients: list[Tensor]) -> list[Tensor]:
        """Each in the memory order of its parameter."""
        if self._fixed is not None and all(map(is_, gradients, self._fixed)):
            return gradients
        if self._plain(*gradients):
            return gradients
        pairs = zip(self._members, gradients, strict=True)
        return [_tensors.gradient(f"the gradient of {m.name}", g, m.p) for m, g in pairs]


def _parameters(groups: Groups) -> list[Tensor]:
    return [*chain.from_iterable(map(_params, groups))]


def _values(states: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, states))]


def _guard(tensors: list[Tensor]) -> Callable[..., bool]:
    """Whether tensors are like these, all in one call: a tenth of the time that asking each takes."""
    like = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return like.check


def _layouts(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.layout, t.dtype, t.shape, t.layout is torch.strided and t.stride()) for t in tensors]


def _members(
    groups: Groups,
    state: State,
    updates: Sequence[Update],
    family: Family,
    initial: Callable[[Tensor], Tensor],
) -> Iterator[Member]:
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
            states, new = [], {}
            for called in needed:
                found = initial(p) if called in missing else held[called]
                states.append(_tensors.state(f"{called!r} of {name}", found, p))
                if states[-1] is not held.get(called):
                    new[called] = states[-1]
            t = int(not missing)
            if family.counted:
                t = _tensors.steps(f"'step' of {name}", held["step"]) if held else 0
            yield Member(name, (k, _tensors.DTYPES[p.dtype], t), p, states, new)


def _refuse_shared(members: list[Member]) -> None:
    """Raises ValueError if any two parameters or states share memory."""
    extents = sorted(
        (start := t.data_ptr(), start + t.nbytes, f"a state of {m.name}" if k else m.name)
        for m in members
        for k, t in enumerate((m.p, *m.states))
        if t.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(extents):
        if start < end:
            raise ValueError(f"{one} and {other} share memory; pass each parameter once, and no state twice")
