"""Ctrl-C, and memory that runs out: a step is done or not begun, never half of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import require

TRIALS = 200

# Run in a process of its own, so that the step is on the main thread, which alone is interrupted, and a lost Ctrl-C
# cannot end the test run.
INTERRUPTS = """
import os, random, signal, sys, threading, time
import numpy as np
import fused_adam

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were started in the background
backend, trials = sys.argv[1], int(sys.argv[2])
# big enough that many interrupts fall into the step, on the threads' way too (2**18 elements on)
shapes = [(300, 300), (5,), (2**18 + 1,), (70, 1000), (3, 1)]


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s, np.float32) for s in shapes]


class Listed:
    def __init__(self):
        self.params, self.grads = arrays(0), arrays(1)
        self.opt = fused_adam.Adam(self.params, amsgrad=True, backend=backend)
        self.step = lambda: self.opt.step(self.grads)

    def refill(self):
        "Bring the gradients back."

    def bytes(self):
        states = self.opt.state_dict()["state"]
        return [self.opt.t, *(p.tobytes() for p in self.params), *(a.tobytes() for s in states for a in s.values())]


class Guarded(Listed):
    def __init__(self):
        super().__init__()
        options = {"skip_nonfinite": True, "max_grad_norm": 1.0, "zero_grads": True, "count_unmoved": True}
        self.opt = fused_adam.Adam(self.params, backend=backend, **options)
        self.step = lambda: self.opt.step(self.grads, grad_scale=3.0, found_inf=self.opt.t % 3 == 2)
        self.right = arrays(1)

    def refill(self):
        for g, right in zip(self.grads, self.right):
            g[...] = right

    def bytes(self):
        return [*super().bytes(), *(g.tobytes() for g in self.grads), self.opt.last_stats()]


class Flat(Listed):
    def __init__(self):
        flat = fused_adam.flatten(arrays(0))
        grads = fused_adam.flatten(arrays(1))
        self.params = [flat.data]
        self.opt = fused_adam.AdamW(flat, backend=backend)
        self.step = lambda: self.opt.step(grads)


class Function:
    def __init__(self):
        rng = np.random.default_rng(0)
        p, g, m, v = (np.abs(rng.standard_normal(2**19, np.float32)) for _ in range(4))
        self.arrays = p, m, v
        self.step = lambda: fused_adam.adam_step(p, g, m, v, step=3, backend=backend)

    def refill(self):
        pass

    def bytes(self):
        return [a.tobytes() for a in self.arrays]


def interrupt(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)


for make in (Listed, Guarded, Flat, Function):
    ours, plain = make(), make()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        ours.step(), plain.step()
        times.append((time.perf_counter() - start) / 2)
    ours.refill(), plain.refill()
    before = ours.bytes()
    plain.step()
    after = plain.bytes()
    done = inside = 0
    done_now = False
    for trial in range(10 * trials):
        if trial >= trials and inside > trials // 20:  # on a busy machine most come too late: then more are needed
            break
        if done_now:
            ours.refill(), plain.refill()
            before = plain.bytes()
            plain.step()
            after = plain.bytes()
        delay = random.Random(trial).uniform(0, 1.5) * min(times)
        thread = threading.Thread(target=interrupt, args=(delay,))
        hit = returned = False
        try:
            thread.start()
            ours.step()
            returned = True
            while thread.is_alive():
                time.sleep(1e-5)
            time.sleep(1e-3)
        except KeyboardInterrupt:
            hit = True
        thread.join()
        assert hit, f"{make.__name__} trial {trial}: the interrupt was lost"
        now = ours.bytes()
        done_now = now == after
        assert now in (before, after), f"{make.__name__} trial {trial}: half a step, returned={returned}"
        assert done_now or not returned
        done += done_now
        inside += done_now and not returned  # it came during the step and was held back to its end
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert inside > trials // 20, f"{make.__name__}: only {inside} of {trials} fell into the step"
    print(make.__name__, "done", done, "of", trial, "with the interrupt inside", inside)
if backend == "numba":
    from fused_adam.backends import numba_cpu
    assert not numba_cpu._pool.locked(), "an interrupt left the pool locked: steps would be serial from here on"
"""

# Every k-th allocation of a step fails, in a forked child each, for what NumPy or CPython do then is not ours to mend.
ALLOCATIONS = """
import gc, os, sys
import ml_dtypes, numpy as np, _testcapi
import fused_adam

# 16 bits: with random bits and other gradients; with a master, whose state dict is loaded
HALF = {"half": {"state_dtype": "bfloat16", "stochastic_rounding": True}, "split": {"master": "split16"},
        "eight": {"state_dtype": "int8", "master": "split8", "amsgrad": False}}
backend, cls, how = sys.argv[1], getattr(fused_adam, sys.argv[2]), sys.argv[3]
shapes = [(1000,), (40000,), (5, 2), ()]


def arrays(seed):
    out = []
    for s in shapes:
        a = np.asarray(np.random.default_rng(seed).standard_normal(s), np.float32)
        if how == "misaligned":
            raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(s)
            raw[...] = a
            a = raw
        out.append(a.astype(ml_dtypes.bfloat16) if how in HALF else a)
    return out


params, grads = arrays(0), arrays(1)
kw = {"Adam": {"amsgrad": True, "maximize": True}, "Lion": {"weight_decay": 0.1}, "RMSprop": {"centered": True},
      # guarded, the most arguments that a rule of ours has: with more than 20 Python's calls allocate
      "AdamW": {"amsgrad": True, "maximize": True, "numerics": "optax", "eps_root": 1e-6, "weight_decay": 0.1}}
kw = kw[sys.argv[2]] | HALF.get(how, {})
if how in ("rows", "mask"):
    kw["per_row_step"] = True
