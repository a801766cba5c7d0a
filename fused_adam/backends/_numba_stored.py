"""Rules over numbers kept in 16 bits, as C functions that Numba compiles: decoded and encoded in tiles of the L1 cache.

A function has the form of `_numba_kernels`': ``void(row, first element, number of elements, coefficients)``. The row
holds the addresses of p, g, the master if there is one, and the states; then the canonical index of the row's first
element, the seed and t, which stochastic rounding takes its random bits by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fused_adam import _philox, _storage
from fused_adam._codegen import Rule
from fused_adam._storage import Format
from fused_adam.backends import _numba_storage

TILE = 1024  # elements: p, g, two states and their 16-bit forms fit in 32 KiB beside the noise

_SOURCES = (__file__, _numba_storage.__file__, _philox.__file__, _storage.__file__)
_HASH = hashlib.sha256(b"".join(Path(f).read_bytes() for f in _SOURCES)).hexdigest()[:12]


@intrinsic
def tile(typingctx: Any, dtype: Any) -> Any:
    """TILE elements on the stack, uninitialised: nothing is allocated in mid-step."""
    array = types.Array(dtype.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(array.dtype)
        data = cgutils.alloca_once(builder, element, size=TILE)
        data.align = 64
        size = ir.Constant(ir.IntType(64), array.dtype.bitwidth // 8)
        count = ir.Constant(ir.IntType(64), TILE)
        result = context.make_array(array)(context, builder)
        context.populate_array(
            result, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None, parent=None
        )
        return result._getvalue()

    return array(dtype), codegen


def source(rule: Rule, form: Format) -> str:
    """Tile by tile: decode what is kept in 16 bits, step, encode it."""
    kinds = {"p": form.p, "g": form.g, **dict.fromkeys(rule.states, form.states)}
    places = ["p", "g", *(["master"] if form.master else []), *rule.states]
    if form.master == "float32":
        kinds["p"] = "float32"  # which is the master; the parameter is a copy of it
    kept = [a for a, kind in kinds.items() if kind != "float32" or (a == "p" and form.master)]
    lines = ["def kernel(_row, _lo, _n, _c):"]
    lines += [f"    {c} = _T(_c[{k}])" for k, c in enumerate(rule.coefficients)]
    lines += [f"    _tile_{a} = _tile(_T)" for a in kept if (a, form.master) != ("p", "float32")]
    lines += ["    _noise = _tile(_U16)"] * form.stochastic_rounding
    lines += ["    for _at in range(_lo, _lo + _n, _TILE):", "        _m = min(_TILE, _lo + _n - _at)"]
    body = []
    for k, a in enumerate(places):
        kind = "float32" if a == "master" and form.master == "float32" else kinds.get(a, "bfloat16")
        body.append(f"_at_{a} = _view(_row[{k}], _at, _m, {_CARRIED[kind if a != 'p' else form.p]})")
    for a in ("p", "g", *rule.states):
        if a == "p" and form.master == "float32":
            body.append("__p = _at_master")
        elif a == "p" and form.master:
            body += ["__p = _tile_p[:_m]", "_decode_split16(_at_p, _at_master, __p)"]
        elif a in kept:
            body += [f"__{a} = _tile_{a}[:_m]", f"_decode_{kinds[a]}(_at_{a}, __{a})"]
        else:
            body.append(f"__{a} = _at_{a}")
    body.append("for _i in range(_m):")
    body += [f"    {a} = __{a}[_i]" for a in ("p", "g", *rule.states)]
    body += [f"    {a.text}" for a in rule.assignments]
    body += [f"    __{a}[_i] = {a}" for a in rule.outputs]
    for number, a in enumerate(rule.outputs):
        if a == "p" and form.master == "split16":
            body.append("_encode_split16(__p, _at_p, _at_master)")
        elif a == "p" and form.master == "float32":
            body.append(f"_encode_{form.p}(__p, _at_p)")
        elif a in kept and form.stochastic_rounding:
            first, seed, t = (f"_row[{len(places) + k}]" for k in range(3))
            body.append(f"_fill_noise({seed}, {t}, {first} + _at, {number}, _noise[: -(-_m // 8) * 8])")
            body.append(f"_encode_{kinds[a]}_stochastic(__{a}, _at_{a}, _noise)")
        elif a in kept:
            body.append(f"_encode_{kinds[a]}(__{a}, _at_{a})")
    return "\n".join([*lines, *(f"        {line}" for line in body)]) + "\n"


_CARRIED = {"float32": "_T", "float16": "_U16", "bfloat16": "_U16"}


def loop(rule: Rule, form: Format) -> tuple[str, dict[str, Any], str]:
    """What `_numba_kernels.compiled` takes."""
    names = {"_tile": tile, "_T": types.float32, "_U16": types.uint16, "_TILE": TILE}
    names["_fill_noise"] = _numba_storage.fill_noise
    for name in ("decode", "encode"):
        for kind in ("bfloat16", "float16", "split16", "bfloat16_stochastic", "float16_stochastic"):
            if (f := getattr(_numba_storage, f"{name}_{kind}", None)) is not None:
                names[f"_{name}_{kind}"] = f
    return source(rule, form), names, _HASH
