"""Checkpoints as files of torch.save, whose state dicts torch's own optimizers load.

A file holds a dict: "optimizer", a state dict of the class that "class" names, in torch.optim (Lion: in
fused_adam.torch); "params", tensors in order, if they were saved; "masters" of these, in float32, if there are any;
"names" of them; "t"; "extra". States are float32 or float64, whatever they were kept in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fused_adam
import fused_adam.torch
from fused_adam import _numbers, _state_dict
from fused_adam._arrays import Array
from fused_adam._part import MASTER
from fused_adam.checkpoint._format import dtype_name
from fused_adam.checkpoint._held import Held, new_file
from fused_adam.checkpoint._manifest import PARAMETER, Contents, Parameter, Spec, plain
from fused_adam.checkpoint._saved import Saved
from fused_adam.checkpoint._wide import wide, wide_array

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Lion")
_LISTS = {"params": PARAMETER, "masters": MASTER}  # of a file
_FLOAT32_COUNTS = 2**24  # from here on a float32 does not count


def _class(name: Any) -> Any:
    if name not in NAMES:
        raise ValueError(f"torch has no optimizer {name!r}; {', '.join(NAMES)} can be converted")
    return getattr(fused_adam.torch, name)


# --- to torch ---------------------------------------------------------------------------------------------------------


def write(path: Path, saved: Saved) -> None:
    """Raises ValueError for what torch has no class for, OSError."""
    contents = wide(saved.contents)
    cls = _class(contents.optimizer)
    groups = [_group(saved.name, cls, group) for group in contents.param_groups]
    for number, name, _ in contents.arrays():
        if name not in (PARAMETER, MASTER, *cls._family.states):
            raise ValueError(f"{saved.name} cannot be converted: torch has nothing for {number}.{name}")
    tensors = {(n, name): _tensor(wide_array(saved, n, name), spec.dtype) for n, name, spec in contents.arrays()}
    step = torch.tensor(contents.t, dtype=torch.float32 if contents.t < _FLOAT32_COUNTS else torch.float64)
    state = {}
    for number, parameter in enumerate(contents.parameters):
        states = [name for name in parameter.arrays if name not in (PARAMETER, MASTER)]
        mine = {cls._family.states[name]: tensors[number, name] for name in states}
        if contents.t and cls._family.counted:
            mine["step"] = step.clone()
        if contents.t and mine:  # before the first step torch has none, and starts from its own
            state[number] = mine
    document = {
        "class": contents.optimizer,
        "optimizer": {"state": state, "param_groups": groups},
        "names": [p.name for p in contents.parameters],
        "t": contents.t,
        "extra": contents.extra,
    }
    for key, name in _LISTS.items():
        if all(name in p.arrays for p in contents.parameters):
            document[key] = [tensors[k, name] for k in range(len(contents.parameters))]
    with new_file(path) as file:
        torch.save(document, file)


def _tensor(a: Array, dtype: str) -> torch.Tensor:
    x = torch.from_numpy(a)
    return x.view(torch.bfloat16) if dtype == "BF16" else x


def _group(what: str, cls: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    if group.get("numerics", "torch") not in ("torch", "apex"):
        raise ValueError(f"{what} cannot be converted: torch has no formula like numerics={group['numerics']!r}")
    numbers = {name: _number(group[name]) for name in cls._names}
    defaults = cls([torch.zeros(1)], **numbers).param_groups[0]
    return {**defaults, **numbers, "params": group["params"]}


# --- from torch -------------------------------------------------------------------------------------------------------


def read(path: Path, optimizer: str | None = None, t: int | None = None) -> Held:
    """What `write` writes, or any dict with a state dict as "optimizer", or that alone. Nothing in it is executed.

    Args:
        optimizer: the name of the class, where the file does not tell. t: the steps done, where it does not count them.

    Raises ValueError, OSError.
    """
    with open(path, "rb") as file:
        try:
            d = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, by what is wrong with the file
            raise ValueError(f"{path} is refused by torch.load: {str(error).partition('. ')[0]}") from None
    try:
        return _held(d if "optimizer" in d else {"optimizer": d}, optimizer, t)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not hold what torch.optim saves: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _held(d: Mapping[str, Any], optimizer: str | None, t: int | None) -> Held:
    states, groups = d["optimizer"]["state"], d["optimizer"]["param_groups"]
    name = optimizer or d.get("class") or _guessed(groups[0])
    cls = _class(name)
    t = _steps(states.values(), d.get("t") if t is None else t)
    numbers = [{key: _number(group[key]) for key in cls._names if key in group} for group in groups]
    # one of ours with as many parameters, for its checks and for the states that it has
    form = getattr(fused_adam, name)(
        [{"params": [np.zeros(1) for _ in g["params"]], **n} for g, n in zip(groups, numbers, strict=True)],
        backend="numpy",
    )
    parameters: list[Parameter] = []
    arrays: dict[tuple[int, str], Array] = {}
    for group, part in zip(groups, form._parts, strict=True):
        for j, key in enumerate(group["params"]):
            number = len(parameters)
            tensors = {name: d[called][number] for called, name in _LISTS.items() if called in d}
            for called in part.states:
                theirs = cls._family.states[called]
                if states.get(key, {}).get(theirs) is None:
                    raise ValueError(f"parameter {number} has no {theirs!r}: it has done no step")
                tensors[called] = states[key][theirs]
            label = d["names"][number] if "names" in d else f"[{j}]"
            held = {called: _array(x.detach()) for called, x in tensors.items()}
            parameters.append(_parameter(number, label, held))
            arrays |= {(number, called): a for called, (_, a) in held.items()}
    extra = plain("extra", d.get("extra", {}))
    return Held(Contents(name, t, _state_dict.numbers(form)["param_groups"], parameters, extra), arrays)


def _array(x: torch.Tensor) -> tuple[str, Array]:
    """In NumPy, with safetensors' name of the dtype."""
    if x.dtype == torch.bfloat16:
        return "BF16", np.asarray(x.view(torch.uint16).numpy(), order="C")
    a = np.asarray(x.numpy(), order="C")
    return dtype_name(a.dtype), a


