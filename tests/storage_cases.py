"""Conversions of number formats by NumPy, Numba and the CUDA C++ as g++ builds it, under one name each."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import require
from host_kernel import build

from fused_adam import _int8, _philox, _storage
from fused_adam.backends._cuda_source import folder

KERNEL = Path(__file__).with_name("storage_kernel.cu")


@dataclass
class Tile:
    """What conversions read and write. y: v, where x is m. p: float16 and bfloat16 too, as uint16."""

    x: Any
    y: Any
    p: Any
    low: Any
    noise: Any
    low8: Any
    q_m: Any
    q_v: Any
    scales: Any
    seed: int = 0
    t: int = 1
    first: int = 0
    stream: int = 0

    @classmethod
    def random(cls, n: int, seed: int = 0) -> Tile:
        """All bits at random: of x, an equal share of every exponent, NaNs and infinities among them."""
        rng = np.random.default_rng([n, seed])

        def bits(dtype: str) -> Any:
            return np.frombuffer(rng.bytes(n * np.dtype(dtype).itemsize), dtype).copy()

        blocks = -(-n // _storage.BLOCK8)
        scales = (rng.integers(0x100, 0x7F60, (blocks, 2)) & 0x7FE0).astype(np.uint16)
        some = [bits(dtype) for dtype in ("f4", "f4", "u2", "u2", "u2", "u1", "i1", "u1")]
        return cls(*some, scales, *(int(k) for k in rng.integers(0, 2**60, 2)), 8 * int(rng.integers(0, 2**40)), 3)

    @property
    def arrays(self) -> dict[str, Any]:
        return {f.name: a for f in fields(self) if isinstance(a := getattr(self, f.name), np.ndarray)}

    def copy(self) -> Tile:
        return replace(self, **{name: a.copy() for name, a in self.arrays.items()})


def same_tiles(a: Tile, b: Tile) -> str:
    """What differs first, all NaNs of float32 taken as one; "" for nothing."""
    for name, x in a.arrays.items():
        y = b.arrays[name]
        bits = np.dtype(f"u{x.dtype.itemsize}")
        wrong = x.view(bits) != y.view(bits)
        if x.dtype == np.float32:
            wrong &= ~(np.isnan(x) & np.isnan(y))
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            return f"{name}: {np.count_nonzero(wrong)} differ, first [{i}] {x.flat[i]!r} {y.flat[i]!r}"
    return ""


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _row(x: Any, n: int) -> Any:
    row = np.full(max(n, 2), np.nan, np.float32)
    row[: x.size] = x
    return row


def numpy_calls(name: str, tile: Tile) -> list[_storage.Call]:
    n, scratch = tile.p.size, _storage.Scratch(tile.p.size)
    x, noise = _row(tile.x, n), tile.noise if "stochastic" in name else None
    outcome: list[_storage.Call] = []  # what goes back into the tile
    if name == "fill_noise":
        calls, made = _philox.fill(tile.seed, tile.t, tile.first, n, tile.stream, _philox.Scratch(n))
        outcome = [(np.copyto, (tile.noise, made))]
    elif "int8" in name:
        m, v = (_row(a, _int8.padded(n)) for a in (tile.x, tile.y))
        codes, room = (tile.q_m, tile.q_v, tile.scales), _int8.Scratch(n)
        if name == "decode_int8":
            calls = _int8.decode(*codes, m, v, room)
            outcome = [(np.copyto, (tile.x, m[:n])), (np.copyto, (tile.y, v[:n]))]
        else:
            calls = _int8.encode(m, v, *codes, tile.first, tile.t, room)
    else:
        stored = tile.p.view(np.float16) if "_float16" in name else tile.p
        low = tile.low8 if "split8" in name else tile.low
        if name.startswith("decode"):
            calls = _storage.decode_split(stored, low, x, scratch) if "split" in name else _storage.decode(stored, x)
            outcome = [(np.copyto, (tile.x, x[:n]))]
        elif "split" in name:
            calls = _storage.encode_split(x, stored, low, scratch, noise)
        else:
            calls = _storage.encode(x, stored, scratch, noise)
    return [*calls, *outcome]


def numpy(name: str, tile: Tile) -> None:
    _storage.run(numpy_calls(name, tile))


# --- Numba ------------------------------------------------------------------------------------------------------------

_TAKES = {"bfloat16": ("p",), "float16": ("p",), "split16": ("p", "low"), "split8": ("p", "low8")}


def numba(name: str, tile: Tile) -> None:
    require("numba")
    import storage_tiles

    from fused_adam.backends import _numba_int8, _numba_storage

    if name == "fill_noise":
        noise = np.empty(-(-tile.p.size // 8) * 8, np.uint16)
        _numba_storage.fill_noise(tile.seed, tile.t, tile.first, tile.stream, noise)
        tile.noise[:] = noise[: tile.p.size]
    elif name == "decode_int8":
        _numba_int8.decode_int8(tile.q_m, tile.q_v, tile.scales, tile.x, tile.y)
    elif name.startswith("encode_int8"):
        m, v = tile.x.copy(), tile.y.copy()  # which are written over
        storage_tiles.encode_int8(m, v, tile.q_m, tile.q_v, tile.scales, tile.first, tile.t)
    else:
        stored = [getattr(tile, a) for a in _TAKES[name.split("_")[1]]]
        noise = [tile.noise] if "stochastic" in name else []
        rows = [*stored, tile.x] if name.startswith("decode") else [tile.x, *stored, *noise]
        getattr(storage_tiles, name)(*rows)


# --- CUDA C++ on the host ---------------------------------------------------------------------------------------------

_INTEGERS, _POINTERS = ("what", "n", "seed", "t", "first", "stream"), ("x", "y", "p", "low", "noise")
ARGUMENTS = np.dtype([(f, "i8") for f in (*_INTEGERS, *_POINTERS, "low8", "q_m", "q_v", "scales")])


def kernel() -> str:
    """The text of the tests' kernel."""
    parts = [part.read_text() for part in (folder() / "step.cuh", folder() / "storage.cuh", KERNEL)]
    return "\n".join([*parts, f"static_assert(sizeof(Arguments) == {ARGUMENTS.itemsize});"])


@cache
def names() -> list[str]:
    """Of the conversions, as Numba's functions are called; and those of other launches."""
    (listed,) = re.findall(r"enum What \{(.*?)\}", KERNEL.read_text(), re.S)
    return re.findall(r"\w+", listed.lower())


def host(name: str, tile: Tile, text: str = "") -> None:
    """text: of another kernel than the tests' own."""
    launch = build(text or kernel(), "convert")
    arguments = np.zeros((), ARGUMENTS)
    arguments["what"], arguments["n"] = names().index(name), tile.p.size
    for field in ("seed", "t", "first", "stream"):
        arguments[field] = getattr(tile, field)
    for field, a in tile.arrays.items():
        arguments[field] = ctypes.c_void_p(a.ctypes.data).value
    launch(1, arguments)


ENGINES: dict[str, Callable[[str, Tile], None]] = {"numpy": numpy, "numba": numba, "host": host}
