"""Parameters, gradients and states in 16 bits: what is offered, the same bits on every backend, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bits

import fused_adam
from fused_adam import _storage
from fused_adam._formats import ADAM, FORMATS, FORMATS_OF_ADAM, RULES
from fused_adam.backends import load

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
# One element, none, the ends of a tile of Numba's and of a chunk of NumPy's and of Numba's.
SHAPES = [(10, 13), (1,), (0, 3), (1025,), (2**15 + 1,), (2**16 + 3,), (128,)]
MAKE: dict[str, Any] = {
    "momentum": lambda p, **k: fused_adam.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, **k),
    "adam": lambda p, **k: fused_adam.Adam(p, lr=0.01, weight_decay=0.1, maximize=True, **k),
    "adamw": lambda p, **k: fused_adam.AdamW(p, lr=0.01, **k),
    "lion": lambda p, **k: fused_adam.Lion(p, lr=0.01, **k),
    "lionw": lambda p, **k: fused_adam.Lion(p, lr=0.01, weight_decay=0.1, **k),
}
assert set(MAKE) == set(RULES)
ROWS = [(rule, form, False) for rule in MAKE for form in FORMATS]
ROWS += [(rule, form, False) for rule in ADAM for form in FORMATS_OF_ADAM]
ROWS += [
    ("adamw", form, True)
    for form in (*FORMATS, *FORMATS_OF_ADAM)
    if "float16" in form.states or (form.master in (None, "split8") and form.p != "float32")
]
IDS = [
    " ".join(filter(None, (rule, f.p, f.g, f.states, f.master, "stochastic" * stochastic)))
    for rule, f, stochastic in ROWS
]
rows = pytest.mark.parametrize(("rule", "form", "stochastic"), ROWS, ids=IDS)


def options(form: _storage.Format, stochastic: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "master": form.master,
        "state_dtype": form.states,
        "stochastic_rounding": stochastic,
        "seed": 2**40 + 7,
        **more,
    }


def draw(kind: str, seed: int, special: bool = False) -> list[Any]:
    """Some of each magnitude; with what is not finite and what is subnormal among it."""
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-6, 2, shape), np.float32) for shape in SHAPES]
    if special:
        arrays[3][[0, 5, 77, 500, 1023, 1024]] = [np.nan, np.inf, -np.inf, 1e-41, -0.0, 3e38]
    with np.errstate(over="ignore"):
        return [a.astype(DTYPES[kind]) for a in arrays]


def carried(a: Any) -> Any:
    return a.view(np.uint16) if a.dtype == BF16 else a


def same(a: Any, b: Any) -> bool:
    """The same numbers bit for bit; all NaNs count as one."""
    return same_bits(np.asarray(a, np.float32), np.asarray(b, np.float32)) and a.dtype == b.dtype


def same_runs(a: Any, b: Any, p: list[Any], q: list[Any]) -> None:
    assert all(map(same, p, q))
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours["t"] == theirs["t"]
    for x, y in zip(ours["state"], theirs["state"], strict=True):
        assert x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)


@rows
def test_bits(rule: str, form: _storage.Format, stochastic: bool) -> None:
    """NumPy's and Numba's."""
    runs = []
    for backend in ("numpy", "numba"):
        p = draw(form.p, 0)
        opt = MAKE[rule](p, backend=backend, **options(form, stochastic))
        for n in range(1, 5):
            opt.step(draw(form.g, n, special=n == 3))
        runs.append((opt, p))
    (a, p), (b, q) = runs
    same_runs(a, b, p, q)
    start = draw(form.p, 0)
    assert all(not same(x, y) for x, y in zip(p, start, strict=True) if x.size)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("master", ["float32", "split16"])
def test_a_master_has_the_bytes_of_a_float32_run(rule: str, master: str, backend: str) -> None:
    p = draw("bfloat16", 0)
    wanted = [a.astype(np.float32) for a in p]
    opt, expected = MAKE[rule](p, backend=backend, master=master), MAKE[rule](wanted, backend=backend)
    for n in range(1, 6):
        g = draw("bfloat16", n, special=n == 4)
        opt.step(g)
        expected.step([a.astype(np.float32) for a in g])
        for k, (x, s, e) in enumerate(zip(p, opt.state_dict()["state"], expected.state_dict()["state"], strict=True)):
            assert same_bits(s.pop("master"), wanted[k])
            assert s.keys() == e.keys() and all(same_bits(s[name], e[name]) for name in s)
            if master == "float32":
                assert same(x, wanted[k].astype(BF16))
            else:  # which rounds ties away from zero
                bits = wanted[k].view(np.uint32)
                rounded = ((bits + np.uint32(0x8000)) >> 16).astype(np.uint16)
                finite = ~np.isnan(wanted[k])
                assert np.array_equal(carried(x)[finite], rounded[finite])


def test_lists_and_flat_buffers_are_alike(backend: str) -> None:
    """With random bits by canonical index: the same in any layout."""
    runs = []
    for flat in (False, True):
        p: Any = dict(enumerate(draw("bfloat16", 0)))
        p = fused_adam.flatten(p) if flat else p
        opt = fused_adam.AdamW(p, lr=0.01, state_dtype="bfloat16", stochastic_rounding=True, backend=backend)
        for n in range(1, 4):
            g: Any = dict(enumerate(draw("bfloat16", n)))
            opt.step(fused_adam.flatten(g) if flat else g)
        runs.append((opt, [p[k] for k in range(len(SHAPES))]))
    (a, p), (b, q) = runs
    same_runs(a, b, p, q)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 257, 2**16 + 5])
@pytest.mark.parametrize("off", [(0, 1), (1, 0), (1, 3)])
def test_arrays_from_an_odd_place_on(n: int, off: tuple[int, int]) -> None:
    """Loops over words of two elements ask for no more than an element's alignment."""
    runs = []
    for backend in ("numpy", "numba"):
        rng = np.random.default_rng(n)
        p, g = (rng.normal(size=n + k).astype(np.float32).astype(BF16)[k:] for k in off)
        opt = fused_adam.AdamW([p], lr=0.01, state_dtype="bfloat16", backend=backend)
        for _ in range(3):
            opt.step([g])
        runs.append((opt, [p]))
    (a, p), (b, q) = runs
    same_runs(a, b, p, q)