def _parameter(number: int, label: str, arrays: Mapping[str, tuple[str, Array]]) -> Parameter:
    """Whose states have one dtype: its own, or float32 beside 16 bits. The same of a master."""
    specs = {called: Spec(dtype, a.shape) for called, (dtype, a) in arrays.items()}
    if not specs:
        raise ValueError(f"parameter {number} has no states, nor are there 'params'")
    kinds = {*specs.values()}
    p = specs.get(PARAMETER, next(iter(kinds)))
    beside = {spec for called, spec in specs.items() if called != PARAMETER}
    half = p.dtype in ("F16", "BF16") and beside == {Spec("F32", p.shape)}
    if len(kinds) != 1 and not half:
        raise ValueError(f"parameter {number} has arrays of different shapes or dtypes: {kinds}")
    return Parameter(label, p.dtype, p.shape, specs)


def _guessed(group: Mapping[str, Any]) -> str:
    """The class of a group, by the hyperparameters that only it has."""
    if "decoupled_weight_decay" in group:
        return "AdamW" if group["decoupled_weight_decay"] else "Adam"
    for key, name in {"nesterov": "SGD", "lr_decay": "Adagrad", "alpha": "RMSprop"}.items():
        if key in group:
            return name
    raise ValueError(f"of which optimizer it is, it does not say; name it, as one of {', '.join(NAMES)}")


def _steps(states: Any, t: int | None) -> int:
    if t is not None:
        return _numbers.step_number(t, least=0, name="t")
    counts = {float(state["step"]) for state in states if "step" in state}
    if len(counts) != 1:
        found = f"has the counts of steps {sorted(counts)[:5]}" if counts else "has no count of steps"
        raise ValueError(f"it {found}, and a checkpoint has one; say how many steps were done")
    (count,) = counts
    return _numbers.step_number(int(count), least=0, name="step")


def _number(x: Any) -> Any:
    """A hyperparameter without tensors and lists."""
    if isinstance(x, list | tuple):
        return tuple(map(_number, x))
    return x.item() if isinstance(x, torch.Tensor) else x
