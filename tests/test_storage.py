"""16-bit numbers, split masters and random bits: the same from NumPy, Numba and the CUDA C++, and the right ones."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from conftest import require
from storage_cases import ENGINES, Tile, names, numba, numpy_calls, same_tiles

from fused_adam import _philox, _storage

LARGE = 2**22
ALL16 = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 1000, LARGE])
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("engine", ["numba", "host"])
def test_same_bits(engine: str, name: str, n: int) -> None:
    tile = Tile.random(n)
    ours, expected = tile.copy(), tile.copy()
    ENGINES[engine](name, ours)
    ENGINES["numpy"](name, expected)
    assert not same_tiles(ours, expected)


def tile_of(x: Any = None, p: Any = None) -> Tile:
    """With these float32 numbers, or numbers of 16 bits."""
    n = p.size if x is None else x.size
    zeros = {name: np.zeros(n, a.dtype) for name, a in Tile.random(1).arrays.items()}
    return replace(Tile.random(1), **zeros | ({"p": p.copy()} if x is None else {"x": np.array(x, np.float32)}))


def around(x: Any) -> Any:
    """Float32 bits beside these on either side, as far as rounding can look; of either sign."""
    steps = np.array([-0x8001, -0x8000, -0x7FFF, -0x1001, -0x1000, -0xFFF, -0x81, -0x80, -0x7F, -1, 0, 1], np.int64)
    steps = np.concatenate([steps, -steps])
    bits = (np.asarray(x, np.int64)[:, np.newaxis] + steps).ravel() & 0x7FFFFFFF
    return np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)


def floats() -> Any:
    """Every bfloat16 and what is around it, and random bits."""
    return np.concatenate([around(ALL16[: 2**15].astype(np.int64) << 16), Tile.random(LARGE).x])


def float16_floats() -> Any:
    """Every float16, half-way numbers between two, and what is around these; random bits of its exponents."""
    halves = ALL16[:0x7C01].view(np.float16).astype(np.float64)
    halves[-1] = 65536
    middle = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2]).astype(np.float32).view(np.int32)
    bits = Tile.random(LARGE).x.view(np.uint32)
    near = (bits & 0x87FFFFFF) + np.uint32(0x30000000) + (bits & 0x08000000) * np.uint32(2)
    return np.concatenate([around(middle), near.view(np.float32)])


@pytest.mark.parametrize(("name", "values"), [("bfloat16", floats), ("float16", floats), ("float16", float16_floats)])
def test_nearest(name: str, values: Any) -> None:
    x = values()
    tile = tile_of(x)
    numba(f"encode_{name}", tile)
    with np.errstate(all="ignore"):
        dtype = np.float16 if name == "float16" else require("ml_dtypes").bfloat16
        expected = x.astype(dtype).view(np.uint16)
    nan = np.isnan(x)
    assert np.array_equal(tile.p[~nan], expected[~nan])
    assert set(tile.p[nan]) == {_storage.NAN_F16 if name == "float16" else _storage.NAN_BF16}


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_all_16_bits_come_back(name: str) -> None:
    tile = tile_of(p=ALL16)
    numba(f"decode_{name}", tile)
    dtype = np.float16 if name == "float16" else require("ml_dtypes").bfloat16
    expected = ALL16.view(dtype).astype(np.float32)
    assert np.array_equal(tile.x.view(np.uint32), expected.view(np.uint32))
    for rounding in ("", "_stochastic"):
        numba(f"encode_{name}{rounding}", tile)
        assert np.array_equal(tile.p[~np.isnan(expected)], ALL16[~np.isnan(expected)])


# --- masters ----------------------------------------------------------------------------------------------------------


def split(x: Any, kind: str) -> tuple[Tile, Any]:
    """Encoded, and what comes back."""
    tile = tile_of(x)
    numba(f"encode_{kind}", tile)
    back = tile.copy()
    numba(f"decode_{kind.removesuffix('_stochastic')}", back)
    return tile, back.x


def test_split16_is_exact() -> None:
    x = np.concatenate([floats(), np.random.default_rng(0).integers(0, 2**32, 2**24, np.uint32).view(np.float32)])
    tile, back = split(x, "split16")
    nan = np.isnan(x)
    assert np.array_equal(back.view(np.uint32)[~nan], x.view(np.uint32)[~nan]) and np.isnan(back[nan]).all()
    # The parameter is the nearest bfloat16; half-way between two, the one further from zero.
    numba("encode_bfloat16", nearest := tile_of(x))
    tie = x.view(np.uint32) & 0xFFFF == 0x8000
    assert np.array_equal(tile.p[~tie], nearest.p[~tie])
    away = (x.view(np.uint32)[tie & ~nan] >> 16) + 1
    assert np.array_equal(tile.p[tie & ~nan], away)


def test_split8_keeps_24_bits() -> None:
    x = floats()
    tile, back = split(x, "split8")
    nan = np.isnan(x)
    bits = x.view(np.uint32)[~nan].astype(np.int64)
    nearest = (bits + 0x7F + (bits >> 8 & 1)) >> 8 << 8
    assert np.array_equal(back.view(np.uint32)[~nan], nearest) and np.isnan(back[nan]).all()
    assert np.array_equal(tile.p[~nan], (nearest + 0x8000) >> 16)
    again, once_more = split(back, "split8")  # what was rounded stays
    assert np.array_equal(once_more[~nan], back[~nan]) and np.array_equal(again.low8[~nan], tile.low8[~nan])
    normal = (np.abs(x) >= 2.0**-126) & (np.abs(x) < 3e38)
    assert np.all(np.abs(back[normal].astype(np.float64) / x[normal] - 1) <= 2.0**-16)


@pytest.mark.parametrize(
    ("bits", "p", "low"),
    [
        (0x3F800000, 0x3F80, 0),
        (0x3F807FFF, 0x3F80, 0x7FFF),
        (0x3F808000, 0x3F81, 0x8000),  # half-way, and even would be below
        (0x3F818000, 0x3F82, 0x8000),
        (0x3F80FFFF, 0x3F81, 0xFFFF),
        (0xBF80FFFF, 0xBF81, 0xFFFF),
        (0x3FFFFFFF, 0x4000, 0xFFFF),  # in the binade above
        (0x00000001, 0x0000, 0x0001),
        (0x80008000, 0x8001, 0x8000),
        (0x80000000, 0x8000, 0),
        (0x7F7FFFFF, 0x7F80, 0xFFFF),  # the parameter is inf, the master is not
        (0xFF800000, 0xFF80, 0),
        (0x7F800001, 0x7FC0, 0),
        (0xFFFFFFFF, 0x7FC0, 0),
    ],
)
def test_split16_by_hand(bits: int, p: int, low: int) -> None:
    tile, _ = split(np.full(3, bits, np.uint32).view(np.float32), "split16")
    assert set(tile.p) == {p} and set(tile.low) == {low}


# --- stochastic rounding ----------------------------------------------------------------------------------------------

KINDS = ("bfloat16", "float16", "split8")


def stochastic(x: Any, kind: str, noise: Any = None, seed: int = 0) -> Any:
    """Float32 numbers rounded to a format and back."""
    tile = tile_of(x)
    tile.noise = noise_of(x.size, seed) if noise is None else noise
    numba(f"encode_{kind}_stochastic", tile)
    numba(f"decode_{kind}", tile)
    return tile.x


def noise_of(n: int, seed: int = 0, t: int = 1, first: int = 0, stream: int = 0) -> Any:
    tile = replace(tile_of(p=np.zeros(n, np.uint16)), seed=seed, t=t, first=first, stream=stream)
    numba("fill_noise", tile)
    return tile.noise


def neighbours(x: float, kind: str) -> tuple[Fraction, Fraction]:
    """The numbers of the format at and around abs(x)."""
    bits = int(np.float32(abs(x)).view(np.uint32))
    if kind == "float16":
        e = max(-14, int(np.floor(np.log2(abs(x)))))
        unit = Fraction(2) ** (e - 10)
        low = Fraction(float(abs(np.float32(x)))) // unit * unit
        return low, low + unit
    cut = 16 if kind == "bfloat16" else 8
    ends = [np.uint32((bits >> cut) + k << cut).view(np.float32) for k in (0, 1)]
    return Fraction(float(ends[0])), Fraction(float(ends[1]))


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        *(("bfloat16", x) for x in (1.001, -3.14159, 1e-39, 5e20)),
        *(("float16", x) for x in (1.0001, -3.14159, 1e-5, -1e-7, 3e-8, 60000.5)),
        *(("split8", x) for x in (1.00001, -3.14159265, 1e-39)),
    ],
)
def test_unbiased(kind: str, x: float) -> None:
    """Of 1e7 draws, the mean is within four standard errors of x, and each is one of the two numbers around it."""
    n = 10**7
    value = np.float32(x)
    got = np.abs(stochastic(np.full(n, value), kind, seed=3))
    low, high = neighbours(x, kind)
    up = np.count_nonzero(got == float(high))
    assert up + np.count_nonzero(got == float(low)) == n
    share = float((abs(Fraction(float(value))) - low) / (high - low))
    assert abs(up / n - share) <= 4 * np.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_two_neighbours(kind: str) -> None:
    """Between those that the least and the most noise give, which have at most one step between them."""
    x = float16_floats() if kind == "float16" else floats()
    down = stochastic(x, kind, np.zeros(x.size, np.uint16))
    up = stochastic(x, kind, np.full(x.size, 0xFFFF, np.uint16))
    got = stochastic(x, kind)
    nan = np.isnan(x)
    assert np.isnan(got[nan]).all()
    assert np.all((got == down) | (got == up) | nan)
    exact = (down == x) & ~nan
    assert np.array_equal(got[exact], x[exact]) and np.isinf(got[np.isinf(x)]).all()


@pytest.mark.parametrize(
    ("kind", "bits", "expected"),
    [
        ("bfloat16", 0x7F7F0000, 0x7F7F0000),
        ("bfloat16", 0x7F7F7FFF, 0x7F7F0000),
        ("bfloat16", 0x7F7F8000, 0x7F800000),
        ("float16", 0x477FE000, 0x477FE000),
        ("float16", 0x477FEFFF, 0x477FE000),
        ("float16", 0x477FF000, 0x7F800000),  # 65520
        ("float16", 0x7F7FFFFF, 0x7F800000),
        ("float16", 0x2C800000, 0x00000000),  # half of 2**-37
        ("split8", 0x7F7FFF7F, 0x7F7FFF00),
        ("split8", 0x7F7FFF80, 0x7F800000),
    ],
)
def test_ends_of_the_range(kind: str, bits: int, expected: int) -> None:
    """Where rounding is to nearest, whatever the noise."""
    for sign in (0, 0x80000000):
        for noise in (0, 0xFFFF):
            x = np.full(3, bits | sign, np.uint32).view(np.float32)
            got = stochastic(x, kind, np.full(3, noise, np.uint16))
            assert got.view(np.uint32).tolist() == [expected | sign] * 3


# The known answers of Random123: counter, key, draw.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "draw"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], draw: list[int]) -> None:
    rows = [np.full(2, word, np.uint64) for word in (*counter, 0, 0)]
    _storage.run(_philox.rounds(rows, key[0] | key[1] << 32))
    assert [row[0] for row in rows[:4]] == draw


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_counter_is(engine: str) -> None:
    """Seed, step, index and stream where `_philox` says; of its last known answer as near as the layout comes."""
    tile = Tile.random(8)
    tile.seed, tile.t = 0x299F31D0_A4093822, 0x03707344_13198A2E
    tile.first, tile.stream = 0x05A308D3_243F6A88 * 8, 0x8
    ENGINES[engine]("fill_noise", tile)
    assert tile.noise.view(np.uint32).tolist() == KNOWN[2][2]


def test_noise_depends_on_nothing_else() -> None:
    whole = noise_of(4096, seed=7, t=5, first=1024)
    for lo, n in ((0, 8), (8, 1000), (1008, 3088), (4088, 5)):
        assert np.array_equal(noise_of(n, seed=7, t=5, first=1024 + lo), whole[lo : lo + n])
    others = [noise_of(4096, 8, 5, 1024), noise_of(4096, 7, 6, 1024), noise_of(4096, 7, 5, 5120)]
    others.append(noise_of(4096, 7, 5, 1024, stream=1))
    assert all(np.mean(whole == other) < 1e-3 for other in others)


@pytest.mark.parametrize("name", [name for name in names() if not name.startswith("encode_int8_by")])
@pytest.mark.parametrize("n", [1, 2, 64, 65, 2**15])
def test_no_call_allocates(name: str, n: int) -> None:
    """But for the few words that NumPy keeps for itself."""
    calls = numpy_calls(name, Tile.random(n))
    _storage.run(calls)
    with np.errstate(all="ignore"):
        for f, arguments in calls:
            tracemalloc.start()
            f(*arguments)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 256, f"{f.__name__} {[getattr(a, 'shape', a) for a in arguments]}: {peak} bytes"


# --- formats ----------------------------------------------------------------------------------------------------------