if how in ("guarded", "skipped"):
    kw |= {"skip_nonfinite": True, "max_grad_norm": 1.0, "zero_grads": True, "count_unmoved": True}
opt = cls(params, backend=backend, **kw)
if how == "rows":
    some = [[3, 1, 3, 999], [*range(0, 40000, 3)], [2, 0]]
    some = [fused_adam.SparseGrad(i, np.ones((len(i), *g.shape[1:]), g.dtype), k < 2)
            for k, (i, g) in enumerate(zip(some, grads))]
    grads = [*some, grads[3]]
masks = [np.arange(len(g)) % 3 == 1 for g in grads[:3]] + [None] if how == "mask" else None
p, g, m, v = arrays(2)[1], arrays(3)[1], arrays(4)[1], np.abs(arrays(5)[1])
loaded = None


def call():
    if how == "load":
        opt.load_state_dict(loaded)
    elif how == "function":
        fused_adam.adam_step(p, g, m, v, step=1, backend=backend)
    elif how == "mask":
        opt.step(grads, mask=masks)
    elif how in ("guarded", "skipped"):
        opt.step(grads, grad_scale=3.0, found_inf=how == "skipped")
    else:
        opt.step(grads)


def everything():
    d = opt.state_dict()
    states = [a.tobytes() for s in d["state"] for a in s.values()]
    arrays = [*params, p, m, v, *(grads if "zero_grads" in kw else [])]
    return [opt.t, [a.tobytes() for a in arrays], states, opt.param_groups[0]["lr"], opt.last_stats()]


def forked(k):
    "(what was left, the error) of the call in which allocation k fails; None for no failure at all"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        error = None
        gc.collect()  # the free lists are empty now: the next tuple is allocated
        if k is not None:
            _testcapi.set_nomemory(k, k + 1)
        try:
            call()
        except BaseException as e:
            error = e
        finally:
            _testcapi.remove_mem_hooks()
        now = everything()
        state = "unchanged" if now == before else "done" if now == after else "TORN"
        os.write(write, f"{state} {type(error).__name__}".encode())
        os._exit(0)
    os.close(write)
    text = os.read(read, 100).decode()
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    return tuple(text.split()) if not status else ("killed", os.waitstatus_to_exitcode(status))


opt.step(grads)
if how == "load":
    other = cls(arrays(6), lr=0.5, backend=backend, **kw)
    other.step(grads)
    loaded = other.state_dict()
call()  # compiled and warm
if how == "load":
    opt.step(grads)
    opt.param_groups[0]["lr"] = 0.25
if "zero_grads" in kw:
    for g, right in zip(grads, arrays(1)):
        g[...] = right
before = everything()
after = None
if os.fork() == 0:  # what a whole call leaves, told through a file
    call()
    import pickle
    pickle.dump(everything(), open(sys.argv[4], "wb"))
    os._exit(0)
os.wait()
import pickle
after = pickle.load(open(sys.argv[4], "rb"))
assert before != after
assert forked(None) == ("done", "NoneType")
gc.collect()
gc.freeze()  # or each child would take its time over what was imported
seen, clean, k = {}, 0, 0
while clean < 50 and k < 5000:
    outcome = forked(k)
    seen.setdefault(outcome, []).append(k)
    clean = clean + 1 if outcome == ("done", "NoneType") else 0
    k += int(sys.argv[5])
for (state, error), ks in seen.items():
    print(state, error, len(ks), ks[:8])
# NumPy and Numba make other errors of some: SystemError and KeyError, which is theirs to mend
assert all(state == "unchanged" or (state, error) == ("done", "NoneType") for state, error in seen), "half a step"
assert len(seen[("unchanged", "MemoryError")]) > 20, "nothing failed: the test has lost its teeth"
"""


def run(script, *arguments, timeout=120, **environment):
    """The output of a script, text or a file; a hang, a signal or a failed assertion in it fails the test."""
    code = ["-c", script] if isinstance(script, str) else [script]
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", *map(str, (*code, *arguments))]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_ctrl_c_never_leaves_half_a_step_and_is_never_lost(backend):
    out = run(INTERRUPTS, backend, TRIALS)
    done = [int(trials) for trials in re.findall(r"done \d+ of (\d+)", out)]  # more if most came too late
    assert len(done) == 4 and min(done) >= TRIALS


@pytest.mark.skipif(sys.platform == "win32", reason="os.fork")
@pytest.mark.parametrize(
    ("backend", "how", "cls", "stride"),
    [
        ("numpy", "plain", "Lion", 1),
        ("numpy", "misaligned", "RMSprop", 1),
        ("numpy", "function", "Adam", 1),
        ("numpy", "load", "Adam", 2),  # the same for every backend
        ("numba", "plain", "Adam", 3),  # one compiled call, which allocates nothing, after many that do
        ("numba", "function", "Adam", 1),
        ("numpy", "rows", "Adam", 7),
        ("numpy", "mask", "Lion", 7),
        ("numba", "rows", "Adam", 7),
        ("numba", "mask", "RMSprop", 7),
        ("numpy", "guarded", "AdamW", 11),
        ("numpy", "skipped", "Lion", 7),
        ("numba", "guarded", "Adam", 11),
        ("numba", "skipped", "RMSprop", 11),
        ("numpy", "half", "Lion", 11),
        ("numba", "half", "Lion", 11),
        ("numpy", "split", "Lion", 11),
        ("numpy", "eight", "Adam", 17),
    ],
)
def test_a_failed_allocation_leaves_all_as_it_was(backend, how, cls, stride, tmp_path):
    pytest.importorskip("_testcapi", reason="this Python was built without its test modules")
    if backend == "numba":
        require("numba")
    run(ALLOCATIONS, backend, cls, how, tmp_path / "after", stride)
