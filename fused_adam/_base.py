"""The optimizer base: parameters, groups, states, one step over all of them, and state dicts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any

import numpy as np

from fused_adam import _checks, _formats, _gradients, _memory, _numbers, _rows, _state_dict
from fused_adam._arrays import BLOCK, AnyArray
from fused_adam._formats import Storage
from fused_adam._guard import Settings, Stats
from fused_adam._layout import FlatBuffer, leaves, rebuild
from fused_adam._norm import unscaling
from fused_adam._part import Part
from fused_adam._runner import Runner, is_scale
from fused_adam._update import Update
from fused_adam.backends import LIBRARY, Gradients, Kept, check_name, choose, load


class Optimizer(ABC):
    """Steps all parameters of all groups in one call, in place. Subclasses say which rule and coefficients.

    Attributes:
        param_groups: a list of dicts, as in PyTorch: "params" and the hyperparameters, to be changed between steps.
        backend: the name of the backend that runs the step.
        t: the number of steps done.
        per_row_step: whether each row of a parameter, along its first axis, has a t of its own.
        settings: what happens to gradients on their way.
    """

    param_groups: list[dict[str, Any]]
    backend: str
    per_row_step: bool
    settings: Settings
    # Hyperparameters that older state dicts lack, and what they then are.
    _later: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        params: Any,
        hyperparameters: dict[str, Any],
        backend: str = "auto",
        per_row_step: bool = False,
        master: str | None = None,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        dtype: str | None = None,
        canonical: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        if _is_groups(params):
            groups = [dict(group) for group in params]
            for k, group in enumerate(groups):
                for key in group:
                    if key != "params" and key not in hyperparameters:
                        known = f"{type(self).__name__} has {list(hyperparameters)}"
                        raise ValueError(f"params[{k}] has the unknown key {key!r}; {known}")
            groups = [{"params": g.pop("params"), **hyperparameters, **g} for g in groups]
        else:
            groups = [{"params": params, **hyperparameters}]
        self._one_group = not _is_groups(params)
        self._canonical = canonical
        self._names = tuple(hyperparameters)
        self.per_row_step = _numbers.flag("per_row_step", per_row_step)
        self.settings = Settings.checked(**settings)
        self.storage = Storage.checked(master, state_dtype, stochastic_rounding, seed, dtype)
        if self.per_row_step and self.settings.any:
            raise ValueError(f"per_row_step does not go with {self.settings.names}; leave one of them out")
        self._set_up(groups, backend)

    @abstractmethod
    def _update(self, group: Mapping[str, Any]) -> Update:
        """The rule and its coefficients, from checked hyperparameters."""

    def _initial(self, group: Mapping[str, Any], state: str) -> float:
        """The value a state starts from."""
        return 0.0

    def _check(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The group's hyperparameters, checked. Raises TypeError or ValueError."""
        for name in self._names:
            if name not in group:
                raise ValueError(f"a group of {type(self).__name__} has no {name!r}; it has {list(group)}")
        return {name: self._check_one(name, group[name]) for name in self._names}

    def _updated(self, k: int, group: Mapping[str, Any]) -> Update:
        """`_update` for group k, whose numbers are mostly the very objects that were found right at the last step."""
        values = [*map(group.get, self._names)]
        last, update = self._last_update.get(k, ((), None))
        if update is None or not all(map(is_, values, last)):
            update = self._update(self._check(group))
            self._last_update[k] = (values, update) if all(map(_is_constant, values)) else ((), None)
        return update

    def _check_one(self, name: str, value: Any) -> Any:
        return _numbers.HYPERPARAMETERS[name](name, value)

    # --- construction -----------------------------------------------------------------------------------------------

    def _set_up(self, groups: list[dict[str, Any]], backend: str) -> None:
        import logging  # here, because it is a tenth of the package's import time

        check_name(backend)
        checked = [self._check(group) for group in groups]
        self._parts: list[Part] = []
        self._index: list[list[tuple[int, int]]] = []  # for each group's leaves: (part, position in it)
        named: list[tuple[int, str, Any]] = []
        for k, group in enumerate(groups):
            path = "params" if self._one_group else f'params[{k}]["params"]'
            mine = [(k, name, p) for name, p in leaves(group["params"], path)]
            if not mine:
                raise ValueError(f"{path} is empty; pass at least one array")
            named += mine
        arrays, kinds = _checks.parameters([(name, p) for _, name, p in named], self.storage.dtype)
        self._split(groups, named, arrays, kinds)

        device = next((d for d in map(_checks.device, arrays) if d != -1), 0)
        self.backend = choose(backend, sum(p.size for p in arrays), device)
        self._device = device
        memory = _memory.of_library(LIBRARY[self.backend], device)
        for part in self._parts:
            group = checked[part.group]
            update = self._update(group)
            update.at(1)  # a rule of the user's may refuse them
            self._check_format(part, update)
            states = [(name, self._initial(group, name)) for name in update.rule.states]
            _numbers.coefficients([f"initial {name}" for name, _ in states], [x for _, x in states], part.dtype)
            self._allocate(part, states, memory)
        self.param_groups = groups
        # What gradients are matched to: the caller's own lists and dicts may change.
        self._params = [group["params"] for group in groups]
        self._trees = [rebuild(params, lambda leaf: leaf) for params in self._params]
        self._t = np.zeros(1, np.int64)
        self._requested = backend
        self._last_update: dict[int, tuple[Sequence[Any], Update | None]] = {}
        parts = [part.rows() for part in self._parts]
        self._writes = _checks.Extents([a for part in parts for row in part.rows for a in row])
        self._stepper = load(self.backend).Stepper(parts, self._t, self._writes)
        self._runner = Runner(self._stepper, [part.dtype for part in self._parts], self.backend, self.settings)
        self._on_device = self._runner.on_device
        if self._on_device:
            self._runner.upload(self._updates(), wait=True)
        logging.getLogger("fused_adam").info("%s runs on the %s backend", type(self).__name__, self.backend)

    def _split(
        self,
        groups: list[dict[str, Any]],
        named: list[tuple[int, str, Any]],
        arrays: Sequence[AnyArray],
        kinds: Sequence[str],
    ) -> None:
        """Put each group's parameters into parts of one dtype each."""
        parts: dict[tuple[int, str], int] = {}
        self._index = [[] for _ in groups]
        first = 0  # canonical: in the order of the parameters, each from a multiple of 128 on
        for number, ((group, name, given), p, kind) in enumerate(zip(named, arrays, kinds, strict=True)):
            if (group, kind) not in parts:
                parts[group, kind] = len(self._parts)
                params = groups[group]["params"]
                flat = params if isinstance(params, FlatBuffer) else None
                form = self.storage.format(kind)
                kept = None if form is None else Kept(form, self.storage.seed, self.storage.dtype)
                self._parts.append(Part(group, flat, kind, kept))
            k = parts[group, kind]
            part = self._parts[k]
            self._index[group].append((k, len(part.parameters)))
            path = "params" if self._one_group else f'params[{group}]["params"]'
            part.names.append(self._path(group) + name[len(path) :])
            part.given.append(given)
            part.parameters.append(p)
            part.first.append(self._canonical[number] if self._canonical else first)
            first += -(-p.size // BLOCK) * BLOCK

    def _check_format(self, part: Part, update: Update) -> None:
        """Raises ValueError for what is not offered with numbers of 16 bits, whatever gradients come."""
        if part.kept is None:
            return
        form, name = part.kept.form, part.names[0].replace("grads", "params", 1)
        _formats.refuse_rule(update.rule, form, name)
        on_gpu = self.settings._replace(device_scalars=False).names if self._device is not None else ""
        asked = on_gpu or "count_unmoved" * self.settings.counts or "per_row_step" * self.per_row_step
        if asked:
            raise ValueError(f"{name}: {asked} is not offered with {_formats.describe(form)}; leave one of them out")
        if self.backend == "numba-cuda":
            raise ValueError(
                f"{name}: the numba-cuda backend does not step over {_formats.describe(form)}; install CuPy"
            )

    def _allocate(self, part: Part, states: Sequence[tuple[str, float]], memory: _memory.Memory) -> None:
        """Give a part its states, of which each starts from a value."""
        part.allocate(states, memory, self.per_row_step)

    def _path(self, group: int) -> str:
        """What a message calls a group's gradients."""
        return "grads" if self._one_group else f"grads[{group}]"

    # --- the step ---------------------------------------------------------------------------------------------------

    @property
    def t(self) -> int:
        return int(self._stepper.control()["t"]) if self._on_device else int(self._t[0])

    def prepare(self) -> None:
        """Compile and allocate now what the first step would."""
        self._runner.prepare(self._updates(), self.per_row_step)

    def set_lr(self, lr: float, group: int | None = None, *, stream: Any = None) -> None:
        """Change the learning rate of a group, or of all.

        As assigning to ``param_groups[...]["lr"]``; but where scalars are kept on a GPU it is also sent there now, in
        the order of the stream, so that the next replay of a CUDA graph takes it.

        Raises:
            TypeError, ValueError, IndexError: lr is no number or negative, or there is no such group. Nothing is
                changed then.
        """
        if stream is not None and not self._on_device:
            raise ValueError("stream is for scalars that are kept on a GPU; leave it out")
        checked = self._check_one("lr", lr)
        groups = self.param_groups if group is None else [self.param_groups[group]]
        if any("lr" not in g for g in groups):
            raise ValueError(f"{type(self).__name__} has no lr; it has {list(self._names)}")
        before = [g["lr"] for g in groups]
        try:
            for g in groups:
                g["lr"] = checked
            if self._on_device:
                self._runner.upload(self._updates(), stream)
        except BaseException:
            for g, old in zip(groups, before, strict=True):
                g["lr"] = old
            raise

    def step(
        self, grads: Any, *, grad_scale: Any = 1.0, found_inf: Any = None, mask: Any = None, stream: Any = None
    ) -> None:
        """Update all parameters and states in place.

        Args:
            grads: arrays in the structure of the parameters (with groups: a list with one entry for each), of their
                shapes and dtypes and where they are, or a FlatBuffer. Must not overlap what the step writes. One for
                each parameter: to freeze a parameter, leave it out of params (zeros would still decay it). A SparseGrad
                may stand for any of them. Never written but with zero_grads, when they are zeroed, in a step that is
                skipped too; they are then writable and ordered like their parameters, and each has memory of its own.
            grad_scale: what the loss was multiplied by: gradients are multiplied by 1 / grad_scale, rounded to their
                dtype, before all else. A number > 0 with an inverse > 0 in that dtype; or an array of one number, of
                which any other value (0, negative, inf, NaN) skips the step.
            found_inf: if it is not 0, the step is skipped: p, the states and t stay. A number, or an array of one.
                Neither goes with a SparseGrad, a mask or per_row_step, and nor do the constructor's options.
            mask: which rows move: a boolean for each row along the first axis. One 1-D array for all parameters, or
                such arrays in their structure, None where all rows move. The other rows, their states and their
                gradients are not touched.
            stream: for parameters on a GPU, the CUDA stream to launch on: a stream of CuPy, Numba or PyTorch, or its
                address as an int. By default CuPy's current stream (Numba's default stream without CuPy). You order
                it after what wrote the gradients, and keep them until the step is done, as with any work on a stream.

        Raises:
            ValueError, TypeError: a gradient or hyperparameter is wrong. Nothing is changed then.
        """
        self._run(_gradients.of_step(self, grads), stream, mask, grad_scale, found_inf)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> None:
        """The step in TensorFlow's form: (gradient, parameter) pairs in any order, each parameter exactly once.

        A gradient may be a SparseGrad, as in `step`.

        Raises:
            ValueError, TypeError: as `step`; an array is not a parameter of this optimizer, or comes twice or never.
        """
        self._run(_gradients.of_pairs(self, grads_and_vars))

    def _run(
        self,
        gradients: Sequence[Gradients],
        stream: Any = None,
        mask: Any = None,
        grad_scale: Any = 1.0,
        found_inf: Any = None,
        clipping: float | None = None,
    ) -> None:
        """clipping: what gradients are multiplied by, where somebody else knows the norm of all."""
        if stream is not None and self._device is None:
            raise ValueError("stream is for parameters on a GPU; these are in host memory")
        masks = None if mask is None else _rows.masks_of(self, mask)
        masked = masks is not None and any(one is not None for some in masks for one in some)
        by_row = masked or self.per_row_step or any(map(_rows.has_rows, gradients))
        scaled = is_scale(grad_scale)
        if by_row and (self._runner.guarded or scaled or found_inf is not None):
            asked = self.settings.names or ("grad_scale" if found_inf is None else "found_inf")
            raise ValueError(f"{asked} does not go with steps over rows (SparseGrad, mask, per_row_step)")
        if by_row and any(part.kept is not None for part in self._parts):
            raise ValueError("SparseGrad and mask are not offered with numbers of 16 bits; pass dense gradients")
        if scaled and isinstance(grad_scale, int | float | np.generic):
            grad_scale = self._check_scale(grad_scale)
        updates = self._updates()
        if self._on_device:
            self._runner.step_on_device(updates, gradients, grad_scale, found_inf, stream)
            return
        t = self.t + 1
        if t > _numbers.MAX_STEP:
            raise ValueError("the step count has reached 2**63 - 1")
        values = [u.at(t) for u in updates]
        if not self.per_row_step:  # whose rows take others
            for part, u, xs in zip(self._parts, updates, values, strict=True):
                _numbers.coefficients(u.rule.coefficients, xs, part.dtype)
        options = () if stream is None else (stream,)
        if by_row:
            _rows.step(self, t, updates, values, gradients, masks or _rows.masks_of(self, None), options)
        else:
            self._runner.step(t, updates, values, gradients, grad_scale, found_inf, options, clipping)

    def _check_scale(self, grad_scale: Any) -> float:
        """A number by which gradients of all dtypes can be divided."""
        scale = _numbers.grad_scale(grad_scale)
        if scale != 1.0 and any(math.isnan(unscaling(scale, part.dtype)) for part in self._parts):
            raise ValueError(f"grad_scale is {grad_scale}, of which the gradients' dtype has no inverse")
        return scale

    def last_stats(self) -> Stats:
        """What the last step met; see `Stats`. Where scalars are kept on a GPU it waits for the device."""
        return self._runner.last_stats()

    def _updates(self) -> list[Update]:
        """One for each part. Raises when a changed hyperparameter asks for states that do not exist."""
        if len(self.param_groups) != len(self._params):
            counts = f"{len(self.param_groups)} groups but this optimizer was made with {len(self._params)}"
            raise ValueError(f"param_groups has {counts}; make a new optimizer for that")
        by_group = [self._updated(k, group) for k, group in enumerate(self.param_groups)]
        updates = [by_group[part.group] for part in self._parts]
        for part, update in zip(self._parts, updates, strict=True):
            if update.rule.states != tuple(part.states):
                raise ValueError(
                    f"param_groups[{part.group}] was changed from states {tuple(part.states)} to {update.rule.states}; "
                    "make a new optimizer for that"
                )
        return updates

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to continue bit for bit, as plain dicts of numbers and array copies.

        Keys: "format", "optimizer", "t", "param_groups" (hyperparameters, "params" as indices) and "state": for each
        parameter in order a dict of NumPy arrays in its shape, wherever the parameter is.
        """
        return _state_dict.save(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: states (in host memory or on a GPU), t and hyperparameters.

        Raises:
            ValueError, TypeError: it does not fit this optimizer and its parameters. Nothing is changed then.
        """
        _state_dict.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "groups": [dict(group) for group in self.param_groups],
            "one_group": self._one_group,
            "names": self._names,
            "backend": self._requested,
            "per_row_step": self.per_row_step,
            "settings": self.settings,
            "storage": self.storage,
            "canonical": self._canonical,
            "state": self.state_dict(),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._one_group = saved["one_group"]
        self._names = saved["names"]
        self.per_row_step = saved["per_row_step"]
        self.settings = saved.get("settings", Settings())
        self.storage = saved.get("storage", Storage())
        self._canonical = saved.get("canonical", ())
        self._set_up(saved["groups"], saved["backend"])
        self.load_state_dict(saved["state"])

    def __repr__(self) -> str:
        groups = ", ".join(str({name: g[name] for name in self._names}) for g in self.param_groups)
        return f"{type(self).__name__}({groups}, backend={self.backend!r}, t={self.t})"


def _is_constant(x: Any) -> bool:
    """Whether an object can never mean anything else than it does now; a list of betas can."""
    return type(x) in (float, int, bool, str) or (type(x) is tuple and all(map(_is_constant, x)))


def _is_groups(params: Any) -> bool:
    """A list of dicts that each have "params"."""
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(g, dict) and "params" in g for g in params)
    )