def test_random_bits_depend_on_seed_step_and_index(backend: str) -> None:
    g = np.full(256, 1e-3, np.float32).astype(BF16)

    def moved(seed: int, steps: int = 1, before: int = 0) -> Any:
        params = [np.ones(before, BF16), p := np.ones(256, BF16)]
        opt = fused_adam.AdamW(params, lr=1e-3, stochastic_rounding=True, seed=seed, backend=backend)
        for _ in range(steps):
            opt.step([np.ones(before, BF16), g])
        return p

    one = moved(1)
    assert same(one, moved(1)) and len(np.unique(one)) == 2  # some were rounded up, some down
    for other in (moved(2), moved(1, before=1), moved(1, steps=2)):
        assert not same(one, other)
    mean = np.mean([moved(seed).astype(np.float64).mean() for seed in range(40)])
    exact = 1 - 1e-3 * (1 + 1e-2)
    spread = 2**-8 * 0.5 / np.sqrt(40 * 256)  # at most, of the mean
    assert abs(mean - exact) < 4 * spread


def test_uint16_says_that_it_is_bfloat16(backend: str) -> None:
    p, g = draw("bfloat16", 0)[0], draw("bfloat16", 1)[0]
    q = p.copy().view(np.uint16)
    fused_adam.AdamW(p, backend=backend).step(g)
    fused_adam.AdamW(q, dtype="bfloat16", backend=backend).step(g.view(np.uint16))
    assert np.array_equal(p.view(np.uint16), q)
    flat = fused_adam.flatten({"W": p.astype(np.float32)}, dtype="bfloat16")
    assert flat.data.dtype == np.uint16 and np.array_equal(flat["W"], p.view(np.uint16))
    opt = fused_adam.AdamW(flat, dtype="bfloat16", backend=backend)
    opt.step(flat.zeros_like())
    with pytest.raises(ValueError, match="grads has dtype uint16; if it holds bfloat16 say so, with dtype='bfloat16'"):
        fused_adam.AdamW(p, backend=backend).step(g.view(np.uint16))


