"""Sharded steps on threads: the same bits on any number of ranks, and as without any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import assert_same_bits, require, same_bits
from distributed_cases import FORMATS, MICRO_BATCHES, digest, gradients, hashed, make, numbers, trained

import fused_adam
from fused_adam._norm import Total
from fused_adam.distributed import Sharded, Threads
from fused_adam.distributed._plan import Plan
from fused_adam.distributed._total import of_all

RANKS = (1, 2, 4, 8)


@pytest.mark.parametrize("form", FORMATS)
def test_invariant_has_one_hash(form, backend):
    """Of p, m and v after 20 steps with a clip; also in other buckets, and with flat parameters."""
    found = {n: {*Threads.run(n, lambda c: hashed(c, form, "invariant", backend=backend))} for n in RANKS}
    assert len(set.union(*found.values())) == 1, found
    for more in ({"bucket_elements": 128}, {"bucket_elements": 2**20}, {"flat": True}):
        assert {*Threads.run(4, lambda c, more=more: hashed(c, form, "invariant", backend=backend, **more))} == found[1]


@pytest.mark.parametrize("form", FORMATS)
def test_backends_agree(form):
    require("numba")
    assert len({*Threads.run(4, lambda c: hashed(c, form, "invariant", backend=["numpy", "numba"][c.rank % 2]))}) == 1


def tree(rows: list[np.ndarray]) -> np.ndarray:
    while len(rows) > 1:
        rows = [np.asarray(rows[k] + rows[k + 1]) for k in range(0, len(rows), 2)]
    return rows[0]


def series(rows: list[np.ndarray]) -> np.ndarray:
    total = rows[0]
    for row in rows[1:]:
        total = np.asarray(total + row)
    return total


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize(
    ("mode", "ranks", "summands", "add"),
    [("invariant", 4, MICRO_BATCHES, tree), ("invariant", 1, MICRO_BATCHES, tree), ("ordered", 3, 3, series)],
    ids=["invariant-4", "invariant-1", "ordered-3"],
)
def test_as_one_optimizer_over_the_summed_gradients(mode, ranks, summands, add, kind):
    """p, all states, t and what `last_stats` says are those of the same class without ranks."""
    p = numbers(kind, 0)
    hyper = {"lr": 1e-2, "amsgrad": True, "max_grad_norm": 20.0, "skip_nonfinite": True}
    opt = fused_adam.AdamW(p, **hyper)
    for step in range(4):
        each = [numbers(kind, 1, step, k) for k in range(summands)]
        opt.step({name: add([g[name] for g in each]) for name in p}, grad_scale=float(summands))

    def run(collective: Any) -> Any:
        params, sharded = make(collective, kind, mode, **hyper)
        for step in range(4):
            sharded.step(gradients(sharded, step, kind))
        return params, sharded.state_dict(), sharded.last_stats()

    expected = opt.state_dict()
    for params, d, stats in Threads.run(ranks, run):
        assert_same_bits(p, p.values(), params.values())
        assert {**d, "state": 0} == {**expected, "state": 0}
        for mine, theirs in zip(d["state"], expected["state"], strict=True):
            assert_same_bits(theirs, mine.values(), theirs.values())
        assert stats == opt.last_stats() and stats.clip_factor < 1


def test_a_sum_instead_of_the_average():
    p = numbers("float32", 0)
    opt = fused_adam.SGD(p, lr=0.1)
    opt.step({name: series([numbers("float32", 1, 0, k)[name] for k in range(3)]) for name in p})

    def run(collective: Any) -> Any:
        params, sharded = make(collective, rule=fused_adam.SGD, lr=0.1, average=False, max_grad_norm=None)
        sharded.step(gradients(sharded, 0))
        return params

    for params in Threads.run(3, run):
        assert_same_bits(p, p.values(), params.values())


def test_fast_is_within_rounding():
    def run(mode: str) -> np.ndarray:
        found = Threads.run(5, lambda c: trained(c, "float32", mode)[0])
        for params in found[1:]:
            assert_same_bits(params, params.values(), found[0].values())
        return np.concatenate([p.ravel() for p in found[0].values()])

    ordered, fast = run("ordered"), run("fast")
    assert not same_bits(ordered, fast)
    assert np.abs(ordered - fast).max() < 1e-6 * np.abs(ordered).max()


def test_gradients_of_32_bits_for_parameters_of_16():
    """They are added as they are, and rounded at most once."""

    def run(collective: Any) -> str:
        params, opt = make(collective, "bfloat16", "invariant")
        for step in range(3):
            opt.step(gradients(opt, step, "float32"))
        return digest(opt, params)

    assert len({*Threads.run(2, run), *Threads.run(8, run)}) == 1


def test_groups_and_their_hyperparameters():
    """Each group has its own; they are changed between steps as in torch."""

    def groups(p: Any) -> Any:
        return [{"params": [p["W"], p["b"]], "lr": 0.1}, {"params": {"V": p["V"]}, "weight_decay": 0.5}]

    p = numbers("float32", 0)
    g = numbers("float32", 1, 0, 0)
    plain = fused_adam.AdamW(groups(p), lr=0.2)

    def run(collective: Any) -> Any:
        mine = numbers("float32", 0)
        opt = Sharded(fused_adam.AdamW, groups(mine), collective, lr=0.2, bucket_elements=1024, average=False)
        for lr in (0.3, 0.4):
            opt.param_groups[1]["lr"] = lr
            opt.set_lr(lr / 2, 0)
            zero = {name: np.zeros_like(a) for name, a in g.items()}
            given = g if collective.rank == 0 else zero
            opt.step([[given["W"], given["b"]], {"V": given["V"]}])
        return mine, opt.state_dict()

    for lr in (0.3, 0.4):
        plain.param_groups[1]["lr"] = lr
        plain.set_lr(lr / 2, 0)
        plain.step([[g["W"], g["b"]], {"V": g["V"]}])
    for mine, d in Threads.run(3, run):
        assert_same_bits(p, mine.values(), p.values())
        assert d["param_groups"] == plain.state_dict()["param_groups"]


@fused_adam.rule
def signum(p, g, m, c, lr):
    m = (m - c * m) + c * g
    p = p - lr * sign(m)  # noqa: F821
    return p, m


@pytest.mark.parametrize(
    ("rule", "hyper"),
    [
        (fused_adam.SGD, {"momentum": 0.9, "nesterov": True}),
        (fused_adam.Adagrad, {"initial_accumulator_value": 0.5}),
        (fused_adam.RMSprop, {"momentum": 0.9, "centered": True}),
        (fused_adam.Lion, {"weight_decay": 0.1, "maximize": True}),
        (signum, {"c": 0.1}),
    ],
    ids=["SGD", "Adagrad", "RMSprop", "Lion", "own"],
)
def test_every_class(rule, hyper):
    """Loose parameters and gradients of one rank, against the class itself."""
    p = numbers("float32", 0)
    opt = rule(p, lr=0.01, **hyper)
    for step in range(3):
        opt.step(numbers("float32", 1, step, 0))

    def run(collective: Any) -> Any:
        params, sharded = make(collective, rule=rule, lr=0.01, average=False, max_grad_norm=None, **hyper)
        for step in range(3):
            g = gradients(sharded, step)
            sharded.step(g if collective.rank == 0 else {name: np.zeros_like(a) for name, a in g.items()})
        return digest(sharded, params)

    assert {*Threads.run(3, run)} == {digest(opt, p)}


@pytest.mark.parametrize("mode", ["fast", "ordered", "invariant"])
@pytest.mark.parametrize("more", [{}, {"master": "float32"}, {"stochastic_rounding": True}], ids=str)
def test_float16(mode, more):
    """Sums that float16 does not hold are divided before they are rounded to it."""

    def run(collective: Any) -> Any:
        p = [np.ones(300, np.float16)]
        micro = {"micro_batches": 4} if mode == "invariant" else {}
        opt = Sharded(fused_adam.AdamW, p, collective, mode=mode, lr=0.5, bucket_elements=256, **more, **micro)
        g = [np.full(300, 60000, np.float16)]
        opt.step([g] * (4 // collective.size) if mode == "invariant" else g)
        return p[0].tolist()

    for ranks in (1, 2, 4):
        for found in Threads.run(ranks, run):
            assert found == pytest.approx([0.495] * 300, abs=2**-11)


@pytest.mark.parametrize("flat", [True, False])
def test_bfloat16_of_ml_dtypes(flat):
    """The same bits as uint16 that is said to hold it."""
    bfloat16 = np.dtype(require("ml_dtypes").bfloat16)

    def run(collective: Any, as_bfloat16: bool) -> Any:
        p, g = (np.array(x, np.float32).astype(bfloat16) for x in ([1.5, -2.25, 3] * 100, [0.5, 1, -2] * 100))
        more = {} if as_bfloat16 else {"dtype": "bfloat16"}
        kind = bfloat16 if as_bfloat16 else np.uint16
        params: Any = [p.view(kind)]
        if flat:
            params = fused_adam.flatten([p.astype(np.float32)], bfloat16 if as_bfloat16 else "bfloat16")
        given = g.view(kind)
        opt = Sharded(fused_adam.AdamW, params, collective, lr=0.1, bucket_elements=256, **more)
        for _ in range(2):
            opt.step([given])
        return np.asarray(params[0]).view(np.uint16).tolist()

    found = Threads.run(2, lambda c: run(c, True))
    assert found[0] == found[1] == Threads.run(1, lambda c: run(c, False))[0]
    assert found[0][0] != np.float32(1.5).view(np.uint32) >> 16


# --- what skips, and who owns nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "found_inf", "skips"),
    [((2, "V", 2499), None, True), ((0, "s", ()), None, True), (None, 1.0, True), (None, 0.0, False)],
    ids=["last", "scalar", "found_inf", "nothing"],
)
def test_any_rank_skips_for_all(where, found_inf, skips):
    def run(collective: Any) -> Any:
        params, opt = make(collective, skip_nonfinite=True, max_grad_norm=None)
        opt.step(gradients(opt, 0))
        before = digest(opt, params)
        g = gradients(opt, 1)
        if where and collective.rank == where[0]:
            g[where[1]][where[2]] = np.inf
        opt.step(g, found_inf=found_inf if collective.rank == 1 else None)
        return digest(opt, params) == before, opt.t, opt.last_stats().skipped

    assert Threads.run(3, run) == [(skips, 1 if skips else 2, int(skips))] * 3


def test_ranks_that_own_nothing_step_as_the_others():
    def run(collective: Any) -> Any:
        p = np.ones(10, np.float32)
        opt = Sharded(fused_adam.AdamW, [p], collective, lr=0.1)
        for _ in range(3):
            opt.step([np.full(10, 1.0 + collective.rank, np.float32)])
        return p, opt.t, opt.state_dict()["t"]

    p = np.ones(10, np.float32)
    plain = fused_adam.AdamW([p], lr=0.1)
    for _ in range(3):
        plain.step([np.full(10, 10.0, np.float32)], grad_scale=4.0)
    for mine, *ts in Threads.run(4, run):
        assert same_bits(mine, p) and ts == [3, 3]


@pytest.mark.parametrize(
    ("limbs", "special", "finite", "norm"),
    [
        ([2**61] * 2, 0.0, True, np.sqrt(4.0 * 2.0**61 * (2.0**32 + 1) * 2.0**-1074)),
        ([0, 1], np.inf, True, np.inf),
        ([0, 1], np.nan, False, np.nan),
        ([5], 0.0, False, np.sqrt(20 * 2.0**-1074)),
    ],
    ids=["carries", "inf", "nan", "not finite"],
)
def test_totals_of_all_ranks(limbs, special, finite, norm):
    """Digits have no room for the carries of many ranks unless these are made first."""

    def run(c: Any) -> Any:
        mine = Total()
        mine.limbs[: len(limbs)] = limbs
        if c.rank == 3:
            mine.special, mine.finite = special, finite
        total = of_all(c, mine)
        assert total.limbs.max() < 2**40
        return total.norm(), total.finite

    for found in Threads.run(4, run):
        np.testing.assert_equal(found, (norm, finite))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("sizes", [(1500, 7, 0, 1, 2500), (128,), (0,), (1, 1, 1), (5000, 0)])
@pytest.mark.parametrize("bucket", [128, 1024, 2**20])
def test_each_element_has_one_owner(sizes, ranks, bucket):
    plan = Plan(sizes, bucket, ranks)
    seen = [np.zeros(size, int) for size in sizes]
    for k in range(plan.buckets):
        assert plan.each(k) % 128 == 0
        for rank in range(ranks):
            lo, hi = plan.owned(k, rank)
            assert hi - lo <= plan.each(k) and (lo % 128, hi % 128) == (0, 0)
            for piece in plan.pieces(lo, hi):
                assert piece.first % 128 == 0 and piece.start % 128 == 0
                seen[piece.number][piece.start : piece.stop] += 1
    assert all((counts == 1).all() for counts in seen)


def test_float16_keeps_what_a_loss_scale_is_for():
    """Gradients are divided by it in float32, as without ranks: not before they are rounded to 16 bits."""
    g = (np.array([1e-8, 3e-8, 1e-7, 1e-3]) * 65536).astype(np.float16)
    p = np.zeros(4, np.float16)
    plain = fused_adam.AdamW(p, lr=1e-2)
    for _ in range(3):
        plain.step(g, grad_scale=65536.0)

    def run(c: Any) -> Any:
        q = np.zeros(4, np.float16)
        opt = Sharded(fused_adam.AdamW, q, c, lr=1e-2)
        for _ in range(3):
            opt.step(g, grad_scale=65536.0)
        return q

    for ranks in (1, 2, 4):
        for q in Threads.run(ranks, run):
            assert same_bits(q, p)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_beyond_float16_are_seen(ranks):
    def run(c: Any) -> Any:
        q = np.ones(4, np.float16)
        opt = Sharded(fused_adam.AdamW, q, c, lr=1e-2, skip_nonfinite=True, average=False)
        opt.step(np.full(4, 7e4, np.float32))
        return q, opt.last_stats().skipped

    for q, skipped in Threads.run(ranks, run):
        assert (q == 1).all() and skipped == 1


def test_what_a_skipped_step_met_is_told():
    def run(c: Any) -> Any:
        opt = Sharded(fused_adam.AdamW, np.ones(4, np.float32), c, max_grad_norm=1.0)
        opt.step(np.full(4, 2, np.float32))
        opt.step(np.full(4, 200, np.float32), found_inf=c.rank == 0)
        return opt.last_stats()

    plain = fused_adam.AdamW(np.ones(4, np.float32), max_grad_norm=1.0)
    plain.step(np.full(4, 2, np.float32))
    plain.step(np.full(4, 200, np.float32), found_inf=True)
    assert {*Threads.run(2, run)} == {plain.last_stats()}
