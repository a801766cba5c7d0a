"""The optimizer base: parameters, groups, states, one step over all of them, and state dicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks
from fused_adam._arrays import Array, address, order, ravel
from fused_adam._codegen import Rule
from fused_adam._layout import FlatBuffer, leaves, match, rebuild
from fused_adam._part import Part
from fused_adam.backends import DeferredInterrupt, Gradients, Loose, check_name, choose, load

_FORMAT = 1  # of state dicts


class Update(NamedTuple):
    """What a group's hyperparameters ask for at one step."""

    rule: Rule
    coefficients: Mapping[str, float]


class Optimizer(ABC):
    """Steps all parameters of all groups in one call, in place. Subclasses say which rule and coefficients.

    Attributes:
        param_groups: a list of dicts, as in PyTorch: "params" and the hyperparameters, to be changed between steps.
        backend: the name of the backend that runs the step.
        t: the number of steps done.
    """

    param_groups: list[dict[str, Any]]
    backend: str

    def __init__(self, params: Any, hyperparameters: dict[str, Any], backend: str = "auto") -> None:
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
        self._names = tuple(hyperparameters)
        self._set_up(groups, backend)

    @abstractmethod
    def _update(self, group: Mapping[str, Any], t: int) -> Update:
        """The rule and its coefficients for step t >= 1, from checked hyperparameters."""

    def _initial(self, group: Mapping[str, Any], state: str) -> float:
        """The value a state starts from."""
        return 0.0

    def _check(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The group's hyperparameters, checked. Raises TypeError or ValueError."""
        for name in self._names:
            if name not in group:
                raise ValueError(f"a group of {type(self).__name__} has no {name!r}; it has {list(group)}")
        return {name: self._check_one(name, group[name]) for name in self._names}

    def _check_one(self, name: str, value: Any) -> Any:
        return _checks.HYPERPARAMETERS[name](name, value)

    # --- construction -----------------------------------------------------------------------------------------------

    def _set_up(self, groups: list[dict[str, Any]], backend: str) -> None:
        import logging  # here, because it is a tenth of the package's import time

        check_name(backend)
        checked = [self._check(group) for group in groups]
        self._parts: list[Part] = []
        self._index: list[list[tuple[int, int]]] = []  # for each group's leaves: (part, position in it)
        everything: list[tuple[str, Any]] = []
        for k, group in enumerate(groups):
            path = "params" if self._one_group else f'params[{k}]["params"]'
            named = list(leaves(group["params"], path))
            _checks.parameters(named)
            everything += named
            self._index.append(self._split(k, group["params"], named, path))
        _checks.parameters(everything)

        for part in self._parts:
            group = checked[part.group]
            states = [(name, self._initial(group, name)) for name in self._update(group, 1).rule.states]
            _checks.coefficients([(f"initial {name}", x) for name, x in states], part.dtype)
            part.allocate(states)
        self.param_groups = groups
        # What gradients are matched to: the caller's own lists and dicts may change.
        self._params = [group["params"] for group in groups]
        self._trees = [rebuild(params, lambda leaf: leaf) for params in self._params]
        self._t = np.zeros(1, np.int64)
        self._requested = backend
        parts = [part.rows() for part in self._parts]
        self.backend = choose(backend, sum(p.size for _, p in everything))
        self._writes = _checks.Extents([a for part in parts for row in part.rows for a in row])
        self._stepper = load(self.backend).Stepper(parts, self._t, self._writes)
        logging.getLogger("fused_adam").info("%s runs on the %s backend", type(self).__name__, self.backend)

    def _split(self, group: int, params: Any, named: list[tuple[str, Any]], path: str) -> list[tuple[int, int]]:
        """Put a group's parameters into parts of one dtype each."""
        flat = params if isinstance(params, FlatBuffer) else None
        gradient_path = "grads" if self._one_group else f"grads[{group}]"
        parts: dict[Any, int] = {}
        index = []
        for name, p in named:
            if p.dtype not in parts:
                parts[p.dtype] = len(self._parts)
                self._parts.append(Part(group, flat, p.dtype))
            part = self._parts[parts[p.dtype]]
            index.append((parts[p.dtype], len(part.parameters)))
            part.names.append(gradient_path + name[len(path) :])
            part.parameters.append(p)
        return index

    # --- the step ---------------------------------------------------------------------------------------------------

    @property
    def t(self) -> int:
        return int(self._t[0])

    def prepare(self) -> None:
        """Compile and allocate now what the first step would."""
        self._stepper.prepare([u.rule for u in self._updates(self.t + 1)])

    def step(self, grads: Any) -> None:
        """Update all parameters and states in place.

        Args:
            grads: arrays in the structure of the parameters (with groups: a list with one entry for each), of their
                shapes and dtypes, or a FlatBuffer. Never written; must not overlap what the step writes. One for each
                parameter: to freeze a parameter, leave it out of params (zeros would still decay it).

        Raises:
            ValueError, TypeError: a gradient or hyperparameter is wrong. Nothing is changed then.
        """
        groups = self._group_gradients(grads)
        gradients = [self._part_gradients(part, groups) for part in self._parts]
        self._run(gradients)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> None:
        """The step in TensorFlow's form: (gradient, parameter) pairs in any order, each parameter exactly once.

        Raises:
            ValueError, TypeError: as `step`; an array is not a parameter of this optimizer, or comes twice or never.
        """
        positions = {id(p): (k, j) for k, part in enumerate(self._parts) for j, p in enumerate(part.parameters)}
        gradients: list[list[Any]] = [[_MISSING] * len(part.parameters) for part in self._parts]
        for n, pair in enumerate(grads_and_vars):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"grads_and_vars[{n}] should be a (gradient, parameter) pair, got {_checks.kind(pair)}")
            g, p = pair
            if id(p) not in positions:
                raise ValueError(
                    f"grads_and_vars[{n}]: not a parameter of this optimizer; pass the arrays it was given"
                )
            k, j = positions[id(p)]
            if gradients[k][j] is not _MISSING:
                raise ValueError(f"grads_and_vars[{n}]: this parameter came before; pass each once, gradients summed")
            gradients[k][j] = g
        for part, gs in zip(self._parts, gradients, strict=True):
            for name, g in zip(part.names, gs, strict=True):
                if g is _MISSING:
                    raise ValueError(
                        f"the gradient of {name.replace('grads', 'params', 1)} is missing; pass one for each"
                    )
        loose = zip(self._parts, gradients, strict=True)
        self._run([Loose(part.names, gs, part.parameters) for part, gs in loose])

    def _run(self, gradients: Sequence[Gradients]) -> None:
        t = self.t + 1
        if t > _checks.MAX_STEP:
            raise ValueError("the step count has reached 2**63 - 1")
        updates = self._updates(t)
        rules = [u.rule for u in updates]
        values = [[u.coefficients[n] for n in u.rule.coefficients] for u in updates]
        for part, rule, xs in zip(self._parts, rules, values, strict=True):
            _checks.coefficients(zip(rule.coefficients, xs, strict=True), part.dtype)
        self._stepper.step(t, rules, values, gradients)

    def _updates(self, t: int) -> list[Update]:
        """One for each part. Raises when a changed hyperparameter asks for states that do not exist."""
        if len(self.param_groups) != len(self._params):
            counts = f"{len(self.param_groups)} groups but this optimizer was made with {len(self._params)}"
            raise ValueError(f"param_groups has {counts}; make a new optimizer for that")
        by_group = [self._update(self._check(group), t) for group in self.param_groups]
        updates = [by_group[part.group] for part in self._parts]
        for part, update in zip(self._parts, updates, strict=True):
            if update.rule.states != tuple(part.states):
                raise ValueError(
                    f"param_groups[{part.group}] was changed from states {tuple(part.states)} to {update.rule.states}; "
                    "make a new optimizer for that"
                )
        return updates

    def _group_gradients(self, grads: Any) -> Sequence[Any]:
        if self._one_group:
            return [grads]
        if not isinstance(grads, list | tuple):
            raise ValueError(f"grads should be a list with one entry for each group, got {_checks.kind(grads)}")
        if len(grads) != len(self.param_groups):
            raise ValueError(f"grads has {len(grads)} entries but there are {len(self.param_groups)} groups")
        return grads

    def _part_gradients(self, part: Part, groups: Sequence[Any]) -> Gradients:
        grads = groups[part.group]
        path = "grads" if self._one_group else f"grads[{part.group}]"
        if self.param_groups[part.group]["params"] is not self._params[part.group]:
            raise ValueError(f'param_groups[{part.group}]["params"] was replaced; make a new optimizer for that')
        if part.flat is not None and isinstance(grads, FlatBuffer):
            if grads is part.last_gradient:  # its memory never changes, so what was found of it still holds
                return grads
            extent = np.array([address(grads.data)], np.int64), np.array([grads.data.nbytes], np.int64)
            if self._writes.first_overlap(*extent) >= 0:
                raise _checks.overlap(path)
            if grads.layout == part.flat.layout:
                part.last_gradient = grads
                return grads
        matched = list(match(grads, self._trees[part.group], path))
        mine = [g for g, (k, _) in zip(matched, self._index[part.group], strict=True) if self._parts[k] is part]
        return Loose(part.names, mine, part.parameters)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to continue bit for bit, as plain dicts of numbers and array copies.

        Keys: "format", "optimizer", "t", "param_groups" (hyperparameters, "params" as indices) and "state": for each
        parameter in order a dict of arrays in its shape.
        """
        state: list[dict[str, Array]] = []
        groups = []
        for group, index in zip(self.param_groups, self._index, strict=True):
            numbers = list(range(len(state), len(state) + len(index)))
            groups.append({**self._check(group), "params": numbers})
            state += [{name: view.copy(order="K") for name, view in views.items()} for views in self._views(index)]
        return {
            "format": _FORMAT,
            "optimizer": type(self).__name__,
            "t": self.t,
            "param_groups": groups,
            "state": state,
        }

    def _views(self, index: list[tuple[int, int]]) -> list[dict[str, Array]]:
        by_part = {k: {n: self._parts[k].state_views(n) for n in self._parts[k].states} for k, _ in index}
        return [{name: views[j] for name, views in by_part[k].items()} for k, j in index]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: states, t and hyperparameters.

        Raises:
            ValueError, TypeError: it does not fit this optimizer and its parameters. Nothing is changed then.
        """
        d = state_dict
        _checks.same_keys("state_dict", d, ("format", "optimizer", "t", "param_groups", "state"))
        if d["format"] != _FORMAT:
            raise ValueError(f"state_dict has format {d['format']!r}; this version reads {_FORMAT}")
        if d["optimizer"] != type(self).__name__:
            raise ValueError(f"state_dict is of {d['optimizer']!r} but this is {type(self).__name__}")
        t = _checks.step_number(d["t"], least=0, name='state_dict["t"]')
        for name, have in (("param_groups", len(self.param_groups)), ("state", sum(map(len, self._index)))):
            if not isinstance(d[name], list | tuple) or len(d[name]) != have:
                raise ValueError(f'state_dict["{name}"] should be a list of {have}, got {_checks.kind(d[name])}')
        hyperparameters = []
        writes: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        number = 0
        for k, index in enumerate(self._index):
            path = f'state_dict["param_groups"][{k}]'
            given = d["param_groups"][k]
            _checks.same_keys(path, given, (*self._names, "params"))
            numbers = list(range(number, number + len(index)))
            if not isinstance(given["params"], list | tuple) or list(given["params"]) != numbers:
                raise ValueError(f'{path}["params"] should be {numbers}, got {given["params"]!r}')
            hyperparameters.append(self._check(given))
            wanted = self._update(hyperparameters[-1], 1).rule.states
            for views in self._views(index):
                if tuple(views) != wanted:
                    raise ValueError(f"{path} asks for states {wanted} but this optimizer has {tuple(views)}")
                name = f'state_dict["state"][{number}]'
                _checks.same_keys(name, d["state"][number], views)
                for key, view in views.items():
                    _checks.state(f'{name}["{key}"]', d["state"][number][key], view.shape, view.dtype)
                    # 1-D and of one layout, so that nothing allocates, and so nothing fails, once the writing begins
                    source = np.array(d["state"][number][key], order="C" if order(view) == "C" else "F")
                    writes.append((np.copyto, (ravel(view), ravel(source))))
                number += 1
        writes += [(g.update, (values,)) for g, values in zip(self.param_groups, hyperparameters, strict=True)]
        writes.append((np.copyto, (self._t, np.array([t], np.int64))))
        with DeferredInterrupt():
            for write, arguments in writes:
                write(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "groups": [dict(group) for group in self.param_groups],
            "one_group": self._one_group,
            "names": self._names,
            "backend": self._requested,
            "state": self.state_dict(),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._one_group = saved["one_group"]
        self._names = saved["names"]
        self._set_up(saved["groups"], saved["backend"])
        self.load_state_dict(saved["state"])

    def __repr__(self) -> str:
        groups = ", ".join(str({name: g[name] for name in self._names}) for g in self.param_groups)
        return f"{type(self).__name__}({groups}, backend={self.backend!r}, t={self.t})"


_MISSING = object()


def _is_groups(params: Any) -> bool:
    """A list of dicts that each have "params"."""
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(g, dict) and "params" in g for g in params)
    )
