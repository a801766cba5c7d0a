"""Byte for byte what NumPy gives of numbers in 16 and 8 bits: every kernel that is offered, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

import fused_adam
from fused_adam import _storage
from fused_adam._checks import Extents
from fused_adam._formats import ADAM, FORMATS, FORMATS_OF_ADAM, RULES
from fused_adam._storage import Format
from fused_adam.backends import Kept, Loose, Rows, load

from .arrays import Library, same
from .bits_api import Row
from .peers import HYPER, our_graph
from .worker import Different, Skipped

# One element, none, several blocks, tails of an access, of a block of 64 and of a chunk.
SHAPES: tuple[tuple[int, ...], ...] = ((10, 13), (1,), (0, 3), (1025,), (128,), (2**15 + 1,), (100_003,))
MAKE: dict[str, Callable[..., Any]] = {
    "momentum": lambda p, **k: fused_adam.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, **k),
    "adam": lambda p, **k: fused_adam.Adam(p, lr=0.01, weight_decay=0.1, maximize=True, **k),
    "adamw": lambda p, **k: fused_adam.AdamW(p, lr=0.01, **k),
    "lion": lambda p, **k: fused_adam.Lion(p, lr=0.01, **k),
    "lionw": lambda p, **k: fused_adam.Lion(p, lr=0.01, weight_decay=0.1, **k),
}
SMALLEST: dict[str, Any] = {"dtype": "bfloat16", "state_dtype": "int8", "master": "split8"}
REPLAYS = 200
_TILE, _WINDOW = 2**24 - 64, 2**16  # repeated, it is another value at i - 2**31
LARGE = 2**31 + 5


def draw(kind: str, seed: int, shapes: Sequence[tuple[int, ...]] = ()) -> list[Any]:
    """Some of each magnitude, with what is not finite and subnormal among the gradients of every fourth seed."""
    rng = np.random.default_rng(seed)
    found = []
    for shape in shapes or SHAPES:
        x = np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-6, 2, shape), np.float32).reshape(-1)
        if seed % 4 == 3 and x.size > 1024:
            x[[0, 5, 77, 500, 1023, 1024]] = [np.nan, np.inf, -np.inf, 1e-41, -0.0, 3e38]
        dtype = np.dtype({"bfloat16": "u2"}.get(kind, kind))
        found.append(_storage.encoded(x, dtype).reshape(shape))
    return found


def kernels() -> list[tuple[str, Format]]:
    return [*product(RULES, FORMATS), *product(ADAM, FORMATS_OF_ADAM)]


def stored_case(lib: Library, backend: str, rule: str, form: Format) -> None:
    """Steps over arrays and over a flat buffer, rounded to nearest and, where anything is rounded, stochastically."""
    _only_cupy(backend)
    rounds = form.p != "float32" or form.states == "bfloat16"
    for stochastic, flat in product((False, True)[: 1 + rounds], (False, True)):
        options = {"master": form.master, "state_dtype": form.states, "dtype": "bfloat16", "seed": 2**40 + 7}
        options["stochastic_rounding"] = stochastic
        host = draw(form.p, 0)
        device: Any = [lib.put(a) for a in host]
        if flat and form.p != "bfloat16":
            device = fused_adam.flatten(device)
        elif flat:
            device = fused_adam.flatten([lib.put(_storage.decoded(a)) for a in host], dtype="bfloat16")
        expected, ours = MAKE[rule](host, backend="numpy", **options), MAKE[rule](device, backend=backend, **options)
        for step in range(1, 6):
            gradients = draw(form.g, step)
            expected.step(gradients, found_inf=step == 4)
            ours.step([lib.put(g) for g in gradients], found_inf=step == 4)
        what = f"stochastic {stochastic}, flat {flat}"
        for k, a in enumerate(host):
            same(f"{what}: parameter {k}", lib.get(device[k]), a)
        _same_states(what, ours, expected)


def replay_case(lib: Library, backend: str) -> None:
    """A captured step of the smallest format, with random bits and a dither of its own each time."""
    _only_cupy(backend)
    (host,), (g,) = (draw("bfloat16", seed, [(50_001,)]) for seed in (0, 1))
    device, given = lib.put(host), lib.put(g)
    how = {**SMALLEST, "stochastic_rounding": True}
    ours = fused_adam.AdamW(device, backend=backend, device_scalars=True, **how)
    expected = fused_adam.AdamW(host, backend="numpy", **how)
    try:
        replay = our_graph([lambda: ours.step(given)])
    except Exception as error:
        raise Skipped(f"the capture was refused: {error}") from error
    for _ in range(REPLAYS):
        replay()
    for _ in range(ours.t):
        expected.step(g)
    same(f"p after {REPLAYS} replays", lib.get(device), host)
    _same_states(f"after {REPLAYS} replays", ours, expected)


def memory_case(lib: Library, backend: str, n: int = 2**26) -> dict[str, Any]:
    """What CuPy's pool holds at most in steps of the smallest format, over what its arrays take."""
    _only_cupy(backend)
    import cupy

    pool = cupy.get_default_memory_pool()
    p, g = (cupy.zeros(n, np.uint16) for _ in range(2))
    fused_adam.AdamW(p[:512].copy(), backend=backend, **SMALLEST).step(g[:512])  # compiles
    pool.free_all_blocks()
    before = pool.total_bytes()
    opt = fused_adam.AdamW(p, backend=backend, **SMALLEST)
    for _ in range(3):
        opt.step(g)
    cupy.cuda.Device().synchronize()
    beside = (p.nbytes + pool.total_bytes() - before) / n  # of the gradient
    most = (pool.total_bytes() - before + p.nbytes + g.nbytes) / (7.0625 * n)
    if beside > 5.1 or most > 1.02:
        raise Different(f"{beside:.4f} bytes a parameter, at most {most:.4f} times the arrays")
    return {"note": f"{beside:.4f} bytes a parameter beside the gradient, at most {most:.4f} times the arrays"}


