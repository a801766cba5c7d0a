"""Variables that come and go from one step to the next, with slots and a step count that outlast the sets they form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import AnyArray, address, order
from fused_adam._layout import FlatBuffer, Layout
from fused_adam._memory import Memory
from fused_adam._optimizer import Adam
from fused_adam._part import Part

_MOST_SETS = 16  # whose Adams are kept: enough for training that alternates; the slots are always kept


class Slots(NamedTuple):
    """Of a variable: what the caller knows it by, the array that it is, and its states, 1-D in its memory order."""

    given: Any
    array: AnyArray
    states: dict[str, FlatBuffer]


class Together(Adam):
    """The Adam of variables that come together in one call: one pass over all, checked before it writes anything.

    Args:
        variables: as numbered in the caller's pairs.
        slots: those that there are already, by the variables' ids. Attribute: those of `variables`, made if need be.
    """

    def __init__(self, variables: Mapping[int, Any], slots: Mapping[int, Slots], backend: str) -> None:
        self.key = _key(variables)
        self.slots = {id(v): slots[id(v)] for v in variables.values() if id(v) in slots}
        # nested so that messages name gradients as the caller counts them: grads_and_vars[3][0]
        super().__init__({n: [v] for n, v in variables.items()}, backend=backend, numerics="tf")

    def _path(self, group: int) -> str:
        return "grads_and_vars"

    def _allocate(self, part: Part, states: Sequence[tuple[str, float]], memory: Memory) -> None:
        """Each variable's states are buffers of their own, for it may later come with others."""
        names = [name for name, _ in states]
        for given, p in zip(part.given, part.parameters, strict=True):
            if id(given) not in self.slots:
                layout = Layout.of(given, [(p.size,)], part.dtype)
                self.slots[id(given)] = Slots(given, p, {name: FlatBuffer(layout, memory) for name in names})
        part.states = {name: _Joined([self.slots[id(v)].states[name] for v in part.given]) for name in names}
        part.row_steps = [None] * len(part.given)


Together.__name__ = "AdamOptimizer"  # what messages and state dicts call it


class _Joined(FlatBuffer):
    """The views of several buffers, as far as the states of a part need them."""

    __slots__ = ()

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self.memory = buffers[0].memory
        self.views = [view for buffer in buffers for view in buffer.views]


class _Known(NamedTuple):
    slots: dict[int, Slots]
    sets: dict[tuple[tuple[int, int], ...], Together]


class Variables:
    """Those that have come so far, in order, and for each set of them that came together what steps it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._slots: dict[int, Slots] = {}
        self._sets: dict[tuple[tuple[int, int], ...], Together] = {}

    def __iter__(self) -> Iterator[Any]:
        return (slots.given for slots in self._slots.values())

    def slot(self, var: Any, name: str) -> Any:
        """The live state in the variable's shape and memory order, or None if it has not come."""
        slots = self._slots.get(id(var))
        if slots is None:
            return None
        return slots.states[name].views[0].reshape(slots.array.shape, order=order(slots.array))

    def together(self, variables: Mapping[int, Any]) -> Together:
        """What steps these variables. Those that are new stay unknown until they are kept.

        Raises:
            TypeError, ValueError, RuntimeError: a variable is wrong, or the backend cannot run.
        """
        found = self._sets.get(_key(variables))
        if found is None:
            self._check(variables)
            found = Together(variables, self._slots, self.backend)
        return found

    def keep(self, together: Together) -> _Known:
        """From here on these variables are known. Returns what `restore` takes, should their step not be done."""
        known = _Known(self._slots, self._sets)
        if together.key not in self._sets:
            self._slots = self._slots | together.slots
            self._sets = dict([*self._sets.items()][1 - _MOST_SETS :]) | {together.key: together}
        return known

    def restore(self, known: _Known) -> None:
        self._slots, self._sets = known

    def _check(self, variables: Mapping[int, Any]) -> None:
        names = [f"grads_and_vars[{n}][1]" for n in variables]
        named = list(zip(names, variables.values(), strict=True))
        for name, v in named:
            _checks.array(name, v)  # whose slots are not kept in 16 bits
        arrays, _ = _checks.parameters(named)
        new = [id(v) not in self._slots for v in variables.values()]
        known = _checks.Extents([slots.array for slots in self._slots.values()])
        starts = np.array([address(a) for a in arrays], np.int64)
        hit = known.first_overlap(starts, np.array(new) * [a.nbytes for a in arrays])
        if hit >= 0:
            fix = "pass the same array object in every call"
            raise ValueError(f"{names[hit]} shares memory with an earlier variable; {fix}")


def _key(variables: Mapping[int, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((n, id(v)) for n, v in variables.items())
