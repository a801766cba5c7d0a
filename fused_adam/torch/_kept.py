"""What is kept of a parameter: its states, which may have fewer bits, and what stands beside them then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_adam import _formats, _int8, _storage
from fused_adam._codegen import Rule
from fused_adam._formats import Storage
from fused_adam._storage import Format
from fused_adam.torch import _tensors

# As in state dicts of this package. Codes, and the bits of a master beside its parameter, do not have the names of
# numbers: who does not know them has to miss them, not to misread them.
MASTER, LOW, SCALES = "master", "master_low", "scales"
MASTERS = (MASTER, LOW)
CODES = "_codes"
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
    found = {MASTER if form.master == "float32" else LOW: _MASTERS[form.master]} if form.master else {}
    if form.states != "int8":
        return {**found, **{names[s]: _STATES[form.states] for s in rule.states}}
    return {**found, **{names[s] + CODES: _CODES[s] for s in rule.states}, SCALES: torch.int16}


def beside(names: Mapping[str, str]) -> set[str]:
    """All that may be kept of a parameter, by torch's names."""
    return {*names.values(), *(name + CODES for name in names.values()), MASTER, LOW, SCALES}


def shape(called: str, p: Tensor) -> tuple[int, ...]:
    """That of something kept."""
    return (2 * _int8.blocks(p.numel()),) if called == SCALES else tuple(p.shape)


def first(called: str, dtype: torch.dtype, p: Tensor, value: complex) -> Tensor:
    """What is kept before the first step, in the memory order of its parameter. value: what a state starts from."""
    if called == SCALES:
        return torch.zeros(shape(called, p), dtype=dtype, device=p.device)
    if called == MASTER:
        return _tensors.in_order_of(p, p, dtype)
    return _filled(p, dtype, value)


def _filled(p: Tensor, dtype: torch.dtype, value: complex) -> Tensor:
    return torch.full_like(p, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def converted(
    name: str,
    state: dict[str, Any],
    wanted: Mapping[str, torch.dtype],
    names: Mapping[str, str],
    p: Tensor,
    at: int,
    t: int,
) -> dict[str, Any]:
    """A loaded state, each in the memory order of p, as it is to be kept: floats in other floats, or as 8-bit codes.

    Args:
        name: by which messages call the state. names: the rule's -> torch's. at: the canonical index of the first
            element of p. t: the steps done.

    Raises:
        ValueError: it is of no format, or of one that does not become the wanted one.
    """
    state = dict(state)
    m, v = (names.get(s, s) for s in "mv")
    codes = m + CODES, v + CODES, SCALES
    if SCALES in state:
        _check_codes(name, state, codes)
    if SCALES in state and SCALES not in wanted:
        rows = [_row(state.pop(called)) for called in codes]
        found = _int8.to_floats(rows[0], rows[1], rows[2].view("u2"))
        state |= {m: _shaped(found["m"], p), v: _shaped(found["v"], p)}
    elif SCALES in wanted and SCALES not in state and m in state and v in state:
        found = _int8.from_floats(_row(state.pop(m).float()), _row(state.pop(v).float()), at, t)
        state |= {codes[0]: _shaped(found["m"], p), codes[1]: _shaped(found["v"], p)}
        state[SCALES] = torch.from_numpy(found["scales"].view("i2")).to(p.device)
    _convert_master(name, state, wanted, p)
    for called, dtype in wanted.items():
        s = state.get(called)
        if isinstance(s, Tensor) and s.dtype != dtype and s.is_floating_point() and dtype.is_floating_point:
            state[called] = s = _tensors.in_order_of(s, p, dtype)
        if s is None and called not in MASTERS and state:
            raise ValueError(f"{name} has no {called!r}, only {[*state]}; load one that is complete")
        if isinstance(s, Tensor) and s.dtype != dtype:
            raise ValueError(f'{name}["{called}"] has dtype {s.dtype}, of which no {dtype} is made')
    return state


def _check_codes(name: str, state: Mapping[str, Any], codes: tuple[str, str, str]) -> None:
    """Raises ValueError unless they are what steps make."""
    for called, dtype in zip(codes, (*_CODES.values(), torch.int16), strict=True):
        if called not in state or state[called].dtype != dtype:
            raise ValueError(f"{name} has scales, and so should have {called!r} of {dtype}; it has {[*state]}")
    block = _int8.first_corrupt(_row(state[codes[0]]), _row(state[SCALES]).view("u2").reshape(-1, 2))
    if block >= 0:
        raise ValueError(f"{name}: block {block} of its codes, or its scales, holds what no step has made")


def _convert_master(name: str, state: dict[str, Any], wanted: Mapping[str, torch.dtype], p: Tensor) -> None:
    """Between float32 and the bits beside a bfloat16 parameter; one that is not wanted is left out."""
    low, master = state.pop(LOW, None), state.pop(MASTER, None)
    (called,) = wanted.keys() & {*MASTERS} or {""}
    if not called or (low is None and master is None):
        return
    same = master if called == MASTER else low
    if same is not None and same.dtype == wanted[called]:
        state[called] = same
        return
    ours = _row(p.detach().view(torch.int16)).view("u2")
    x = _row(master) if master is not None else _storage.joined(ours, _unsigned(_row(low)))
    if called == MASTER:
        state[MASTER] = _shaped(x, p)
        return
    rounded, beside = _storage.split(x, np.dtype("u2" if wanted[LOW] == torch.int16 else "u1"))
    if not np.array_equal(rounded, ours):
        raise ValueError(f"{name}: its master does not round to the parameter; load the parameters of the run first")
    state[LOW] = _shaped(beside.view("i2") if beside.itemsize == 2 else beside, p)


def _unsigned(row: Any) -> Any:
    return row.view("u2") if row.itemsize == 2 else row


def _row(t: Tensor) -> Any:
    """The elements of a dense tensor in memory order, on the host."""
    return t.detach().as_strided((t.numel(),), (1,)).cpu().numpy()


def _shaped(row: Any, p: Tensor) -> Tensor:
    """Elements in the memory order of p as a tensor of its shape, where it is."""
    found = torch.from_numpy(row)
    made = torch.empty_like(p, dtype=found.dtype, memory_format=torch.preserve_format, requires_grad=False)
    made.as_strided((p.numel(),), (1,)).copy_(found)
    return made
