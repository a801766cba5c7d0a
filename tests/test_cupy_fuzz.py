"""Random runs on the GPU that is not there beside the same runs on NumPy: what is remembered must never be stale."""

from __future__ import annotations

import fake_cupy
import numpy as np
import pytest
from conftest import same_bits

import fused_adam

RULES = [
    lambda p: fused_adam.AdamW(p),
    lambda p: fused_adam.SGD(p, momentum=0.9),
    lambda p: fused_adam.Adagrad(p, initial_accumulator_value=0.5),
]


def shapes(rng, n):
    pool = [(), (0,), (1,), (3,), (127,), (128,), (129,), (5, 7), (64, 64), (2, 3, 4), (4097,), (0, 4)]
    return [pool[k] for k in rng.integers(len(pool), size=n)]


def place(cupy, rng, a, keep):
    """The array on the GPU: CuPy's, another library's, or one that is not on a 16-byte boundary."""
    kind = rng.integers(5)
    if kind == 0 and a.ndim == 1 and a.size:
        device = cupy.asarray(np.concatenate([a[:1], a]))[1:]
        keep.append(device)
        return device
    if kind == 1:
        return fake_cupy.Foreign(a, stream=None if rng.integers(2) else 1)
    return cupy.asarray(np.asfortranarray(a) if kind == 2 and a.ndim == 2 else a)


def back(a):
    return a.get() if hasattr(a, "get") else a.array


def like(cupy, a, g):
    """A gradient on the GPU in the memory order of its parameter."""
    fortran = a.__cuda_array_interface__["strides"] is not None and len(g.shape) == 2
    return cupy.asarray(np.asfortranarray(g) if fortran else g)


@pytest.mark.parametrize("seed", range(60))
def test_a_run_of_steps(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    with fake_cupy.installed(monkeypatch) as cupy:
        dtypes = [np.float32, np.float64] if rng.integers(2) else [np.float32]
        groups = [
            [rng.normal(size=shape).astype(rng.choice(dtypes)) for shape in shapes(rng, rng.integers(1, 6))]
            for _ in range(rng.integers(1, 4))
        ]
        groups[0].append(np.ones(3, np.float32))  # on the GPU: what is empty does not say where it is
        keep = []
        device = [[place(cupy, rng, a, keep) for a in group] for group in groups]
        flat = len(dtypes) == 1 and bool(rng.integers(2))
        if flat:
            device = [fused_adam.flatten(group) for group in device]
        make = RULES[rng.integers(len(RULES))]
        ours = make([{"params": group} for group in device])
        theirs = make([{"params": group} for group in groups])
        given = None
        for _ in range(rng.integers(1, 8)):
            what = rng.choice(["new", "same", "same list", "one other", "flat", "lr", "load", "refused"])
            if given is None or what in ("new", "flat") or (what == "one other" and flat):
                host = [[rng.normal(size=a.shape).astype(a.dtype) for a in group] for group in groups]
                given = [
                    [like(cupy, a, g) for a, g in zip(params, gs, strict=True)]
                    for params, gs in zip(device, host, strict=True)
                ]
                if flat and what == "flat":
                    given = [fused_adam.flatten(group) for group in given]
            elif what == "same list":
                given = [list(group) if isinstance(group, list) else group for group in given]
            elif what == "one other" and isinstance(given[-1], list):
                k = rng.integers(len(given[-1]))
                host[-1][k] = -host[-1][k]
                given[-1][k] = like(cupy, device[-1][k], host[-1][k])
            elif what == "lr":
                for o in (ours, theirs):
                    o.param_groups[-1]["lr"] = 0.5
            elif what == "load":
                saved = ours.state_dict()
                ours = make([{"params": group} for group in device])
                ours.load_state_dict(saved)
            elif what == "refused":
                wrong = [*given[:-1], [None] * len(groups[-1])]
                t = ours.t
                with pytest.raises(TypeError, match="is None"):
                    ours.step(wrong)
                assert ours.t == t
            ours.step(given)
            theirs.step(host)
        for group, params in zip(groups, device, strict=True):
            assert all(same_bits(a, back(p)) for a, p in zip(group, params, strict=True))
        for a, b in zip(ours.state_dict()["state"], theirs.state_dict()["state"], strict=True):
            assert all(same_bits(a[name], b[name]) for name in b)
