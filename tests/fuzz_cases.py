"""What hypothesis may give a call, and whether two outcomes are the same."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from watch import memory, misaligned

REFUSALS = (TypeError, ValueError, RuntimeError)
BACKENDS = ("numpy", "numba", "auto")


def examples(n):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    FLOATS,
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.just(10**5000),
    st.lists(FLOATS, max_size=3),
    st.dictionaries(st.text(max_size=2), FLOATS, max_size=2),
    st.builds(object),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int64, st.integers(-5, 5)),
    st.builds(np.array, FLOATS),
    st.sampled_from([int, np.float32, print, ..., NotImplemented, range(3), np.ma.masked, slice(None)]),
)
SMALL = st.floats(0, 1, exclude_max=True)
HYPERPARAMETERS = {
    "lr": SMALL,
    "betas": st.tuples(SMALL, SMALL),
    "eps": SMALL,
    "weight_decay": SMALL,
    "maximize": st.booleans(),
}
SHAPES = st.sampled_from([(), (0,), (1,), (2,), (7,), (40,), (2, 3), (3, 2), (0, 4), (2, 1, 3)])
DTYPES = st.sampled_from(
    [np.float32] * 6 + [np.float64] * 3 + [np.float16, np.int32, bool, complex, object, ">f4", "S4"]
)


def mostly(good, bad=JUNK, odds=8):
    """A good value, and now and then a bad one: calls with several wrong arguments find little."""
    return st.integers(0, odds).flatmap(lambda k: bad if k == 0 else good)


def twist(a, how, buffer):
    """An array of another kind, place or order with the values of a."""
    if how == "misaligned":
        return misaligned(a) if a.dtype != object else a
    if how == "fortran":
        return np.array(a, order="F")
    if how == "reversed":
        return a[::-1] if a.ndim else a
    if how == "strided":
        return np.repeat(a, 2, -1)[..., ::2] if a.ndim else a
    if how == "broadcast":
        return np.broadcast_to(a.ravel()[:1].reshape((1,) * a.ndim), a.shape) if a.size and a.ndim else a
    if how == "read-only":
        a.flags.writeable = False
    if how == "masked":
        return np.ma.masked_array(a)
    if how == "subclass":
        return a.view(type("Sub", (np.ndarray,), {"__getitem__": None, "reshape": None}))
    if how == "list":
        return a.tolist()
    if how.startswith("shared") and a.dtype == buffer.dtype and a.ndim:
        start = int(how[6:])
        return buffer[start : start + a.size].reshape(a.shape)
    return a


TWISTS = st.sampled_from(
    ["plain"] * 40
    + ["misaligned", "fortran", "reversed", "strided", "broadcast", "read-only", "masked", "subclass", "list"]
    + ["shared0", "shared1", "shared40"]
)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38])


@st.composite
def arrays(draw, shape, dtype, buffer):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    a = rng.standard_normal(shape)
    if draw(st.integers(0, 4)) == 0:
        a = rng.choice(SPECIAL, shape)
    with np.errstate(all="ignore"):
        a = np.array(np.nan_to_num(a) if np.dtype(dtype).kind in "ib" else a).astype(dtype)
    return twist(a, draw(TWISTS), buffer)


def outcome(call, *things):
    """None if the call was refused and nothing changed, else True."""
    before = memory(things)
    try:
        call()
    except REFUSALS:
        assert memory(things) == before, "written before it was refused"
        return False
    return True


def plain(a):
    return np.array(a, order="C", subok=False)


def same(a, b):
    """The same bytes, all NaNs taken as one."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a[a == 0]), np.signbit(b[b == 0]))
