"""Rules over numbers kept in 16 and 8 bits, as C functions that Numba compiles: loops that convert as they go.

A function has the form of `_numba_kernels`': ``void(row, first element, number of elements, coefficients)``. The row
holds the addresses of p, g, the master if there is one, the states, and the scales of 8-bit ones; then the canonical
index of the row's first element, the seed and t, on which random bits depend.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import types

from fused_adam import _int8, _philox, _storage
from fused_adam._codegen import Rule
from fused_adam._storage import BLOCK8, Format
from fused_adam.backends import _numba_int8, _numba_storage

_MODULES = (_numba_storage, _numba_int8, _philox, _storage, _int8)
_HASH = hashlib.sha256(
    b"".join(Path(f).read_bytes() for f in (__file__, *(str(m.__file__) for m in _MODULES)))
).hexdigest()[:12]


def source(rule: Rule, form: Format) -> str:
    """A loop that converts as it goes; in tiles where random bits, or the scales of 8-bit states, are made for many."""
    int8 = form.states == "int8"
    kinds = {"p": form.p, "g": form.g, "master": form.master or "", **dict.fromkeys(rule.states, form.states)}
    beside = ["master"] if form.master else []
    kept = ["p", "g", *beside, *rule.states, *(["scales"] if int8 else [])]  # in the order of the row
    first, seed, t = (f"_row[{len(kept) + k}]" for k in range(3))
    rounded = [a for a in rule.outputs if form.stochastic_rounding and is_rounded(a, form)]
    tiled = bool(rounded) or int8

    lines = ["def kernel(_row, _lo, _n, _c):"]
    lines += [f"    {c} = _T(_c[{k}])" for k, c in enumerate(rule.coefficients)]
    lines += [f"    _noise_{a} = _tile(_U16)" for a in rounded]
    lines += ["    _tile_m, _tile_v = _tile(_T), _tile(_T)"] if int8 else []
    body = ["_size = min(_TILE, _lo + _n - _at)" if tiled else "_at, _size = _lo, _n"]
    for k, a in enumerate(kept):
        if a == "scales":
            body.append(f"__scales = _view(_row[{k}], _at // 32, 2 * -(-_size // _BLOCK8), _U16).reshape(-1, 2)")
        else:
            kind = _CODES[a] if int8 and a in rule.states else kinds[a]
            name = f"_codes_{a}" if int8 and a in rule.states else f"__{a}"
            body.append(f"{name} = _view(_row[{k}], _at, _size, {_CARRIER[kind]})")
    for a in rounded:
        drawn = f"_noise_{a}[: -(-_size // 8) * 8]"
        body.append(f"_fill_noise({seed}, {t}, {first} + _at, {rule.outputs.index(a)}, {drawn})")
    if int8:
        body += ["__m, __v = _tile_m[:_size], _tile_v[:_size]", "_decode_int8(_codes_m, _codes_v, __scales, __m, __v)"]
    in_pairs = {kinds.get(a) for a in kept} == {"bfloat16"} and not rounded
    if in_pairs:
        body += _loop_over_pairs(rule)
    body.append("for _i in range(_size // 2 * 2, _size):" if in_pairs else "for _i in range(_size):")
    body += [f"    {a} = {_read(a, kinds[a], form)}" for a in ("p", "g", *rule.states)]
    body += [f"    {a.text}" for a in rule.assignments]
    for a in rule.outputs:
        if not (int8 and a in rule.states):
            body += [f"    {line}" for line in _write(a, kinds[a], form, a in rounded)]
    body += [f"    __g[_i] = {_CARRIER[form.g]}(0)"] * rule.zeroes
    if int8:
        body.append("    __m[_i], __v[_i] = _ratio(m, v)")
        body.append(f"_encode_ratios(__m, __v, _codes_m, _codes_v, __scales, {first} + _at, {t})")
    if tiled:
        lines.append("    for _at in range(_lo, _lo + _n, _TILE):")
    return "\n".join([*lines, *(f"    {'    ' * tiled}{line}" for line in body)]) + "\n"


def _loop_over_pairs(rule: Rule) -> list[str]:
    """Over words of two elements: to take them apart and put them together costs less than to widen each."""
    arrays = ("p", "g", *rule.states)
    body = [f"_words_{a} = _view(_row[{k}] + 2 * _at, 0, _size // 2, _U32)" for k, a in enumerate(arrays)]
    body.append("for _i in range(_size // 2):")
    for half in ("lower", "upper"):
        body += [f"    {a} = _{half}(_words_{a}[_i])" for a in arrays]
        body += [f"    {a.text}" for a in rule.assignments]
        body += [f"    _{half}_{a} = {a}" for a in rule.outputs]
    body += [f"    _words_{a}[_i] = _both(_lower_{a}, _upper_{a})" for a in rule.outputs]
    return body + ["    _words_g[_i] = _U32(0)"] * rule.zeroes


def is_rounded(a: str, form: Format) -> bool:
    """Whether an output is rounded to fewer bits than it was computed with, and not by a dither of its own."""
    if a == "p":
        return form.p != "float32" and form.master in (None, "split8")
    return form.states in ("float16", "bfloat16")


_CODES = {"m": "int8", "v": "uint8"}
_CARRIER = {
    "float32": "_T",
    "float16": "_U16",
    "bfloat16": "_U16",
    "split16": "_U16",
    "split8": "_U8",
    "int8": "_I8",
    "uint8": "_U8",
}


def _read(a: str, kind: str, form: Format) -> str:
    if a == "p" and form.master == "float32":
        return "__master[_i]"
    if a == "p" and form.master:
        return f"_from_{form.master}(__p[_i], __master[_i])"
    return f"__{a}[_i]" if kind in ("float32", "int8") else f"_from_{kind}(__{a}[_i])"


def _write(a: str, kind: str, form: Format, stochastically: bool) -> list[str]:
    how, noise = ("_stochastic", f", _noise_{a}[_i]") if stochastically else ("", "")
    if a == "p" and form.master == "float32":
        return ["__master[_i] = p", f"__p[_i] = _to_{kind}(p)"]
    if a == "p" and form.master:
        return [f"__p[_i], __master[_i] = _to_{form.master}{how}(p{noise})"]
    return [f"__{a}[_i] = {a}" if kind == "float32" else f"__{a}[_i] = _to_{kind}{how}({a}{noise})"]


def loop(rule: Rule, form: Format) -> tuple[str, dict[str, Any], str]:
    """What `_numba_kernels.compiled` takes."""
    names = {"_T": types.float32, "_U16": types.uint16, "_U8": types.uint8, "_U32": types.uint32, "_I8": types.int8}
    names |= {
        "_tile": _numba_storage.tile,
        "_TILE": _numba_storage.TILE,
        "_BLOCK8": BLOCK8,
        "_fill_noise": _numba_storage.fill_noise,
    }
    names |= {f"_{name}": getattr(_numba_storage, name) for name in ("lower", "upper", "both")}
    names |= {"_decode_int8": _numba_int8.decode_int8, "_ratio": _numba_int8.ratio}
    names |= {"_encode_ratios": _numba_int8.encode_ratios}
    for kind in ("bfloat16", "float16", "split16", "split8"):
        for name in (f"from_{kind}", f"to_{kind}", f"to_{kind}_stochastic"):
            if hasattr(_numba_storage, name):
                names[f"_{name}"] = getattr(_numba_storage, name)
    return source(rule, form), names, _HASH
