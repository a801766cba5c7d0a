"""What the optimizer classes for torch share: the step, loading, pickling, and the flat layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import chain
from operator import is_
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim import optimizer as _torch

from fused_adam import _base, _numbers
from fused_adam._formats import Storage
from fused_adam._guard import Settings, Stats
from fused_adam._update import Update
from fused_adam.backends import check_name
from fused_adam.torch import _members, _saved
from fused_adam.torch._binding import Binding
from fused_adam.torch._flat import Flat
from fused_adam.torch._members import Family

# Arguments of torch's that are refused unless they are false.
_REFUSED = {
    "differentiable": "a fused step is not recorded by autograd",
}


class Options(TypedDict, total=False):
    """Keyword arguments of every class beside torch's; see `AdamW`."""

    flat: bool
    backend: str
    amp_scaling: bool
    skip_nonfinite: bool
    max_grad_norm: float | None
    zero_grads: bool
    count_unmoved: bool
    state_dtype: str | None
    master: str | None
    stochastic_rounding: bool
    seed: int


class FusedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step is one pass over all parameters of all groups; the base of the classes.

    The states are torch's, in ``self.state``; a `Binding` steps them in place where they are.

    Attributes:
        state: parameter -> torch's name of a state -> the tensor. Whoever has asked for it may put other tensors there
            between steps, so that from then on every step looks.
    """

    _flat_class: ClassVar[type[_base.Optimizer]]  # of this package: its rules, coefficients and checks are used
    _family: Family
    _names: ClassVar[tuple[str, ...]]  # of the hyperparameters that it takes
    _ready = False
    _step_supports_amp_scaling = False
    _backend = "auto"
    _capturable = False
    # Of the instance alone, so that wrappers which hand on what they lack, as Lightning's do, find the one of theirs.
    _bound: Binding | None
    _flat: Flat | None
    _asked_for_state: list[bool]

    def _set_up(
        self,
        flat: bool = False,
        backend: str = "auto",
        amp_scaling: bool = False,
        skip_nonfinite: bool = False,
        max_grad_norm: float | None = None,
        zero_grads: bool = False,
        count_unmoved: bool = False,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        """What constructors do once torch's have: torch sets up the groups, and raises its own errors, first."""
        self._backend = check_name(backend)
        self._step_supports_amp_scaling = _numbers.flag("amp_scaling", amp_scaling)
        self._settings = Settings.checked(skip_nonfinite, max_grad_norm, zero_grads, count_unmoved)
        self._storage = Storage.checked(master, state_dtype, stochastic_rounding, seed)
        if self._storage.stochastic_rounding:  # whose random bits depend on the step
            self._family = self._family._replace(counted=True)
        self._options = Options(
            flat=flat,
            backend=backend,
            amp_scaling=amp_scaling,
            skip_nonfinite=skip_nonfinite,
            max_grad_norm=max_grad_norm,
            zero_grads=zero_grads,
            count_unmoved=count_unmoved,
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        self._skipped = 0  # by bindings that are no more
        self._captured: list[Binding] = []  # bindings that are no more, but read by replays of CUDA graphs
        self._known: list[list[Any]] = []
        self._found: list[Update] = []
        self._updates()
        self._bound = None
        self._flat = Flat(self._parameters()) if _numbers.flag("flat", flat) else None
        self._asked_for_state = [False]  # torch's constructor has made it
        self._ready = True

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        self._asked_for_state[0] = True
        return self._state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._asked_for_state = [True]
        self._state = state

    def _parameters(self) -> Iterable[Tensor]:
        return _chained(group["params"] for group in self.param_groups)

    # --- hyperparameters --------------------------------------------------------------------------------------------

    def _class_for(self, group: Mapping[str, Any]) -> type[_base.Optimizer]:
        return self._flat_class

    def _asked(self, group: Mapping[str, Any]) -> Update:
        """The rule and coefficients of a group. Raises TypeError or ValueError."""
        for name, why in _REFUSED.items():
            if group.get(name):
                raise ValueError(f"{name}=True is not supported: {why}; leave it out, or use torch's class")
        flat_class = self._class_for(group)
        form = flat_class.__new__(flat_class)  # one without parameters, for its checks and formulas
        numbers = {**form._later, **{name: _number(group[name]) for name in self._names if name in group}}
        form._names = (*form._later, *self._names)
        return form._update(form._check(numbers))

    def _updates(self) -> list[Update]:
        """Of each group: the same list as long as all their numbers are the very objects that they were."""
        groups = self.param_groups
        values, known = [[*group.values()] for group in groups], self._known
        if [*map(len, values)] != [*map(len, known)] or not all(map(is_, _chained(values), _chained(known))):
            self._found = [self._asked(group) for group in groups]
            self._capturable = any(group.get("capturable") for group in groups)
            named = (group[name] for group in groups for name in (*self._names, *_REFUSED) if name in group)
            constant = all(map(_base._is_constant, named))
            self._known = values if constant else []
        return self._found

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, and their states, in place.

        Args:
            closure: computes the loss and the gradients anew, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError, RuntimeError: a parameter, gradient, state or hyperparameter is wrong. Nothing is
                changed then.
        """
        given = () if closure is None else (closure,)
        if torch.compiler.is_compiling():
            return self._uncompiled_step(*given)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _torch._global_optimizer_pre_hooks
            or _torch._global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return self._hooked_step(*given)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined] # torch's own wrapper takes as long as a small step

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: Any = 1.0
        found: Any = None
        if self._step_supports_amp_scaling:  # what GradScaler then sets for the time of its step
            scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            scale = 1.0 if scale is None else scale
        updates = self._updates()
        bound, gradients = self._bind(updates)
        bound.step(self._state, updates, gradients, scale, found)
        self._bound = bound
        return loss

    def _bind(self, updates: list[Update]) -> tuple[Binding, list[Tensor]]:
        """What steps over the present gradients, and these."""
        bound = self._bound
        if bound is not None and bound.settings.device_scalars == self._capturable:
            state = self._state if self._asked_for_state[0] else None
            gradients = bound.current(self.param_groups, state, updates)
            if gradients is not None:
                return bound, gradients
        if bound is not None and bound.captured:
            why = "and its replays would go on with what has changed since: parameters, states or which have gradients"
            raise RuntimeError(f"a step of this optimizer was captured in a CUDA graph, {why}; make a new optimizer")
        self._forget()
        settings = self._settings._replace(device_scalars=self._capturable)
        groups, state = self.param_groups, self._state
        bound = Binding(
            groups,
            state,
            updates,
            self._family,
            self._initial,
            self._backend,
            self._flat,
            settings,
            self._storage,
        )
        return bound, bound.first_gradients()

    def _forget(self) -> None:
        """Bind anew at the next step."""
        if self._bound is not None:
            self._bound.sync(self._state)
            self._skipped += self._bound.last_stats().skipped
            self._bound = None

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    _uncompiled_step = torch._disable_dynamo(_hooked_step)  # type: ignore[attr-defined] # it is compiled code

    def _initial(self, p: Tensor) -> complex:
        """What its states start from."""
        return 0.0

    def prepare(self) -> None:
        """Compile what a step over the present gradients needs; send changed hyperparameters to the GPU.

        The latter, with ``capturable=True``, is for the next replay of a CUDA graph. To capture one, do a step with the
        same gradients before it.

        Raises:
            TypeError, ValueError, RuntimeError: as `step`.
        """
        updates = self._updates()
        self._bind(updates)[0].prepare(updates)

    def last_stats(self) -> Stats:
        """What the last step met; see `fused_adam`'s `Stats`. With it a GPU is waited for."""
        found = Stats(None, None, 0, None) if self._bound is None else self._bound.last_stats()
        return found._replace(skipped=found.skipped + self._skipped)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; with ``flat=True`` gradients stay views of their buffer, which is zeroed in any case."""
        if self._flat is None:
            super().zero_grad(set_to_none)
        else:
            self._flat.zero(self._parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises TypeError or ValueError, too, for hyperparameters that this package refuses."""
        super().add_param_group(param_group)
        if not self._ready:  # torch's constructor, whose own checks come first
            return
        try:
            self._updates()
        except Exception:
            del self.param_groups[-1]
            raise

    # --- state ------------------------------------------------------------------------------------------------------

    @property
    def _saved(self) -> _saved.Saved:
        return _saved.Saved(type(self).__name__, self._family, self._storage, self._initial)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the states are the live tensors. What shares one memory is copied: steps, and with `flat` all."""
        if self._bound is not None:
            self._bound.sync(self._state)
        asked = self._asked_for_state[0]
        saved = super().state_dict()
        if not self._optimizer_state_dict_pre_hooks and not self._optimizer_state_dict_post_hooks:
            self._asked_for_state[0] = asked  # torch asks for it, and what is returned are copies
        states = saved.get("state", {})
        if self._flat is not None and not any(self._state.values()):
            # torch.distributed.checkpoint loads into what it finds here. For want of states it takes a step to make
            # some, but not where there are gradients, as there always are in a flat layout.
            states.update(self._saved.first(saved["param_groups"], self.param_groups, self._updates()))
        for key, state in states.items():
            if isinstance(state, dict):
                states[key] = {
                    name: s.clone() if isinstance(s, Tensor) and (self._flat is not None or name == "step") else s
                    for name, s in state.items()
                }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of this class, or of torch's class of the same name.

        Unlike torch, states keep their dtype: moments in float32 are not cast to that of a parameter. Where
        `state_dtype` or `master` ask for another, they are converted. All tensors are copied, into the memory order of
        their parameters.

        Raises:
            TypeError, ValueError: it does not fit this optimizer and its parameters. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved_groups = deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        homeless = dict(state_dict["state"])
        places = _members.canonical(self.param_groups)
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            ids = saved["params"]
            saved.update({k: group[k] for k in group if k == "params" or k not in saved})
            rule = self._asked(saved).rule
            for key, p in zip(ids, group["params"], strict=True):
                if key in homeless:
                    name = f'state_dict["state"][{key!r}]'
                    loaded = self._saved.loaded(name, homeless.pop(key), p, rule, places[p])
                    if self._flat is None or self._family.counted or not _saved.is_first(loaded):
                        state[p] = loaded
        state.update(homeless)  # what belongs to no parameter stays as it is, as in torch
        self.__setstate__({"state": state, "param_groups": saved_groups})
        self._asked_for_state[0] = False
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._bound is not None:
            self._bound.sync(self._state)
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.pop("_options", None)
        self.state = state.pop("state")
        super().__setstate__(state)
        bound = self.__dict__.get("_bound")
        if bound is not None and bound.captured:
            self._captured.append(bound)
        self._bound, self._known, self._found = None, [], []
        if options is not None:  # unpickled or copied, not loaded
            self._set_up(**options)
        self._asked_for_state[0] = True  # the caller may keep what he gave


_chained = chain.from_iterable


def _number(x: Any) -> Any:
    """A hyperparameter without its tensors."""
    if isinstance(x, tuple | list):
        return tuple(map(_number, x))
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