@rows
def test_a_run_goes_on_bit_for_bit(rule: str, form: _storage.Format, stochastic: bool) -> None:
    """From a state dict, a pickle and a copy; states and masters are float32 in it."""
    p = draw(form.p, 0)
    opt = MAKE[rule](p, **options(form, stochastic))
    for n in range(1, 3):
        opt.step(draw(form.g, n))
    saved = opt.state_dict()
    codes = {"m": np.int8, "v": np.uint8, "scales": np.uint16} if form.states == "int8" else {}
    assert all(a.dtype == codes.get(name, np.float32) for state in saved["state"] for name, a in state.items())
    q = [a.copy() for a in p]
    again = MAKE[rule](q, **options(form, stochastic, backend="numba"))
    again.load_state_dict(saved)
    copied = copy.deepcopy(opt)
    unpickled = pickle.loads(pickle.dumps(opt))
    g = draw(form.g, 3)
    for one in (opt, again, copied, unpickled):
        one.step(g)
    same_runs(opt, again, p, q)
    for one in (copied, unpickled):
        same_runs(opt, one, p, one.param_groups[0]["params"])


def test_at_most_60_kernels_are_offered() -> None:
    assert len(RULES) * len(FORMATS) + len(ADAM) * len(FORMATS_OF_ADAM) <= 60
    assert len({*FORMATS, *FORMATS_OF_ADAM}) == len(FORMATS) + len(FORMATS_OF_ADAM)


def test_codes_become_float32_and_codes_again(backend: str) -> None:
    """Of a run with 8-bit states: near what float32 ones are, and as near when they are encoded anew."""
    p, q = (draw("float32", 0) for _ in range(2))
    opt, full = fused_adam.AdamW(p, state_dtype="int8", backend=backend), fused_adam.AdamW(q, backend=backend)
    for n in range(1, 9):
        for one in (opt, full):
            one.step(draw("float32", n))
    wanted = [{name: a.copy() for name, a in state.items()} for state in full.state_dict()["state"]]
    full.load_state_dict(opt.state_dict())
    decoded = full.state_dict()
    opt.load_state_dict(decoded)
    full.load_state_dict(opt.state_dict())
    for saved in (decoded, full.state_dict()):
        for mine, theirs in zip(saved["state"], wanted, strict=True):
            if mine["m"].size > 1000:
                off = mine["m"] / np.sqrt(mine["v"] + 1e-30) - theirs["m"] / np.sqrt(theirs["v"] + 1e-30)
                assert float(np.sqrt(np.mean(off**2))) < 0.1


