"""PTX, run on the host: a kernel's one entry as a Python function of one thread, over the host's memory.

One with barriers is a generator, which yields at each. It knows the few instructions that our kernels consist of and
refuses any other. Integers wrap at 64 bits, floats are NumPy scalars, whose operations round as the instructions do.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Thread = Callable[..., Any]  # (parameter, ctaid_x, tid_x, ntid_x)

_COMPARED = {"eq": "==", "ne": "!=", "neu": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INTEGER = {
    "add.s64": "{1} + {2}",
    "sub.s64": "{1} - {2}",
    "mul.lo.s64": "{1} * {2}",
    "mul.wide.s32": "{1} * {2}",
    "shl.b64": "{1} << {2}",
    "shr.s64": "{1} >> {2}",
    "not.b64": "~{1}",
    "div.u32": "{1} // {2}",
    "cvt.u32.u64": "{1} % 2**32",
    "cvt.u64.u32": "{1}",
    "and.b64": "{1} & {2}",
    "or.b64": "{1} | {2}",
    "and.b32": "{1} & {2}",
    "mul.lo.s32": "{1} * {2}",
    "shr.u64": "{1} % 2**64 >> {2}",
    "min.s64": "min({1}, {2})",
    "max.s64": "max({1}, {2})",
    "selp.b64": "{1} if {3} else {2}",
    "cvt.s64.s32": "{1}",
    "mov.u32": "{1}",
    "mov.u64": "{1}",
    "ld.param.u64": "parameter",
    "mov.b64": "integer({1})",
}
_FLOAT = {
    "add.rn": "{1} + {2}",
    "sub.rn": "{1} - {2}",
    "mul.rn": "{1} * {2}",
    "div.rn": "{1} / {2}",
    "sqrt.rn": "sqrt({1})",
    "abs": "abs({1})",
    "mov": "{1}",
    "selp": "{1} if {3} else {2}",
    "cvt.f64": "f64({1})",
    "cvt.rn.f32": "f32({1})",
}
_UPDATES = {"red.global.add.u64": "+", "red.global.or.b64": "|"}
_STORED = {"s32": ctypes.c_int32, "s64": ctypes.c_int64, "f32": ctypes.c_float, "f64": ctypes.c_double}
_STORED |= {"u8": ctypes.c_uint8, "u64": ctypes.c_int64}  # integers here have a sign
_NUMBERS = {"f32": np.float32, "f64": np.float64}


def _wrapped(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _load(kind: str, n: int, address: int) -> Any:
    nbytes = n * ctypes.sizeof(_STORED[kind])
    assert address % nbytes == 0, f"a load of {nbytes} bytes from {address:#x}"
    values = (_STORED[kind] * n).from_address(address)
    return [_NUMBERS[kind](x) for x in values] if kind in _NUMBERS else list(values)


def _store(kind: str, n: int, address: int, *values: Any) -> None:
    nbytes = n * ctypes.sizeof(_STORED[kind])
    assert address % nbytes == 0, f"a store of {nbytes} bytes to {address:#x}"
    assert len(values) == n and all(type(x) is _NUMBERS.get(kind, int) for x in values)
    (_STORED[kind] * n).from_address(address)[:] = values


def _statement(opcode: str, operands: list[str]) -> str:
    """An instruction in Python."""
    name, _, kind = opcode.rpartition(".")
    if opcode in _INTEGER:
        return f"{operands[0]} = wrapped({_INTEGER[opcode].format(*operands)})"
    if opcode in _UPDATES:
        address = operands[0].strip("[]")
        return f"store('u64', 1, {address}, wrapped(load('u64', 1, {address})[0] {_UPDATES[opcode]} {operands[1]}))"
    if opcode == "or.pred":
        return f"{operands[0]} = {operands[1]} or {operands[2]}"
    if access := re.fullmatch(r"(ld|st)\.(?:global|shared)(?:\.cs)?(?:\.v(\d))?", name):
        (address,) = (o.strip("[]") for o in operands if o.startswith("["))
        (values,) = (o.strip("{}") for o in operands if not o.startswith("["))
        what = f"{kind!r}, {access[2] or 1}, {address}"
        return f"[{values}] = load({what})" if access[1] == "ld" else f"store({what}, {values})"
    if kind in _NUMBERS:  # whose literals are 0f and eight digits, 0d and sixteen, or decimal
        operands = [re.sub(r"^0[fd](\w+)$", rf"bits('{kind}', 0x\1)", o) for o in operands]
        operands = [re.sub(r"^-?\d+\.\d+$", rf"{kind}(\g<0>)", o) for o in operands]
    if kind == "u64":
        operands = [*operands[:1], *(f"{o} % 2**64" for o in operands[1:])]
    if (compared := re.fullmatch(r"setp\.(\w+)", name)) and kind in (*_NUMBERS, "s32", "s64", "u64"):
        return f"{operands[0]} = {operands[1]} {_COMPARED[compared[1]]} {operands[2]}"
    if kind in _NUMBERS and name in _FLOAT:
        return f"{operands[0]} = {_FLOAT[name].format(*operands)}"
    raise ValueError(f"no instruction that is known here: {opcode}")


def thread(ptx: str, shared: Mapping[str, Any] | None = None) -> Thread:
    """What one thread does. shared: the memory of its block, by name."""
    text = re.sub(r"//.*", "", ptx)
    (body,) = re.findall(r"\n\{\n(.*)\n\}", text, re.DOTALL)
    body = re.sub(r"\{ (\.reg .*?)\}\n", r"\1\n", body)  # the block around an inline instruction
    body = re.sub(r"\.(reg|pragma)[^;]*;", "", body).replace("%", "")
    body = re.sub(r"\b(ctaid|tid|ntid)\.x", r"\1_x", body)
    pieces = re.split(r"\$(\w+):", body)  # text before a label, the label, the text after it, the next label, ...
    places = {label: k for k, label in enumerate(pieces[1::2], start=1)}
    lines = ["def thread(parameter, ctaid_x, tid_x, ntid_x):", "    at = 0", "    while True:"]
    for k, piece in enumerate(pieces[::2]):
        lines.append(f"        if at == {k}:")
        for instruction in (i.strip() for i in piece.split(";") if i.strip()):
            ((predicate, opcode, rest),) = re.findall(r"^(?:@(!?\w+)\s+)?(\S+)\s*(.*)$", instruction)
            if opcode in ("bra", "bra.uni"):
                statement = f"at = {places[rest.strip('$ ')]}; continue"
            elif opcode == "ret":
                statement = "return"
            elif opcode == "bar.sync":
                statement = "yield"
            else:
                statement = _statement(opcode, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest))
            condition = f"if {predicate.replace('!', 'not ')}: " if predicate else ""
            lines.append(f"            {condition}{statement}")
        lines.append(f"            at = {k + 1}")
    scope: dict[str, Any] = {"wrapped": _wrapped, "load": _load, "store": _store, "sqrt": np.sqrt, **_NUMBERS}
    scope["bits"] = lambda kind, x: np.array(x, f"uint{kind[1:]}").view(_NUMBERS[kind])[()]
    scope["integer"] = lambda x: int(x.view(np.int64))
    scope |= {name: ctypes.addressof(memory) for name, memory in (shared or {}).items()}
    exec("\n".join(lines), scope)
    return scope["thread"]


def block(ptx: str) -> Callable[[int, int, int], None]:
    """What the threads of a block do that has barriers, as a function of (parameter, ctaid_x, ntid_x)."""
    shared = {name: (ctypes.c_uint8 * int(size))() for name, size in re.findall(r"\.shared .* (\w+)\[(\d+)\];", ptx)}
    run = thread(ptx, shared)

    def launched(parameter: int, ctaid_x: int, ntid_x: int) -> None:
        for memory in shared.values():
            ctypes.memset(memory, 0xA5, len(memory))
        threads = [run(parameter, ctaid_x, k, ntid_x) for k in range(ntid_x)]
        waiting = {True}
        while waiting == {True}:
            # No order between two barriers is to be counted on.
            threads.reverse()
            waiting = {next(t, False) is None for t in threads}
        assert waiting == {False}, "not all threads are at the barrier"

    return launched
