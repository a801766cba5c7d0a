"""The compiled call's checks and Python's accept exactly the same inputs (DESIGN section 7).

`_numba_adam_step.adam_step` answers False where it refuses or cannot tell; `_adam_step.in_python` then explains or
runs. Had the compiled call accepted what Python refuses, a wrong step would run; had it refused the plain inputs that
Python accepts, every step would take the slow way. So: compiled True implies accepted, with the same bytes; refused
implies False; and accepted implies True for what this file calls plain.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import require
from watch import adam_arrays, memory, misaligned, owner

from fused_adam import _adam_step, _numbers

require("numba")

from fused_adam.backends import _numba_adam_step  # noqa: E402

INF, NAN = float("inf"), float("nan")
DEFAULT = {
    "step": 1,
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}
LIMIT = _numbers.FLOAT32_LIMIT
LENGTHS = [0.0, -0.0, 5e-324, 1e-46, 1.0, 3.4e38, LIMIT, np.nextafter(LIMIT, INF).item(), 1e39, 1e308, INF, NAN, -1e-9]
NUMBERS = [*LENGTHS, -INF, 1, 0, True, None, "1", np.float32(0.5), np.float64(0.5), np.array(0.5), 10**400, 1j]
RATES = [0.0, -0.0, 0.5, 1 - 2**-53, 1.0, -5e-324, 1.5, INF, NAN, 0, 1, False, None, np.float32(0.5)]
STEPS = [1, 2, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 0, -1, -(2**63), -(2**64), 1.0, True, None, "1", np.int64(1)]
SWITCHES = [True, False, 1, 0, None, np.True_, 1.0]


def python(arrays, given):
    _adam_step.in_python(**arrays, **given, max_v=None, backend="numpy")


def run(arrays, given):
    """(accepted by compiled, accepted by Python), having asserted what must hold of them; the arrays are stepped."""
    owners = [owner(a) for a in arrays.values() if isinstance(a, np.ndarray) and owner(a).flags.writeable]
    saved = [a.copy() for a in owners]
    before = memory(arrays)
    compiled = _numba_adam_step.adam_step(*arrays.values(), *given.values())
    after = memory(arrays)
    for a, values in zip(owners, saved, strict=True):
        a[...] = values
    try:
        python(arrays, given)
        accepted = True
    except (TypeError, ValueError):
        accepted = False
    assert isinstance(compiled, bool)
    if compiled:
        assert accepted, f"compiled code runs what Python refuses: {given}"
        assert after == memory(arrays)
    else:
        assert after == before, f"compiled code refused, but wrote: {given}"
    return compiled, accepted


def plain_numbers(given):
    kinds = [type(given[k]) for k in ("step", "lr", "betas", "eps", "weight_decay", "decoupled", "maximize")]
    return kinds == [int, float, tuple, float, float, bool, bool] and all(type(b) is float for b in given["betas"])


def check(arrays, given, plain_arrays=True):
    compiled, accepted = run(arrays, given)
    if plain_arrays and plain_numbers(given):
        assert compiled == accepted, f"Python takes what the compiled call is slow to take: {given}"
    return accepted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("decoupled", "maximize"), list(itertools.product([False, True], repeat=2)))
def test_on_numbers(dtype, decoupled, maximize):
    arrays = adam_arrays(0, 5, dtype)
    base = DEFAULT | {"decoupled": decoupled, "maximize": maximize}
    rows = [{"lr": x} for x in NUMBERS] + [{"eps": x} for x in NUMBERS] + [{"weight_decay": x} for x in NUMBERS]
    rows += [{"step": x} for x in STEPS] + [{"decoupled": x} for x in SWITCHES] + [{"maximize": x} for x in SWITCHES]
    rows += [{"betas": (a, b)} for a, b in itertools.product(RATES, RATES)]
    rows += [{"betas": x} for x in ([0.9, 0.999], (0.9,), (0.9, 0.9, 0.9), None, 0.9, "ab", np.array([0.9, 0.9]), ())]
    # the coefficients: lr * weight_decay, and lr and eps scaled by the bias correction of small and large t
    rows += [{"lr": a, "weight_decay": b} for a, b in itertools.product(LENGTHS, LENGTHS)]
    rows += [
        {"lr": a, "eps": b, "step": t, "betas": betas}
        for a, b in itertools.product(LENGTHS, LENGTHS)
        for t in (1, 10**6, 2**63 - 1)
        for betas in ((0.0, 0.0), (1 - 2**-53, 0.5), (0.5, 1 - 2**-53))
    ]
    answers = [check(arrays, base | row) for row in rows]
    assert 0.2 < np.mean(answers) < 0.8


# One object each: Numba's cache of types takes them for native once it has seen misaligned arrays.
SWAPPED = np.dtype(">f4"), np.dtype(">f8")


def variants(a):
    """(is it plain, an array of these values, or one like it)"""
    yield True, a
    yield True, np.concatenate([a, a])[a.size :]
    yield False, misaligned(a)
    yield False, a.copy().view(type("Sub", (np.ndarray,), {}))
    read_only = a.copy()
    read_only.flags.writeable = False
    yield True, read_only
    yield False, np.asfortranarray(a.reshape(2, 3))
    yield True, a.reshape(2, 3)
    yield True, a.reshape(1, 2, 3)
    yield False, a.reshape(6, 1)  # in both orders
    yield True, a[:0]
    yield True, a[:5]
    yield True, a[:1].reshape(())
    for strided in (np.repeat(a, 2)[::2], a[::-1], np.broadcast_to(a[:1], a.shape)):
        yield False, strided
    for dtype in (np.float32, np.float64, np.float16, int, bool, complex, object, *SWAPPED, [("x", "f4")], "S3"):
        yield True, a.astype(dtype)
    yield False, np.ma.masked_array(a)
    yield False, a.tolist()
    yield False, None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_arrays(dtype):
    count = 0
    for names in [*itertools.combinations("pgmv", 1), *itertools.combinations("pgmv", 2), tuple("pgmv")]:
        arrays = adam_arrays(0, 6, dtype)
        for choice in (
            itertools.product(*(variants(arrays[n]) for n in names))
            if len(names) < 3
            else zip(*(variants(arrays[n]) for n in names), strict=True)
        ):
            given = {**arrays, **{n: a for n, (_, a) in zip(names, choice, strict=True)}}
            count += check(given, DEFAULT, all(plain for plain, _ in choice))
    assert count > 50  # accepted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 5, 2**18])
def test_on_overlap(dtype, n):
    """Every pair of arrays, at every distance around touching, and on either side."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros((3 * n + 2) * size + 16, np.uint8)
    shifts = {0, 1, size, 2 * size, n * size - size, n * size - 1, n * size, n * size + 1, n * size + size}
    answers = []
    for a, b in itertools.permutations("pgmv", 2):
        arrays = adam_arrays(0, n, dtype)
        for shift in shifts | {-s for s in shifts}:
            start = n * size + size
            if start + shift < 0:
                continue
            arrays[a] = raw[start : start + n * size].view(dtype)
            arrays[b] = raw[start + shift : start + shift + n * size].view(dtype)
            before = raw.tobytes()
            mine = _numba_adam_step.adam_step(*arrays.values(), *DEFAULT.values())
            apart = abs(shift) >= n * size
            if arrays[b].flags.aligned:
                assert mine == apart, (a, b, shift)
            assert mine <= apart, (a, b, shift)
            if not mine:
                assert raw.tobytes() == before
                if not apart:
                    with pytest.raises(ValueError, match="share memory"):
                        python(arrays, DEFAULT)
            answers.append(mine)
    assert n == 0 or 0 < np.mean(answers) < 1
