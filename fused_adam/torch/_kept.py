"""What is kept of a parameter: its states, which may have fewer bits, and what stands beside them then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam import _formats, _int8
from fused_adam._codegen import Rule
from fused_adam._formats import Storage
from fused_adam._storage import Format
from fused_adam.torch import _tensors

MASTER, SCALES = "master", "scales"  # as in state dicts of this package
_MASTERS = {"float32": torch.float32, "split16": torch.int16, "split8": torch.uint8}
_STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODES = {"m": torch.int8, "v": torch.uint8}


def form_of(storage: Storage, p: Tensor, held: Mapping[str, Any], called: Sequence[str]) -> Format | None:
    """How a parameter and its states are kept; None if all are of its own float32 or float64.

    Args:
        storage: what was asked for. Where no dtype of states was, they are as the ones that there are; new ones of
            bfloat16 parameters without a master are bfloat16, as torch's, and those of float16 parameters float32,
            for in float16 a v of small gradients is 0.
        held: the state. called: torch's names of those that the rule has.

    Raises:
        ValueError: that is not offered.
    """
    kind = _tensors.KINDS[p.dtype]
    if kind in ("float32", "float64"):  # a model's norms among parameters of 16 bits
        storage = storage._replace(master=None, stochastic_rounding=False)
    elif storage.state_dtype is None:
        dtypes = {held[name].dtype for name in called if isinstance(held.get(name), Tensor)}
        narrow = kind == "bfloat16" and storage.master is None and dtypes != {torch.float32}
        storage = storage._replace(state_dtype="bfloat16" if narrow else "float32")
    form = storage.format(kind)
    if form is not None and p.is_complex():
        raise ValueError(f"complex parameters are not offered with {_formats.describe(form)}; leave state_dtype out")
    return form


def dtypes(form: Format | None, rule: Rule, names: Mapping[str, str], p: Tensor) -> dict[str, torch.dtype]:
    """Of all that is kept, by torch's names and in the order of a row of memory. names: the rule's -> torch's."""
    if form is None:
        return {names[s]: p.dtype for s in rule.states}
    found = {MASTER: _MASTERS[form.master]} if form.master else {}
    if form.states != "int8":
        return {**found, **{names[s]: _STATES[form.states] for s in rule.states}}
    return {**found, **{names[s]: _CODES[s] for s in rule.states}, SCALES: torch.int16}


def shape(called: str, p: Tensor) -> tuple[int, ...]:
    """That of something kept."""
    return (2 * _int8.blocks(p.numel()),) if called == SCALES else tuple(p.shape)


def first(called: str, dtype: torch.dtype, p: Tensor, value: complex) -> Tensor:
    """What is kept before the first step, in the memory order of its parameter. value: what a state starts from."""
    if called == SCALES:
        return torch.zeros(shape(called, p), dtype=dtype, device=p.device)
    if called == MASTER:
        return _tensors.in_order_of(p, p, dtype) if dtype == torch.float32 else _filled(p, dtype, 0)
    return _filled(p, dtype, value)


def _filled(p: Tensor, dtype: torch.dtype, value: complex) -> Tensor:
    return torch.full_like(p, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def converted(
    state: dict[str, Any], wanted: Mapping[str, torch.dtype], names: Mapping[str, str], p: Tensor, at: int, t: int
) -> dict[str, Any]:
    """A loaded state, each in the memory order of p, as it is to be kept: floats in other floats, or as 8-bit codes.

    Args:
        names: the rule's -> torch's. at: the canonical index of the first element of p. t: the steps done.
    """
    state = dict(state)
    of_m, of_v = names.get("m", ""), names.get("v", "")
    if SCALES in state and SCALES not in wanted:
        rows = [_row(state[name]) for name in (of_m, of_v, SCALES)]
        scales = rows[2].view("u2")
        found = _int8.to_floats(rows[0], rows[1], scales)
        del state[SCALES]
        state |= {of_m: _shaped(found["m"], p), of_v: _shaped(found["v"], p)}
    elif SCALES in wanted and SCALES not in state and of_m in state and of_v in state:
        found = _int8.from_floats(_row(state[of_m].float()), _row(state[of_v].float()), at, t)
        state |= {of_m: _shaped(found["m"], p), of_v: _shaped(found["v"], p)}
        state[SCALES] = torch.from_numpy(found["scales"].view("i2")).to(p.device)
    for name, dtype in wanted.items():
        s = state.get(name)
        if isinstance(s, Tensor) and s.dtype != dtype and s.is_floating_point() and dtype.is_floating_point:
            state[name] = _tensors.in_order_of(s, p, dtype)
    if MASTER in state and MASTER not in wanted:
        del state[MASTER]
    return state


def _row(t: Tensor) -> Any:
    """The elements of a dense tensor in memory order, on the host."""
    return t.detach().as_strided((t.numel(),), (1,)).cpu().numpy()


def _shaped(row: Any, p: Tensor) -> Tensor:
    """Elements in the memory order of p as a tensor of its shape, where it is."""
    found = torch.from_numpy(row)
    made = torch.empty_like(p, dtype=found.dtype, memory_format=torch.preserve_format, requires_grad=False)
    made.as_strided((p.numel(),), (1,)).copy_(found)
    return made
