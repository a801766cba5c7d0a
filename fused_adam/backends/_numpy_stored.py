"""NumPy's calls for numbers kept in 16 or 8 bits: chunks are decoded into scratch rows, stepped and encoded again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fused_adam import _int8, _philox, _storage
from fused_adam._arrays import Array
from fused_adam._codegen import Rule
from fused_adam.backends import Kept

Call = tuple[Callable[..., Any], Sequence[Any]]

_local = threading.local()


_Spare = tuple[_storage.Scratch, _philox.Scratch, _int8.Scratch]


def _spare(chunk: int) -> _Spare:
    """This thread's."""
    if not hasattr(_local, "spare"):
        _local.spare = _storage.Scratch(chunk), _philox.Scratch(chunk), _int8.Scratch(chunk)
    spare: _Spare = _local.spare
    return spare


def calls(
    rule: Rule,
    function: Callable[..., None],
    coefficients: Sequence[float],
    p: Array,
    g: Array,
    rest: Sequence[Array],
    kept: Kept,
    first: int,
    scratch: Sequence[Array],
    chunk: int,
) -> list[Call]:
    """Those of one parameter. Every view is made here, before the first write.

    Args:
        function: the rule's, with its scratch rows behind its arrays and coefficients.
        rest: the master if there is one, the states, and the scales of 8-bit ones.
        first: the canonical index of the first element.
        scratch: float32 rows of `chunk` elements for p, g and each state, those of the function, and its mask.
    """
    form = kept.form
    int8 = form.states == "int8"
    scales = rest[-1] if int8 else None
    rest = rest[:-1] if int8 else rest
    names = ["p", "g", *rule.states]
    rows, spares = scratch[: len(names)], scratch[len(names) :]
    scalars = [np.array(x, np.float32) for x in coefficients]
    zero, zero_byte = np.zeros((), np.float32), np.zeros((), np.uint8)
    conversions, noises, codes = _spare(chunk)
    made: list[Call] = []
    for lo in range(0, p.size, chunk):
        n = min(chunk, p.size - lo)
        width = max(n, 2)  # to write one element in place, a ufunc allocates
        stored = {name: a[lo : lo + n] for name, a in zip(names, (p, g, *rest[-len(rule.states) :]), strict=True)}
        master = rest[0][lo : lo + n] if form.master else None
        inside = {name: row[:width] for name, row in zip(names, rows, strict=True)}
        before: list[Call] = []
        after: list[Call] = []

        def noise(number: int, at: int = first + lo, n: int = n, after: list[Call] = after) -> Array | None:
            if not form.stochastic_rounding:
                return None
            filling, drawn = _philox.fill(kept.seed, kept.t, at, n, number, noises)
            after += filling
            return drawn

        for name in names:
            kind = {"p": form.p, "g": form.g}.get(name, form.states)
            number = rule.outputs.index(name) if name in rule.outputs else -1
            row, a = inside[name], stored[name]
            if name == "p" and form.master in ("split16", "split8"):
                assert master is not None
                before += _storage.decode_split(a, master, row, conversions)
                bits = noise(0) if form.master == "split8" else None
                after += _storage.encode_split(row, a, master, conversions, bits)
            elif name == "p" and form.master == "float32":
                assert master is not None
                before.append((np.copyto, (row[:n], master)))
                after += [(np.copyto, (master, row[:n])), *_storage.encode(row, a, conversions)]
            elif int8 and name in rule.states:
                pass  # both at once, below
            elif kind != "float32":
                before += _storage.decode(a, row)
                if number >= 0:
                    after += _storage.encode(row, a, conversions, noise(number))
            elif n > 1 and a.flags.aligned:
                inside[name] = a
            else:
                before.append((np.copyto, (row[:n].view(np.uint8), a.view(np.uint8))))
                if number >= 0:
                    after.append((np.copyto, (a.view(np.uint8), row[:n].view(np.uint8))))
        if scales is not None:
            own = scales[lo // 32 :][: 2 * _int8.blocks(n)].reshape(-1, 2)
            m, v = (row[: _int8.padded(n)] for row in rows[2:4])
            before += _int8.decode(stored["m"], stored["v"], own, m, v, codes)
            after += _int8.encode(m, v, stored["m"], stored["v"], own, first + lo, kept.t, codes)
        if rule.zeroes:
            after.append((np.copyto, (stored["g"].view(np.uint8), zero_byte)))
        arguments = [*inside.values(), *scalars, *(row[:width] for row in spares), zero]
        made += [*before, (function, arguments), *after]
    return made
