"""Unscaling, checking, clipping and zeroing of gradients where something is kept in 16 or 8 bits."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS, require, same_bits
from guard_cases import Unfused, assert_same_stats, block_sums, root_of_sum
from watch import refused

import fused_adam
from fused_adam._formats import FORMATS, FORMATS_OF_ADAM
from fused_adam._storage import Format

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
SHAPES = [(10, 13), (1,), (0, 3), (1025,), (), (2**15 + 1,), (2**16 + 3,), (128,), (3, 5, 7)]
GUARD: dict[str, Any] = {"skip_nonfinite": True, "max_grad_norm": 3.0, "zero_grads": True}
# Of each step: what it is given beside gradients, and whether one of these is not finite.
CALLS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"grad_scale": 3.0}, False),
    ({"grad_scale": 1024}, True),
    ({"grad_scale": np.array([65536.0], np.float32), "found_inf": 0}, False),
    ({"found_inf": True}, False),
    ({"grad_scale": np.array(np.nan)}, False),
    ({}, False),
]
IDS = [" ".join(filter(None, (f.p, f.g, f.states, f.master))) for f in (*FORMATS, *FORMATS_OF_ADAM)]
formats = pytest.mark.parametrize("form", [*FORMATS, *FORMATS_OF_ADAM], ids=IDS)


def draw(kind: str, seed: int, bad: bool = False, shapes: Any = SHAPES) -> list[Any]:
    """Of several magnitudes, subnormal ones among them; the last parameter in Fortran order."""
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-6, 2, s), np.float32) for s in shapes]
    if len(shapes) > 3:
        arrays[3][[0, 5, 77]] = [1e-41, -0.0, np.nan if bad else 3.0]
    made = [a.astype(DTYPES[kind]) for a in arrays]
    return [*made[:-1], np.asfortranarray(made[-1])]


def optimizer(form: Format, p: Any, make: Any = fused_adam.AdamW, **options: Any) -> Any:
    how = {"master": form.master, "state_dtype": form.states, "stochastic_rounding": form.stochastic_rounding}
    return make(p, lr=0.01, **how, seed=3, **options)


def bits(opt: Any, p: Any) -> list[Any]:
    states = [a for state in opt.state_dict()["state"] for a in state.values()]
    return [np.asarray(a, np.float32) for a in (*p, *states)]


def is_rounded(form: Format) -> bool:
    """Whether there is something to round at random."""
    return form.states == "bfloat16" or (form.master in (None, "split8") and form.p != "float32")


@formats
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_bits(form: Format, stochastic: bool) -> None:
    """NumPy's and Numba's: of p, states and stats; the norm is that of the gradients' float32 numbers."""
    require("numba")
    form = form._replace(stochastic_rounding=stochastic and is_rounded(form))
    runs = []
    for backend in BACKENDS:
        p = draw(form.p, 0)
        opt = optimizer(form, p, backend=backend, **GUARD)
        seen = []
        for n, (call, bad) in enumerate(CALLS):
            g = draw(form.g, n + 1, bad)
            before, wide = bits(opt, p), [a.astype(np.float32) for a in g]
            opt.step(g, **call)
            stats = opt.last_stats()
            skipped = bad or n in (4, 5)
            assert all(map(same_bits, before, bits(opt, p))) == skipped, f"step {n}"
            assert not any(a.ravel(order="K").view(np.uint8).any() for a in g), f"step {n}"
            scale = float(np.asarray(call.get("grad_scale", 1.0)).item())
            wide = [np.float32(1 / scale) * a for a in wide]
            norm = root_of_sum([s for a in wide for s in block_sums(a.ravel(order="K"))])
            factor = 1.0 if norm <= 3.0 else 3.0 / norm
            for found, expected in ((stats.grad_norm, norm), (stats.clip_factor, factor)):
                assert same_bits(found, expected), f"step {n}"
            seen.append(stats)
        assert seen[-1].skipped == 3 and opt.t == 4 and any(s.clip_factor < 1 for s in seen)
        runs.append(bits(opt, p))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("make", [fused_adam.SGD, fused_adam.Adam, fused_adam.Lion], ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", [f for f in FORMATS if f.master and f.states == "float32"], ids=str)
def test_a_master_has_the_bytes_of_a_guarded_float32_run(form: Format, make: Any, backend: str) -> None:
    hyper = {"momentum": 0.9} if make is fused_adam.SGD else {}
    p = draw(form.p, 0)
    plain = Unfused(make, [[a.astype(np.float32) for a in p]], [{"lr": 0.01, **hyper}], **GUARD)
    opt = optimizer(form, p, make, backend=backend, **hyper, **GUARD)
    for n, (call, bad) in enumerate(CALLS):
        g = draw(form.g, n + 1, bad)
        expected = plain.step([[a.astype(np.float32) for a in g]], **call)
        opt.step(g, **call)
        assert_same_stats(opt.last_stats(), expected, f"step {n}")
        for mine, theirs, master in zip(
            opt.state_dict()["state"], plain.optimizer.state_dict()["state"], plain.params[0], strict=True
        ):
            assert same_bits(mine.pop("master"), master)
            assert all(same_bits(mine[name], theirs[name]) for name in theirs)


@formats
def test_clipping_divides_the_gradients(form: Format, backend: str) -> None:
    """2**12 ones have a norm of 64, so a bound of 16 is a quarter of each: the bytes of gradients of a quarter."""
    p, q = (draw(form.p, 0, shapes=[(2**12,)]) for _ in range(2))
    opt = optimizer(form, p, backend=backend, max_grad_norm=16.0)
    other = optimizer(form, q, backend=backend)
    rng = np.random.default_rng(0)
    for _ in range(3):
        g = np.asarray(rng.choice([-1.0, 1.0], 2**12), DTYPES[form.g])
        opt.step([g])
        other.step([np.asarray(g * 0.25, g.dtype)])
        assert opt.last_stats()[:2] == (64.0, 0.25)
    assert all(map(same_bits, bits(opt, p), bits(other, q)))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_all_numbers_of_16_bits(kind: str, backend: str) -> None:
    """Of finite ones the exact norm; and each that is not is found, wherever it is."""
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(DTYPES[kind])
    wide = every.astype(np.float32)
    finite = np.isfinite(wide)
    p = [np.zeros(int(finite.sum()), every.dtype)]
    opt = fused_adam.SGD(p, momentum=0.9, backend=backend, max_grad_norm=math.inf, skip_nonfinite=True)
    opt.step([every[finite]])
    assert opt.last_stats().grad_norm == root_of_sum(block_sums(wide[finite])) and opt.t == 1
    p = [np.zeros(300, every.dtype)]
    opt = fused_adam.SGD(p, momentum=0.9, backend=backend, skip_nonfinite=True)
    for k, one in enumerate(np.flatnonzero(~finite)[::7]):
        g = np.zeros(300, every.dtype)
        g[k % 300] = every[one]
        opt.step([g])
        assert (opt.t, opt.last_stats().skipped) == (0, k + 1)


@pytest.mark.parametrize("flat", [False, True])
def test_on_threads_in_any_layout(flat: bool) -> None:
    """Enough for Numba's threads; two groups, one of them of float64 alone; and bfloat16 as uint16."""
    require("numba")
    rng = np.random.default_rng(0)
    start = [rng.normal(size=n).astype(np.float32).astype(BF16) for n in (5, 2**18 + 3, 1)]
    runs = []
    for backend in BACKENDS:
        p, wide = laid(start, flat), np.ones(300)
        groups = [{"params": p, "lr": 0.1}, {"params": [wide], "lr": 0.01}]
        opt = fused_adam.AdamW(groups, dtype="bfloat16", backend=backend, **GUARD)
        for n in range(3):
            some = np.random.default_rng(n)
            g = laid([some.normal(size=a.size).astype(np.float32).astype(BF16) for a in start], flat)
            opt.step([g, [np.full(wide.size, 0.5)]], grad_scale=2.0)
            assert not any(a.any() for a in (g.tree if flat else g))
        runs.append([opt.last_stats(), *(np.array(a) for a in (p.tree if flat else p)), wide])
    (a, *ours), (b, *theirs) = runs
    assert_same_stats(a, b, "")
    assert a.clip_factor < 1 and all(map(same_bits, ours, theirs))
    assert not any(np.array_equal(x, y.view(np.uint16)) for x, y in zip(ours, start, strict=False))


def laid(arrays: Any, flat: bool) -> Any:
    """Copies, as uint16."""
    return fused_adam.flatten(arrays, dtype="bfloat16") if flat else [a.copy().view(np.uint16) for a in arrays]


def read_only(a: Any) -> Any:
    a.flags.writeable = False
    return a


def test_gradients_that_cannot_be_zeroed(backend: str) -> None:
    p = [np.asfortranarray(np.ones((4, 6), BF16)), np.ones(3, BF16)]
    shared = np.ones(30, BF16)
    opt = fused_adam.AdamW(p, zero_grads=True, backend=backend)
    for g, message in (
        ([np.ones((4, 6), BF16), np.ones(3, BF16)], r"grads\[0\] is in C order but its parameter in F order"),
        ([np.asfortranarray(np.ones((4, 6), BF16)), read_only(np.ones(3, BF16))], r"grads\[1\] is read-only"),
        ([shared[:24].reshape(6, 4).T, shared[22:25]], r"grads\[0\] and grads\[1\] share memory"),
    ):
        with refused(message, p, [np.array(a) for a in g], opt):
            opt.step(g)


def test_counting_is_refused() -> None:
    with pytest.raises(ValueError, match="params: count_unmoved is not offered with bfloat16 parameters"):
        fused_adam.AdamW(np.ones(3, BF16), count_unmoved=True, **GUARD)
