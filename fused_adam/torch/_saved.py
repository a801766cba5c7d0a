"""States as state dicts have them: those of a fresh optimizer, and those that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adam._codegen import Rule
from fused_adam._formats import Storage
from fused_adam._update import Update
from fused_adam.torch import _kept, _tensors
from fused_adam.torch._members import Family, Groups


class Saved(NamedTuple):
    """kind: the class of the optimizer. initial: parameter -> what its states start from."""

    kind: str
    family: Family
    storage: Storage
    initial: Callable[[Tensor], complex]

    def _wanted(self, p: Tensor, rule: Rule, held: Mapping[str, Any]) -> dict[str, torch.dtype]:
        """The dtype of all that is kept of a parameter, by torch's names."""
        form = _kept.form_of(self.storage, p, held, [self.family.states[s] for s in rule.states])
        return _kept.dtypes(form, rule, self.family.states, p)

    def first(
        self, saved_groups: Iterable[Mapping[str, Any]], groups: Groups, updates: Sequence[Update]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """What stands for no state: those before the first step, by the numbers of their parameters."""
        exact = torch.get_default_dtype() == torch.float64
        step = torch.zeros((), dtype=torch.float64 if exact else torch.float32)
        for saved, group, update in zip(saved_groups, groups, updates, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                wanted = self._wanted(p, update.rule, {})
                if p.requires_grad and (wanted or self.family.counted):
                    states = {called: _kept.first(called, d, p, self.initial(p)) for called, d in wanted.items()}
                    if self.family.counted:
                        yield key, {"step": step, **states}
                    else:
                        yield key, {called: s if called in _kept.MASTERS else -s for called, s in states.items()}

    def loaded(self, name: str, saved: Mapping[str, Any], p: Tensor, rule: Rule, at: int) -> dict[str, Any]:
        """A copy of one parameter's state, as it is to be kept.

        Args:
            name: by which messages call it. at: the parameter's canonical index.

        Raises:
            TypeError, ValueError: it does not fit.
        """
        t = 0
        if self.family.counted and saved:
            needed = [self.family.states[s] for s in rule.states]
            for called in ("step", *needed):
                if called not in saved and called + _kept.CODES not in saved:
                    raise ValueError(f"{name} has no {called!r}, only {[*saved]}; load a state of {self.kind}")
            t = _tensors.steps(f'{name}["step"]', saved["step"])
        state = {}
        for called, value in saved.items():
            if called in _kept.beside(self.family.states) and isinstance(value, Tensor):
                _tensors.fits(f'{name}["{called}"]', value, p, _kept.shape(called, p))
                coded = called.endswith(_kept.CODES)
                if coded and value.stride() != p.stride():
                    raise ValueError(f'{name}["{called}"] is not in the memory order of its parameter, as blocks are')
                plain = coded or called == _kept.SCALES or not _tensors.is_dense(p)
                state[called] = value.detach().to(p.device, copy=True) if plain else _tensors.in_order_of(value, p)
            else:
                state[called] = deepcopy(value)
        if p.dtype not in _tensors.KINDS or not _tensors.is_dense(p):
            return state
        if self.family.counted and t == 0:  # what a fresh optimizer saves; its parameter may get other numbers yet
            state = {called: s for called, s in state.items() if called not in _kept.MASTERS}
        return _kept.converted(name, state, self._wanted(p, rule, state), self.family.states, p, at, t)


def is_first(state: Mapping[str, Any]) -> bool:
    """Whether every number is -0.0: a momentum that is zero, and not because gradients were."""
    states = [s for called, s in state.items() if isinstance(s, Tensor) and called not in _kept.MASTERS]
    tensors = [torch.view_as_real(s) if s.is_complex() else s for s in states]
    return not any(s.any() or not s.signbit().all() for s in tensors)
