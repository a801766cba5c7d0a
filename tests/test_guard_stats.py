"""Gradients that cannot be zeroed are refused, and `last_stats` says what a step met."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from conftest import same_bits
from watch import misaligned, refused

import fused_adam
from fused_adam._guard import Stats

# --- zero_grads -------------------------------------------------------------------------------------------------------


def read_only(a: Any) -> Any:
    a.flags.writeable = False
    return a


BUFFER = np.ones(20, np.float32)
C, F = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32, order="F")
# parameters and gradients, and what is said of the latter
UNZEROABLE: list[tuple[list[Any], list[Any], str]] = [
    ([C, C], [C, read_only(C.copy())], r"grads\[1\] is read-only"),
    ([C], [np.asarray(F)], r"grads\[0\] is in F order but its parameter in C order"),
    ([F], [C.copy()], r"grads\[0\] is in C order but its parameter in F order"),
    ([C, np.ones((), np.float32)], [C, np.float32(1.0)], r"grads\[1\] .* got a NumPy scalar of float32"),
    ([BUFFER[:10]] * 2, [BUFFER[:10]] * 2, r"grads\[0\] and grads\[1\] share memory|grads\[1\] and grads\[0\] share"),
    ([BUFFER[:10]] * 2, [BUFFER[9:19], BUFFER[:10]], r"grads\[0\] and grads\[1\] share memory"),
    ([BUFFER] * 3, [BUFFER, BUFFER.copy(), BUFFER], r"grads\[[02]\] and grads\[[02]\] share memory"),
]


@pytest.mark.parametrize(("like", "grads", "match"), UNZEROABLE)
@pytest.mark.parametrize("found", [None, True])
def test_gradients_that_cannot_be_zeroed(like: Any, grads: Any, match: str, found: Any, backend: str) -> None:
    params = [np.array(p, order="K") for p in like]
    opt = fused_adam.Adam(params, zero_grads=True, skip_nonfinite=True, backend=backend)
    with refused(match, params, grads, opt):
        opt.step(grads, found_inf=found)
    fused_adam.Adam(params, skip_nonfinite=True, backend=backend).step(grads)  # without zero_grads they are welcome


def test_flat_gradients_that_share_memory(backend: str) -> None:
    groups = [fused_adam.flatten([C, C]), fused_adam.flatten([C, C])]
    grads = groups[0].zeros_like()
    grads.data[:] = 1
    opt = fused_adam.Adam([{"params": flat} for flat in groups], zero_grads=True, backend=backend)
    for given in ([grads, grads], [grads, [C, grads[1]]], [list(grads.tree), grads]):
        with refused("share memory", groups[0].data, groups[1].data, grads.data, C, opt):
            opt.step(given)
    opt.step([grads, grads.zeros_like()])
    assert not any(g.any() for g in grads)
    with refused("overlaps a parameter", groups[0].data, opt):
        opt.step([groups[0], grads])
    with refused(r"grads\[0\]\[1\] is read-only", groups[0].data, C, opt):
        opt.step([[C, read_only(C.copy())], grads])


# --- last_stats -------------------------------------------------------------------------------------------------------


def test_last_stats(backend: str) -> None:
    plain = fused_adam.SGD(np.ones(2), backend=backend)
    assert plain.last_stats() == Stats(None, None, 0, None)
    plain.step(np.ones(2))
    assert plain.last_stats() == Stats(None, None, 0, None)
    plain.step(np.ones(2), found_inf=1)
    plain.step(np.ones(2))
    assert plain.last_stats() == Stats(None, None, 1, None)

    opt = fused_adam.SGD(np.ones(2), max_grad_norm=10.0, count_unmoved=True, skip_nonfinite=True, backend=backend)
    assert opt.last_stats() == Stats(None, None, 0, None)
    opt.step(np.array([3.0, 4.0]))
    assert opt.last_stats() == Stats(5.0, 1.0, 0, 0)
    opt.step(np.array([30.0, 40.0]), found_inf=1)
    assert opt.last_stats() == Stats(50.0, 0.2, 1, 0)
    opt.step(np.array([math.inf, 0.0]))
    assert opt.last_stats() == Stats(math.inf, 0.0, 2, 0)
    with pytest.raises(ValueError, match="shape"):
        opt.step(np.ones(3))
    assert opt.last_stats() == Stats(math.inf, 0.0, 2, 0)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(np.array([30.0, 40.0]), grad_scale=100)
    assert opt.last_stats() == Stats(0.5, 1.0, 2, 2)
    first = opt.last_stats()
    opt.step(np.zeros(2))
    assert opt.last_stats() == Stats(0.0, 1.0, 2, 0) and first == Stats(0.5, 1.0, 2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmoved(dtype: Any, backend: str) -> None:
    eps = float(np.finfo(dtype).eps)
    p = np.array([1, 1, 1, 1, np.nan, 0, -0.0, np.inf, 1e-30, 1], dtype)
    g = np.array([eps / 8, -eps, eps, 0, 1, 1e-30, 0, 1, eps / 8, np.nan], dtype)
    #             stays   moves moves g=0 NaN moves g=0 stays moves    NaN
    opt = fused_adam.SGD(p, lr=1.0, count_unmoved=True, backend=backend)
    opt.step(g)
    assert opt.last_stats().unmoved == 2
    assert same_bits(p[:4], np.array([1, 1 + eps, 1 - eps, 1], dtype))

    # one chunk after the other, and elements alone in theirs; each step is counted anew
    for n in (1, 2, 2**15, 2**15 + 1, 2**16 + 1, 2**18 + 2**16 + 1):
        rng = np.random.default_rng(n)
        p = rng.choice(np.array([1, 0, 1000], dtype), n)
        params, g = [p, p[:1].copy()], (rng.choice([0, 1, 100], n) * eps / 4).astype(dtype)
        opt = fused_adam.SGD(params, lr=1.0, count_unmoved=True, backend=backend)
        for _ in range(2):
            before = [x.copy() for x in params]
            opt.step([g, g[:1]])
            stays = [(x == old) & (some != 0) for x, old, some in zip(params, before, (g, g[:1]), strict=True)]
            assert opt.last_stats().unmoved == sum(map(np.sum, stays))


def test_unmoved_of_one_element(backend: str) -> None:
    """NumPy steps it as one of two; what the other, a leftover, does is not counted."""
    params = [misaligned(np.ones(5)), np.ones(1), np.ones(())]
    opt = fused_adam.SGD(params, lr=0.0, count_unmoved=True, backend=backend)
    opt.step([misaligned(np.ones(5)), np.zeros(1), np.zeros(())])
    assert opt.last_stats().unmoved == 5


def test_unmoved_by_what_unscaling_made_0(backend: str) -> None:
    """The gradient that was given counts, not what is left of it; and in a weight decay's step g = 0 is no gradient."""
    opt = fused_adam.SGD(np.ones(3, np.float32), lr=1.0, count_unmoved=True, backend=backend)
    opt.step(np.array([1e-40, 0, 1], np.float32), grad_scale=1e10)
    assert opt.last_stats().unmoved == 2  # 1 - 1e-10 is 1 as well
    opt = fused_adam.SGD(np.ones(3), lr=1e-30, weight_decay=0.1, count_unmoved=True, backend=backend)
    opt.step(np.array([0.0, 1.0, 0.0]))
    assert opt.last_stats().unmoved == 1


def test_a_flat_buffer_that_is_read_only_is_not_zeroed(backend: str) -> None:
    flat = fused_adam.flatten([np.ones(5, np.float32), np.ones(3, np.float32)])
    grads = flat.zeros_like()
    opt = fused_adam.Adam(flat, zero_grads=True, backend=backend)
    grads.data.setflags(write=False)
    with refused("the flat buffer of gradients is read-only", flat, grads, opt):
        opt.step(grads)


def test_an_own_rule_whose_coefficients_lack_one_is_refused_at_once(backend: str) -> None:
    lacking = fused_adam.rule(_plain, lambda t, lr: {})
    with pytest.raises(ValueError, match="did not return 'lr'"):
        lacking([np.ones(3, np.float32)], lr=0.1, backend=backend)


def _plain(p, g, lr):
    p = p - lr * g
    return p