def test_a_corrupt_block_is_named(backend: str) -> None:
    p = draw("float32", 0)
    opt = fused_adam.AdamW(p, state_dtype="int8", backend=backend)
    opt.step(draw("float32", 1))
    for change, message in (
        (
            lambda s: s["scales"].__setitem__(7, 0xFFFF),
            re.escape('["state"][3]["scales"]: block 3, of elements from 192'),
        ),
        (lambda s: s["m"].__setitem__(700, -128), re.escape('["state"][3]["scales"]: block 10, of elements from 640')),
        (lambda s: s.update(scales=s["scales"][:-2]), r"scales.* has shape \(32,\) and dtype uint16; expected \(34,\)"),
        (lambda s: s.update(m=s["m"].astype(np.int16)), "dtype int16"),
    ):
        saved = opt.state_dict()
        change(saved["state"][3])
        before = opt.state_dict()
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(saved)
        assert all(
            same(a, b)
            for x, y in zip(before["state"], opt.state_dict()["state"], strict=True)
            for a, b in zip(x.values(), y.values(), strict=True)
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_no_gradient_ruins_a_block(value: float, backend: str) -> None:
    p, q = np.ones(256, np.float32), np.ones(256, np.float32)
    opt = fused_adam.AdamW(p, lr=0.01, state_dtype="int8", backend=backend)
    clean = fused_adam.AdamW(q, lr=0.01, backend=backend)
    rng = np.random.default_rng(0)
    for n in range(20):
        g = rng.normal(size=256).astype(np.float32)
        clean.step(g)
        if n == 5:
            g = g.copy()
            g[70] = value
        opt.step(g)
    others = np.arange(256) != 70
    assert np.isfinite(p[others]).all() and float(abs(p - q)[others].max()) < 0.02
    assert np.isfinite(opt.state_dict()["state"][0]["m"]).all()


def test_states_of_one_format_load_into_another() -> None:
    g = [a.astype(np.float32) for a in draw("bfloat16", 1)]
    wide = [a.astype(np.float32) for a in draw("bfloat16", 0)]
    full = fused_adam.AdamW(wide)
    full.step(g)
    narrow = [a.astype(np.float32) for a in wide]
    half = fused_adam.AdamW(narrow, state_dtype="bfloat16")
    half.load_state_dict(full.state_dict())
    for mine, theirs in zip(half.state_dict()["state"], full.state_dict()["state"], strict=True):
        assert all(same(mine[name], theirs[name].astype(BF16).astype(np.float32)) for name in theirs)
    full.load_state_dict(half.state_dict())
    assert all(
        same(a, b)
        for a, b in zip(full.state_dict()["state"][3].values(), half.state_dict()["state"][3].values(), strict=True)
    )


def test_a_master_of_other_parameters_is_refused(backend: str) -> None:
    for master in ("float32", "split16"):
        p = draw("bfloat16", 0)
        opt = fused_adam.AdamW(p, lr=0.1, master=master, backend=backend)
        before = opt.state_dict()
        opt.step(draw("bfloat16", 1))
        saved, now = opt.state_dict(), [a.copy() for a in p]
        with pytest.raises(ValueError, match=re.escape('state_dict["state"][0]["master"] does not round to the param')):
            opt.load_state_dict(before)
        same_runs(opt, opt, p, now)
        assert all(
            same(a, b)
            for x, y in zip(saved["state"], opt.state_dict()["state"], strict=True)
            for a, b in zip(x.values(), y.values(), strict=True)
        )


def half(n: int = 3) -> Any:
    return np.ones(n, np.float16)


def bf16(n: int = 3) -> Any:
    return np.ones(n, BF16)


WRONG: list[tuple[str, Any, str]] = [
    (
        "master of float32",
        lambda: fused_adam.AdamW(np.ones(3), master="split16"),
        "float64 parameters .* is not offered; there",
    ),
    (
        "split of float16",
        lambda: fused_adam.AdamW(half(), master="split16"),
        "master='split16' is not offered; there are",
    ),
    (
        "nothing to round",
        lambda: fused_adam.AdamW(np.ones(3), stochastic_rounding=True),
        "stochastic_rounding is for what",
    ),
    (
        "a master that is none",
        lambda: fused_adam.AdamW(bf16(), master="half"),
        "master should be None or one of float32, split16",
    ),
    (
        "states that are none",
        lambda: fused_adam.AdamW(bf16(), state_dtype="float8"),
        "state_dtype should be None or one of",
    ),
    ("a seed below 0", lambda: fused_adam.AdamW(bf16(), seed=-1), r"seed should be in \[0, 2\*\*63\), got -1"),
    ("a rule", lambda: fused_adam.RMSprop(bf16()), "params: the rule rmsprop is not offered with bfloat16 parameters"),
    ("amsgrad", lambda: fused_adam.AdamW(bf16(), amsgrad=True), "the rule amsgradw is not offered"),
    ("counting", lambda: fused_adam.AdamW(bf16(), count_unmoved=True), "count_unmoved is not offered with bfloat16"),
    ("rows", lambda: fused_adam.AdamW(bf16(), per_row_step=True), "per_row_step is not offered with bfloat16"),
    (
        "a gradient's kind",
        lambda: fused_adam.AdamW(half()).step(bf16()),
        "grads: float16 parameters with bfloat16 gradients",
    ),
    (
        "two kinds",
        lambda: fused_adam.AdamW([bf16(), bf16()]).step([bf16(), np.ones(3, np.float32)]),
        "dtypes bfloat16, float32; make them alike",
    ),
    (
        "a gradient's shape",
        lambda: fused_adam.AdamW(bf16()).step(bf16(4)),
        r"grads has shape \(4,\) but the parameter has \(3,\)",
    ),
    (
        "a mask",
        lambda: fused_adam.AdamW(bf16()).step(bf16(), mask=np.ones(3, bool)),
        "SparseGrad and mask are not offered",
    ),
    ("uint16", lambda: fused_adam.AdamW(np.ones(3, np.uint16)), "params has dtype uint16; if it holds bfloat16 say so"),
    (
        "what uint16 is not",
        lambda: fused_adam.AdamW(np.ones(3, np.uint16), dtype="float16"),
        "dtype should be None or one of bfloat16",
    ),
]


@pytest.mark.parametrize(("name", "call", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_what_is_refused(name: str, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gradient_in_the_memory_of_the_step_is_refused(backend: str) -> None:
    p = bf16(300)
    with pytest.raises(ValueError, match="grads overlaps a parameter or a state"):
        fused_adam.AdamW(p, backend=backend).step(p)
    odd = np.zeros(7, np.uint8)[1:].view(BF16)
    with pytest.raises(ValueError, match="params is not aligned; pass a copy"):
        fused_adam.AdamW(odd, backend=backend)


def test_gradients_of_another_kind_at_each_step(backend: str) -> None:
    """float32 and bfloat16 by turns: each step takes the kernel of its own."""
    p, q = draw("bfloat16", 0), draw("bfloat16", 0)
    opt, other = fused_adam.AdamW(p, backend=backend), fused_adam.AdamW(q, backend=backend)
    for n in range(4):
        g = draw("bfloat16", n)
        opt.step(g if n % 2 else [a.astype(np.float32) for a in g])
        other.step(g)
    same_runs(opt, other, p, q)


def test_a_scale_is_divided_out(backend: str) -> None:
    p, q = draw("float16", 0), draw("float16", 0)
    opt, other = fused_adam.AdamW(p, backend=backend), fused_adam.AdamW(q, backend=backend)
    g = [np.asarray(np.round(a * 8) / 8, np.float16) for a in draw("float16", 1)]
    opt.step([a * np.float16(4) for a in g], grad_scale=4.0)
    other.step(g)
    same_runs(opt, other, p, q)
    opt.step(g, found_inf=True)
    same_runs(opt, other, p, q)
    assert opt.last_stats().skipped == 1


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 10),
        ({"master": "float32"}, 14),
        ({"master": "split16", "state_dtype": "bfloat16"}, 8),
        ({"master": "split8", "state_dtype": "int8"}, 5.1),
    ],
)
def test_bytes_of_a_parameter(options: dict[str, Any], most: float) -> None:
    """Beside its gradient, of AdamW and bfloat16; and a step takes next to nothing more."""
    n = 2**20
    p, g = np.zeros(n, BF16), np.zeros(n, BF16)
    for backend in ("numpy", "numba"):
        fused_adam.AdamW(p, backend=backend, **options).step(g)  # all is imported and compiled
        tracemalloc.start()
        try:
            opt = fused_adam.AdamW(p, backend=backend, **options)
            held = tracemalloc.get_traced_memory()[0]
            opt.step(g)
            tracemalloc.reset_peak()
            opt.step(g)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert 2 * n + held <= most * n * 1.01
        assert peak - held <= 0.02 * most * n + 2**21  # the rows of a chunk of NumPy's


def stepped_at(first: int, backend: str, **how: Any) -> list[Any]:
    """What a step makes of a parameter whose first element has this canonical index: as they are kept."""
    p = [np.ones(2048, BF16)]
    opt = fused_adam.AdamW(p, lr=1e-3, seed=1, backend=backend, **how)
    opt._parts[0].first[0] = first
    opt._runner.stepper = load(backend).Stepper([part.rows() for part in opt._parts], opt._t, opt._writes)
    opt.step([np.linspace(-1, 1, 2048, dtype=np.float32).astype(BF16)])
    return [p[0].view(np.uint16), *(opt._parts[0].states[name].data for name in "mv")]


@pytest.mark.parametrize("far", [2**31, 2**32, 2**33 + 2**31, 2**60])
@pytest.mark.parametrize("how", [{"state_dtype": "bfloat16", "stochastic_rounding": True}, {"state_dtype": "int8"}])
def test_canonical_indices_have_64_bits(how: dict[str, Any], far: int) -> None:
    """Random bits depend on all of them, and the dither of codes on the lower 32."""
    first = far + 128
    ours, theirs = (stepped_at(first, backend, **how) for backend in ("numpy", "numba"))
    near = stepped_at(128, "numpy", **how)
    assert all(map(np.array_equal, ours, theirs))
    same_as_near = [np.array_equal(a, b) for a, b in zip(ours, near, strict=True)]
    assert same_as_near[1:] == [how["state_dtype"] == "int8" and far % 2**32 == 0] * 2