def large_case(lib: Library, backend: str, n: int = LARGE) -> None:
    """A step of more than 2**31 elements in the smallest format: windows of it are what NumPy makes of them."""
    _only_cupy(backend)
    needed, free = 7.0625 * n + 2**28, lib.free_bytes()
    if needed > free:
        raise Skipped(f"{n} elements need {needed / 2**30:.0f} GiB; {free / 2**30:.0f} are free")
    tiles = [draw("bfloat16", seed, [(min(_TILE, n),)])[0] for seed in (0, 1)]
    p, g = (_repeated(lib, tile, n) for tile in tiles)
    opt = fused_adam.AdamW(p, backend=backend, **HYPER, **SMALLEST)
    opt.step(g)
    update, part = opt._updates()[0], opt._parts[0]
    window = min(_WINDOW, n)
    starts = {0, *(x // 64 * 64 for x in (n // 2, 2**31 - window // 2) if x + window <= n), (n - window) // 64 * 64}
    for lo in sorted(starts):
        hi = min(lo + window, n)
        expected = [tile[np.arange(lo, hi) % tile.size] for tile in tiles]
        rest = [np.zeros(hi - lo, dtype) for dtype in ("u1", "i1", "u1")]
        rest.append(np.zeros(2 * -(-(hi - lo) // 64), np.uint16))
        _numpy_step(update.rule, update.at(1), expected[0], expected[1], rest, lo)
        assert part.master is not None and part.scales is not None
        ours = [p, part.master.views[0], *(s.views[0] for s in part.states.values())]
        for name, a, b in zip(("p", "master", "m", "v"), ours, (expected[0], *rest), strict=False):
            same(f"{name} from element {lo}", lib.get(a[lo:hi]), b)
        same(f"scales from element {lo}", lib.get(part.scales.views[0][lo // 32 :][: rest[-1].size]), rest[-1])


def _numpy_step(rule: Any, values: Sequence[float], p: Any, g: Any, rest: list[Any], first: int) -> None:
    """The first step of a window that begins at this canonical index."""
    kept = Kept(Format("bfloat16", "bfloat16", "int8", "split8"), 0, "bfloat16")
    part = Rows(np.dtype(np.float32), [p.shape], [(p, *rest)], [], kept, [first])
    stepper = load("numpy").Stepper([part], np.zeros(1, np.int64), Extents([p, *rest]))
    stepper.step(1, [rule], [values], [Loose(["g"], [g], [p])])


def _repeated(lib: Library, tile: Any, n: int) -> Any:
    a, lent = lib.empty(n, tile.dtype), lib.put(tile)
    for lo in range(0, n, tile.size):
        hi = min(lo + tile.size, n)
        lib.copy(a[lo:hi], lent[: hi - lo])
    return a


def _only_cupy(backend: str) -> None:
    if backend != "cupy":
        raise Skipped("only CuPy steps over numbers in 16 and 8 bits")


def _same_states(what: str, ours: Any, expected: Any) -> None:
    for k, (mine, theirs) in enumerate(zip(ours.state_dict()["state"], expected.state_dict()["state"], strict=True)):
        for name in theirs:
            same(f"{what}: {name} of parameter {k}", mine[name], theirs[name])
    if ours.t != expected.t:
        raise Different(f"{what}: t {ours.t} against {expected.t}")


def cases() -> list[Row]:
    """The smallest format first, then the rest."""

    def name(rule: str, f: Format) -> str:
        return " ".join(["stored", rule, *filter(None, (f.p, f.g, f.states, f.master))])

    each: list[Row] = [(name(rule, f), stored_case, rule, f) for rule, f in reversed(kernels())]
    more: list[Row] = [
        ("stored replays", replay_case),
        ("stored memory", memory_case),
        ("stored 2**31 + 5", large_case),
    ]
    return [*each[:12], *more, *each[12:]]
