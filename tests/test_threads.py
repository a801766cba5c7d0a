"""Threads, forks and spawned children get the bytes of a serial run, on each of Numba's threading layers; none dies."""

from __future__ import annotations

import pytest
from conftest import require
from test_interrupt import run

# Run in a process of its own: a threading layer is chosen once, and a crash must fail the test rather than end it.
COMMON = """
import multiprocessing, os, sys, threading, time
import numpy as np
import fused_adam

SHAPES = [(2**18 + 5,), (3,), (100, 200)]  # more than 2**18 elements: Numba's threads take part


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s, np.float32) for s in SHAPES]


def train(seed, backend, steps=6):
    "The bytes after some steps: a list of arrays, and adam_step on the largest of them."
    params, grads = arrays(seed), arrays(seed + 100)
    options = {"skip_nonfinite": True, "max_grad_norm": 1.0, "count_unmoved": True} if seed % 2 else {}
    opt = fused_adam.AdamW(params, backend=backend, **options)
    p, g, m, v = (np.abs(arrays(seed + k)[0]) for k in range(4))
    for t in range(steps):
        opt.step(grads)
        fused_adam.adam_step(p, g, m, v, step=t + 1, backend=backend)
    return [*(a.tobytes() for a in (*params, p, m, v)), opt.last_stats()]


def child(seed, backend, queue):
    queue.put(train(seed, backend))


if __name__ == "__main__":
    backend = sys.argv[1]
    EXPECTED = {seed: train(seed, "numpy", 6) for seed in range(8)}
    if backend == "numba":
        import numba

        @numba.njit(parallel=True)
        def users_own(a):
            total = 0.0
            for i in numba.prange(a.size):
                total += a[i] * a[i]
            return total
"""

EIGHT_THREADS = """
    train(0, backend)
    results = {}
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        for _ in range(3):
            results.setdefault(seed, []).append(train(seed, backend))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {seed: [EXPECTED[seed]] * 3 for seed in range(8)}
    assert train(0, backend) == EXPECTED[0]
    print("ok")
"""

FIRST_USE_IN_THREADS = """
    # import, compilation and the start of the pool race with each other; "auto" looks for what is imported by now
    results = {}
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        results[seed] = train(seed, "auto" if seed % 2 else backend)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == EXPECTED
    print("ok")
"""

CHILDREN = """
    assert train(0, backend) == EXPECTED[0]  # the pool runs
    holders = []
    if sys.argv[2] == "thread":  # a child forked while another thread is in the middle of its steps
        stop = threading.Event()

        def work():
            while not stop.is_set():
                train(1, backend)

        holders = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in holders]
        time.sleep(0.05)
    for seed in range(3):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            ok = train(seed, backend) == EXPECTED[seed]
            inner = os.fork()  # and a grandchild
            if not inner:
                os._exit(0 if train(seed, backend) == EXPECTED[seed] else 1)
            ok = ok and os.waitpid(inner, 0)[1] == 0
            os.write(write, b"y" if ok else b"n")
            os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"y", "a forked child died or computed something else"
        assert os.waitpid(pid, 0)[1] == 0
    assert train(0, backend) == EXPECTED[0]  # the parent still runs
    if holders:
        stop.set()
        [t.join() for t in holders]
    else:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        spawned = context.Process(target=child, args=(3, backend, queue))
        spawned.start()
        assert queue.get(timeout=60) == EXPECTED[3]
        spawned.join()
        assert spawned.exitcode == 0
    print("ok")
"""

FORK_BEFORE_FIRST_USE = """
    # the user's own Numba code starts the pool, and only the child steps with Numba for the first time
    users_own(np.ones(10**6))
    pid = os.fork()
    if not pid:
        os._exit(0 if train(0, backend) == EXPECTED[0] else 1)
    assert os.waitpid(pid, 0)[1] == 0, "the child died"
    print("ok")
"""

BESIDE_THE_USERS_PRANGE = """
    train(0, backend)
    stop = threading.Event()

    def work():
        a = np.ones(10**5)
        while not stop.is_set():
            assert users_own(a) == 10**5

    users_own(np.ones(10))
    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    results = [train(seed, backend) for seed in range(8)]
    stop.set()
    [t.join() for t in threads]
    assert results == list(EXPECTED.values())
    print("ok")
"""

LAYERS = [("numpy", ""), ("numba", "omp"), ("numba", "workqueue")]


def go(tmp_path, backend, layer, body, *arguments):
    if backend == "numba":
        require("numba")
    if layer == "omp":
        try:
            from numba.np.ufunc import omppool  # noqa: F401
        except ImportError:
            pytest.skip("this Numba was built without OpenMP")
    path = tmp_path / "script.py"  # a file, because a spawned child imports it
    path.write_text(COMMON + body)
    environment = {"NUMBA_THREADING_LAYER": layer} if layer else {}
    assert "ok" in run(path, backend, *arguments, timeout=100, **environment)


@pytest.mark.parametrize(("backend", "layer"), LAYERS)
def test_eight_threads(backend, layer, tmp_path):
    go(tmp_path, backend, layer, EIGHT_THREADS)


@pytest.mark.parametrize(("backend", "layer"), LAYERS)
def test_first_use_in_eight_threads(backend, layer, tmp_path):
    go(tmp_path, backend, layer, FIRST_USE_IN_THREADS)


@pytest.mark.parametrize("parent", ["alone", "thread"])
@pytest.mark.parametrize(("backend", "layer"), LAYERS)
def test_forked_and_spawned_children(backend, layer, parent, tmp_path):
    go(tmp_path, backend, layer, CHILDREN, parent)


@pytest.mark.parametrize(("backend", "layer"), LAYERS[1:])
def test_a_child_of_a_parent_whose_own_code_ran_the_pool(backend, layer, tmp_path):
    go(tmp_path, backend, layer, FORK_BEFORE_FIRST_USE)


def test_beside_a_users_own_prange(tmp_path):
    """With OpenMP; Numba's workqueue layer aborts whatever two threads do at once, and we cannot keep users from it."""
    go(tmp_path, "numba", "omp", BESIDE_THE_USERS_PRANGE)
