"""State dicts of other optimizers for PyTorch, as ones that the classes here load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_BITSANDBYTES = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def from_apex(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict()`` of Apex's ``FusedAdam`` as one of `Adam` or `AdamW`. Tensors are not copied.

    Its step count is kept in the group, and so counts for every parameter of it.

    Raises:
        TypeError, ValueError: it is no such state dict, or has ``bias_correction=False``, which has no counterpart.
    """
    states, groups = _parts(saved)
    made = {}
    for number, group in enumerate(groups):
        name = f"param_groups[{number}]"
        step = group.pop("step", None)
        if not isinstance(step, int) and not (isinstance(step, torch.Tensor) and step.numel() == 1):
            raise ValueError(f"{name} should have a step that is a number, as Apex's has, got {step!r}")
        if not group.pop("bias_correction", True):
            raise ValueError(f"{name} has bias_correction=False, which has no counterpart; step on with Apex")
        for k in group["params"]:
            if k in states:
                made[k] = {**states[k], "step": torch.tensor(float(step))}
    return {"state": made, "param_groups": groups}


def from_bitsandbytes(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict()`` of a 32-bit optimizer of bitsandbytes as one of `Adam`, `AdamW` or `Lion`.

    Tensors are not copied.

    Raises:
        TypeError, ValueError: it is no such state dict, or its states have 8 bits.
    """
    states, groups = _parts(saved)
    made = {}
    for k, theirs in states.items():
        if any(name.startswith(("qmap", "absmax")) for name in theirs):
            raise ValueError(f"state[{k}] has 8 bits, which do not load; train on with optim_bits=32 first")
        if "step" not in theirs or "state1" not in theirs:
            raise ValueError(f"state[{k}] should have step and state1, as bitsandbytes' has, got {[*theirs]}")
        moments = {ours: theirs[name] for name, ours in _BITSANDBYTES.items() if name in theirs}
        made[k] = {"step": torch.tensor(float(theirs["step"])), **moments}
    return {"state": made, "param_groups": groups}


def _parts(saved: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """The states, and copies of the groups."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise TypeError("expected the state_dict() of an optimizer, a dict with state and param_groups")
    return saved["state"], [dict(group) for group in saved["param_groups"]]
