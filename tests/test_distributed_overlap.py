"""Sharded steps: what overlaps and what waits, and ranks that are threads."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_bits
from distributed_cases import gradients, make

import fused_adam
from fused_adam.distributed import Alone, Sharded, Threads

# --- what overlaps, and what waits ------------------------------------------------------------------------------------


class Late:
    """A rank whose work is done when it is waited for, and that keeps a diary."""

    def __init__(self, inner: Any) -> None:
        self.rank, self.size, self.diary = inner.rank, inner.size, []
        self._inner = inner
        self._counts = {"all_to_all": 0, "all_gather": 0}

    def _later(self, name: str, out: np.ndarray, x: np.ndarray) -> Any:
        x, k = x.copy(), self._counts[name]
        self._counts[name] += 1
        self.diary.append(f"start {name} {k}")

        class Work:
            def wait(work) -> None:
                self.diary.append(f"wait {name} {k}")
                getattr(self._inner, name)(out, x)

        return Work()

    def all_to_all(self, out: np.ndarray, x: np.ndarray) -> Any:
        return self._later("all_to_all", out, x)

    def all_gather(self, out: np.ndarray, x: np.ndarray) -> Any:
        # what ranks agree on is bytes
        return self._inner.all_gather(out, x) if x.dtype == np.uint8 else self._later("all_gather", out, x)

    def all_reduce(self, x: np.ndarray) -> Any:
        return self._inner.all_reduce(x)

    reduce_scatter = all_to_all


@pytest.mark.parametrize("flat", [True, False])
def test_buckets_overlap_and_parameters_are_waited_for_by_use(flat):
    """While a bucket is stepped, the next one's gradients and the last one's parameters are under way."""

    def run(collective: Any) -> Any:
        p = [np.ones(4096, np.float32)] if flat else [np.ones(1000, np.float32) for _ in range(4)]
        late = Late(collective)
        opt = Sharded(fused_adam.SGD, p, late, lr=1.0, bucket_elements=1024)
        for k, shard in opt._pipeline.shards.items():
            shard.step = lambda *_, k=k, step=shard.step: (late.diary.append(f"step {k}"), step(*_))
        g = [np.ones_like(a) for a in p]
        opt.step(g, wait=False)
        own = sum((a == 0).sum() for a in p)
        seen = all((a == 0).all() for a in opt.params)
        opt.step(g, wait=False)
        opt.wait()
        return own, seen, all((a == -1).all() for a in p), late.diary

    for own, seen, last, diary in Threads.run(2, run):
        # of a flat buffer this rank has what it has stepped, and nothing that others have
        assert own == 2048 if flat else 2000 < own < 4000
        assert seen and last
        at = {what: k for k, what in reversed([*enumerate(diary)])}
        for k in range(3):
            assert at[f"start all_to_all {k + 1}"] < at[f"wait all_to_all {k}"] < at[f"step {k}"]
            assert at[f"start all_gather {k}"] < at[f"step {k + 1}"] < at[f"wait all_gather {k}"]
        if not flat:  # two copies serve all buckets
            assert all(at[f"wait all_gather {k}"] < at[f"start all_gather {k + 2}"] for k in range(2))


def test_gradients_are_never_written(backend):
    def run(collective: Any) -> bool:
        _, opt = make(collective, backend=backend, flat=True, mode="invariant")
        given = gradients(opt, 0)
        for g in given:
            for a in g.values():
                a.flags.writeable = False
        copies = [{name: a.copy() for name, a in g.items()} for g in given]
        opt.step(given)
        for g, before in zip(given, copies, strict=True):
            assert_same_bits(g, g.values(), before.values())
        return True

    assert all(Threads.run(2, run)) and all(Threads.run(1, run))


# --- threads ----------------------------------------------------------------------------------------------------------


def test_collectives():
    def run(c: Any) -> Any:
        n = c.size
        x = np.arange(2 * n, dtype=np.float32) + 100 * c.rank
        moved, scattered, gathered = np.empty_like(x), np.empty(2, np.float32), np.empty(2 * n, np.float32)
        c.all_to_all(moved, x).wait()
        c.reduce_scatter(scattered, x).wait()
        gathered[2 * c.rank : 2 * c.rank + 2] = x[:2]
        c.all_gather(gathered, gathered[2 * c.rank : 2 * c.rank + 2]).wait()
        count = np.array([c.rank, 2**40], np.int64)
        c.all_reduce(count).wait()
        return moved.tolist(), scattered.tolist(), gathered.tolist(), count.tolist()

    for rank, found in enumerate(Threads.run(3, run)):
        a, b = 2 * rank, 2 * rank + 1
        moved = [a, b, 100 + a, 100 + b, 200 + a, 200 + b]
        assert found == (moved, [300 + 3 * a, 300 + 3 * b], [0, 1, 100, 101, 200, 201], [3, 3 * 2**40])
    assert run(Alone()) == Threads.run(1, run)[0] == ([0, 1], [0, 1], [0, 1], [0, 2**40])


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("raises", ZeroDivisionError, "of its own"),
        ("returns", ConnectionError, "rank [02] of 3 waits in vain: rank 1 has returned"),
        ("differs", ConnectionError, "do not call the same: all_reduce, all_gather, all_reduce"),
        ("sleeps", ConnectionError, r"not all of 3 ranks came within 0.3 s"),
    ],
)
def test_a_thread_that_leaves_releases_the_others(case, kind, message):
    released = []

    def run(c: Any) -> None:
        x = np.ones(1, np.int64)
        c.all_reduce(x)
        try:
            if c.rank != 1:
                c.all_reduce(x)
            elif case == "raises":
                raise ZeroDivisionError("of its own")
            elif case == "differs":
                c.all_gather(np.empty(3, np.int64), x)
            elif case == "sleeps":
                time.sleep(0.8)
        except ConnectionError as error:
            released.append(str(error))
            raise

    with pytest.raises(kind, match=message) as caught:
        Threads.run(3, run, timeout=0.3 if case == "sleeps" else 60)
    assert "raised by rank" in caught.value.__notes__[-1]
    assert len(released) >= 2
    with pytest.raises(ValueError, match="n should be at least 1, got 0"):
        Threads.run(0, run)


def test_a_step_that_breaks_off_is_not_gone_on_with(monkeypatch):
    def run(c: Any) -> Any:
        _, opt = make(c)
        opt.step(gradients(opt, 0))
        if c.rank == 1:
            monkeypatch.setattr(opt._pipeline.gathers, "start", lambda k: 1 / 0)
        with pytest.raises((ConnectionError, ZeroDivisionError)) as caught:
            opt.step(gradients(opt, 1))
        with pytest.raises(RuntimeError, match=r"step 2 was cut short, so .* go on from the last checkpoint"):
            opt.step(gradients(opt, 1))
        with pytest.raises(RuntimeError, match="step 2 was cut short"):
            _ = opt.params
        return type(caught.value), str(caught.value)

    (zero, why), (one, _), (two, _) = Threads.run(3, run)
    assert (zero, one, two) == (ConnectionError, ZeroDivisionError, ConnectionError)
    assert why.startswith("rank 0 of 3, at t = 2: rank 0 of 3 waits in vain: rank 1 has returned. step 2 was cut short")


def test_alone_is_the_default_and_imports_nothing():
    code = """
import sys, numpy as np, fused_adam
from fused_adam.distributed import Sharded
p = np.ones(5, np.float32)
opt = Sharded(fused_adam.SGD, p, lr=1.0)
opt.step(np.ones(5, np.float32))
assert (p == 0).all() and opt.t == 1 and "rank 0 of 1" in repr(opt)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_is_neither_pickled_nor_copied():
    _, opt = make(None)
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        copy.deepcopy(opt)
