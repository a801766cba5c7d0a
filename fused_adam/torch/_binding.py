"""What steps over an optimizer's tensors in place, for as long as their memory stays where and what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd.graph import increment_version

from fused_adam._formats import Storage
from fused_adam._guard import Settings, Stats
from fused_adam._update import Update
from fused_adam.backends import DeferredInterrupt
from fused_adam.torch import _tensors
from fused_adam.torch._flat import Flat
from fused_adam.torch._members import Family, Groups, State, members_of
from fused_adam.torch._side import sides

# The largest count up to which every one is a float32 number.
_FLOAT32_COUNTS = 2**24
_grad, _params = attrgetter("grad"), itemgetter("params")


class Binding:
    """Steps over the parameters of an optimizer that have gradients now.

    Args:
        groups, state, updates: the optimizer's, and what each group asks for.
        initial: parameter -> what its states start from.
        flat: the buffer that parameters and gradients lie in, if they do.
        settings: what happens to gradients on their way.
        storage: how parameters of 16 bits, and states, are kept.

    Attributes:
        settings: as given.

    Raises:
        TypeError, ValueError, RuntimeError: a parameter or a state cannot be stepped. Nothing is changed then.
    """

    def __init__(
        self,
        groups: Groups,
        state: State,
        updates: Sequence[Update],
        family: Family,
        initial: Callable[[Tensor], complex],
        backend: str,
        flat: Flat | None,
        settings: Settings,
        storage: Storage,
    ) -> None:
        found = members_of(groups, state, updates, family, initial, flat, storage)
        self._sides = sides(found, backend, settings, storage)
        members = [m for side in self._sides for m in side.members]
        self._members = members
        self._params = [m.p for m in members]
        self._counted = family.counted
        self.settings = settings
        self._zeroes = settings.zeroes
        self._of_sides: list[slice] = []  # which members they are
        of_parts: list[slice] = []
        for side in self._sides:
            start = self._of_sides[-1].stop if self._of_sides else 0
            self._of_sides.append(slice(start, start + len(side.members)))
            of_parts += [slice(start + s.start, start + s.stop) for s in side.slices]

        # torch's `step` tensors are elements of one array, so that one call writes them all: exactly below `_limit`.
        counts = [m.part.t for m in members]
        self._most = max(counts, default=0)
        exact = torch.get_default_dtype() == torch.float64 or self._most >= _FLOAT32_COUNTS
        self._limit = 2**53 if exact else _FLOAT32_COUNTS
        dtype = torch.float64 if exact else torch.float32
        self._steps = torch.tensor(counts, dtype=dtype, device="cpu")  # whatever the default device is
        self._shown = self._steps.numpy()
        self._shown_parts = [self._shown[s] for s in of_parts]
        self._seen = self._shown.tobytes()

        # What `current` compares.
        self._sizes = [*map(len, map(_params, groups))]
        self._all = _parameters(groups)
        self._active = [p.grad is not None for p in self._all]
        number = {p: k for k, p in enumerate(self._all)}
        self._order = [number[p] for p in self._params]
        self._updates = updates
        self._states = [update.rule.states for update in updates]
        # The states of the flat layout are views of buffers that nobody else moves.
        self._moving = [*self._params, *(s for m in members for s in m.states if flat is None or m.p not in flat)]
        memory = [*map(_tensors.local, self._moving)]
        self._spread = not all(map(is_, memory, self._moving))
        if self._spread and settings.wants_norm:
            fix = "leave it out, and clip with torch.nn.utils.clip_grad_norm_"
            raise ValueError(
                f"{settings.names}: of a DTensor's gradient this process sees no more than it holds; {fix}"
            )
        self._noticed = [*self._params, *memory[: len(members)]] if self._spread else self._params
        self._pointers = [*map(Tensor.data_ptr, memory)]
        self._layouts = _layouts(memory)
        # Types, devices, dtypes, sizes and strides of many tensors in one call; what it does not let pass may be right.
        self._same_layouts = _guard(memory)
        self._plain = _guard([p.detach() for p in memory[: len(members)]])
        # Gradients that nobody else replaces by other ones: they are known again by identity.
        self._own = flat.gradients(self._all) if flat and all(m.p in flat for m in members) else None
        self._own_here = [g for k in self._order if self._own and (g := self._own[k]) is not None]
        if self._own is not None and not self._plain(*self._own_here):  # turned, or the parameters were
            self._own, self._own_here = None, []
        self._own_pointers = [*map(Tensor.data_ptr, self._own_here)]
        self._committed = False

    def current(self, groups: Groups, state: State | None, updates: Sequence[Update]) -> list[Tensor] | None:
        """The gradients, if they belong to the same parameters, and these and their states are as they were.

        state: None if nobody else can have changed which tensors it holds.
        """
        params = _parameters(groups)
        if self._sizes != [*map(len, map(_params, groups))] or not all(map(is_, params, self._all)):
            return None
        gradients = [*map(_grad, params)]
        # Parameters that `flat` has placed, with gradients that it has made, are expected to move but not to turn.
        own = self._own is not None and all(map(is_, gradients, self._own))
        if not own and self._active != [g is not None for g in gradients]:
            return None
        if not self._committed:
            return None
        if updates is not self._updates and self._states != [update.rule.states for update in updates]:
            return None
        self._updates = updates
        if state is not None and not self._holds(state):
            return None
        if self._counted and (self._shown.tobytes() != self._seen or self._most >= self._limit):
            return None
        moving = [*map(_tensors.local, self._moving)] if self._spread else self._moving
        if [*map(Tensor.data_ptr, moving)] != self._pointers:
            return None
        if own:
            return self._own_here
        if not self._same_layouts(*moving) and _layouts(moving) != self._layouts:
            return None
        return [gradients[k] for k in self._order]

    def _holds(self, state: State) -> bool:
        """Whether the states are the very tensors that it was shown."""
        if len(state) != len(self._every) or not all(map(is_, state.values(), self._every)):
            return False
        values = _values(self._held)
        return len(values) == len(self._values) and all(map(is_, values, self._values))

    def prepare(self, updates: Sequence[Update]) -> None:
        """Compile and allocate what a step needs, and send to the device what it keeps."""
        for side in self._sides:
            side.prepare(updates)

    def step(self, state: State, updates: Sequence[Update], gradients: list[Tensor], scale: Any, found: Any) -> None:
        """One step.

        Args:
            gradients: from `current`.
            scale: what they are to be divided by.
            found: the step is skipped if it is not 0; None if it is not known.

        Raises:
            TypeError, ValueError, RuntimeError: a gradient does not fit. Nothing is changed then.
        """
        checked, pointers = self._checked(gradients)
        for side, s in zip(self._sides, self._of_sides, strict=True):
            side.ready(pointers[s], updates)
        first = not self._committed
        if first:
            self.prepare(updates)
        with DeferredInterrupt():
            done = not first
            try:  # nothing may fail between the step and what tells of it
                if first:
                    self._commit(state)
                steps = [side.step(scale, found) for side in self._sides]
                done = all(steps)
            finally:
                if first and not done:
                    self._take_back(state)
            self._show()
            increment_version(self._noticed)  # or autograd would not notice what it saved and this step has changed
            if self._zeroes:
                for g, own in zip(gradients, checked, strict=True):
                    if own is not g:  # a copy was zeroed
                        g.detach().zero_()
                increment_version(gradients)

    def _show(self) -> None:
        """torch's `step` is what the sides have counted."""
        if self._counted:
            counts = [t for side in self._sides for t in side.t]
            for shown, t in zip(self._shown_parts, counts, strict=True):
                shown.fill(t)
            self._most = max(counts, default=0)
            self._seen = self._shown.tobytes()

    def sync(self, state: State) -> None:
        """Show what only a device knows: the count of steps, which replays of a graph and skipped steps change too."""
        if not self._committed or self._shown.tobytes() != self._seen:  # somebody has changed it since
            return
        for side in self._sides:
            side.sync()
            if side.on_device and not self._counted and not any(side.t):
                for m in side.members:  # there was no step yet
                    state[m.p].clear()
        self._show()

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads what its sides hold in device memory."""
        return any(side.captured for side in self._sides)

    def last_stats(self) -> Stats:
        """What the last step met."""
        return self._sides[0].last_stats() if self._sides else Stats(None, None, 0, None)

    def _commit(self, state: State) -> None:
        """Show torch the states."""
        self._before = [(p, state[p].copy() if p in state else None) for p in self._params]
        for m, step in zip(self._members, self._steps.unbind(), strict=True):
            new = {"step": step, **m.new} if self._counted else m.new
            if new:
                state[m.p].update(new)
        self._every = [*state.values()]
        self._held = [state[p] for p in self._params if p in state]
        self._values = _values(self._held)
        self._committed = True

    def _take_back(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """What `_commit` has shown, for there was no step."""
        self._committed = False
        for p, held in self._before:
            if held is None:
                state.pop(p, None)
            else:
                state[p].clear()
                state[p].update(held)

    def first_gradients(self) -> list[Tensor]:
        """What `current` returns, for a binding that is new."""
        return [*map(_grad, self._params)]

    def _checked(self, gradients: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """Each in the memory order of its parameter, and where it is."""
        if gradients is self._own_here or (not self._spread and self._plain(*gradients)):
            pointers = [*map(Tensor.data_ptr, gradients)]
            if gradients is self._own_here:
                right = pointers == self._own_pointers  # p.grad.data = ... is another place
            else:
                right = not self._emptied(gradients, pointers)
            if right:
                return gradients, pointers
        pairs = [*zip(self._members, gradients, strict=True)]
        checked = [_tensors.gradient(f"the gradient of {m.name}", g, m.p) for m, g in pairs]
        if self._zeroes:
            for m, g in pairs:
                _tensors.zeroable(f"the gradient of {m.name}", g)
        return checked, [*map(Tensor.data_ptr, checked)]

    def _emptied(self, gradients: list[Tensor], pointers: list[int]) -> bool:
        """Whether the memory of one was taken away, which its shape does not tell."""
        return 0 in pointers and any(g.numel() and not at for g, at in zip(gradients, pointers, strict=True))


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
