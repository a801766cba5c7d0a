"""Steps over rows by both CUDA backends on a GPU that is not there (see fake_cupy and fake_numba), against NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fake_cupy
import fake_numba
import numpy as np
import pytest
from conftest import require, same_bits

import fused_adam
from fused_adam import SparseGrad
from fused_adam.backends import _cuda_rows

F32 = np.float32
SHAPES = {"table": (50, 16), "b": (7,), "W": (9, 13), "long": (3, 5000), "cube": (6, 3, 4), "four": (4, 3, 2, 2)}
SHAPES |= {"empty": (0, 3), "flat": (4, 0)}


class Gpu(NamedTuple):
    name: str
    put: Callable[[Any], Any]


@pytest.fixture(params=["cupy", "numba-cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if request.param == "cupy":
        with fake_cupy.installed(monkeypatch) as cupy:
            yield Gpu("cupy", cupy.asarray)
    else:
        require("numba")
        with fake_numba.installed(monkeypatch) as cuda:
            yield Gpu("numba-cuda", cuda.to_device)


def rule_of_ours(p, g, m, c, lr):
    m = (m - c * m) + c * g
    p = p - lr * m
    return p, m


OWN: Any = fused_adam.rule(rule_of_ours)
CLASSES: list[Callable[..., Any]] = [
    lambda p, **k: fused_adam.SGD(p, lr=0.1, **k),
    lambda p, **k: fused_adam.RMSprop(p, centered=True, momentum=0.5, **k),
    lambda p, **k: fused_adam.Adam(p, amsgrad=True, maximize=True, **k),
    lambda p, **k: fused_adam.AdamW(p, lr=0.1, **k),
    lambda p, **k: OWN(p, c=0.1, lr=0.5, **k),
]


def arrays(seed: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


class Pair:
    """The same parameters in host memory and on the GPU, each with its optimizer."""

    def __init__(self, gpu: Gpu, make: Callable[..., Any], dtype: Any = F32, **options: Any) -> None:
        self.gpu = gpu
        self.host = arrays(0, dtype)
        self.device = {name: gpu.put(a) for name, a in self.host.items()}
        self.expected = make(self.host, backend="numpy", **options)
        self.ours = make(self.device, **options)
        assert self.ours.backend == gpu.name

    def put(self, g: Any) -> Any:
        """With its indices on the GPU too, where they come in twos."""
        if not isinstance(g, SparseGrad):
            return self.gpu.put(g)
        indices = g.indices if len(g.indices) % 2 else self.gpu.put(g.indices)
        return SparseGrad(indices, self.gpu.put(g.values), g.lazy)

    def step(self, gs: dict[str, Any], **options: Any) -> None:
        self.expected.step(gs, **options)
        self.ours.step({name: self.put(g) for name, g in gs.items()}, **options)

    def check(self) -> None:
        for name, a in self.host.items():
            assert same_bits(a, self.device[name].get()), name
        for mine, theirs in zip(self.ours.state_dict()["state"], self.expected.state_dict()["state"], strict=True):
            assert all(same_bits(mine[name], theirs[name]) for name in theirs)
        assert self.ours.t == self.expected.t


def some_rows(step: int, dtype: Any, lazy: bool) -> dict[str, Any]:
    """Gradients of which some are of rows: other ones at each step, in any order and often, or none."""
    rng, gs = np.random.default_rng(step), arrays(step, dtype)
    for k, name in enumerate(SHAPES):
        if (k + step) % 3:
            n = SHAPES[name][0]
            size = (0, n // 2, 2 * n, 1)[(k * step) % 4] if n else 0
            indices = rng.integers(0, max(1, n), size).astype([np.int32, np.int64][k % 2])
            gs[name] = SparseGrad(indices, rng.normal(size=(size, *SHAPES[name][1:])).astype(dtype), lazy)
    return gs


@pytest.mark.parametrize("own", [False, True], ids=["one t", "own t"])
@pytest.mark.parametrize(("make", "dtype"), [*((make, np.float32) for make in CLASSES), (CLASSES[2], np.float64)])
def test_mixed_steps_give_the_bytes_of_numpy(gpu: Gpu, make: Any, own: bool, dtype: Any) -> None:
    pair = Pair(gpu, make, dtype, per_row_step=own)
    for step in range(1, 7):
        pair.step(some_rows(step, dtype, lazy=step % 2 == 0))
    pair.step(arrays(7, dtype))
    pair.check()


@pytest.mark.parametrize("own", [False, True], ids=["one t", "own t"])
def test_masks(gpu: Gpu, own: bool) -> None:
    pair = Pair(gpu, fused_adam.AdamW, per_row_step=own)
    for step, share in enumerate((0.5, 0, 1, 0.1, None)):
        rng = np.random.default_rng(step)
        masks = {name: rng.random(shape[0]) < (share or 0) for name, shape in SHAPES.items()}
        masks |= {"b": None} if step % 2 else {}
        pair.step(arrays(step, F32), mask=None if share is None else masks)
    pair.check()


def test_groups_and_launches(gpu: Gpu) -> None:
    """One launch over rows and one over the rest, for all groups of a rule; one copy for what moves."""
    host = [np.ones((20, 8), F32) for _ in range(4)]
    device = [gpu.put(a) for a in host]

    def make(a: list[Any]) -> Any:
        return fused_adam.AdamW([{"params": a[:2], "lr": 0.1}, {"params": a[2:], "lr": 0.2}])

    ours, expected = make(device), make(host)
    for _ in range(2):
        fake_cupy.launches.clear(), fake_cupy.copies.clear()
        dense = np.full((20, 8), 0.5, F32)
        sparse = SparseGrad([3, 3, 1], np.full((3, 8), 2, F32), True)
        expected.step([[dense, sparse], [sparse, dense]])
        lent = SparseGrad([3, 3, 1], gpu.put(sparse.values), True)
        ours.step([[gpu.put(dense), lent], [lent, gpu.put(dense)]])
    assert sorted(name for name, *_ in fake_cupy.launches) == ["adamw_f32", "adamw_rows_f32"]
    assert len(fake_cupy.copies) == (
        2 if gpu.name == "cupy" else 4
    )  # gradients' addresses, and this; for Numba arguments
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))


def test_tables_are_kept_for_some_choices_of_whole_parameters(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(gpu, fused_adam.AdamW)
    monkeypatch.setattr(_cuda_rows, "_PATTERNS", 2)
    for step in (1, 2, 3, 1, 1, 3):
        pair.step(some_rows(step, F32, lazy=True))
        assert len(pair.ours._stepper._wholes) <= 2
    pair.check()


def test_nothing_moves(gpu: Gpu) -> None:
    p = gpu.put(np.ones((4, 2), F32))
    opt = fused_adam.AdamW([p])
    opt.step([SparseGrad([], gpu.put(np.zeros((0, 2), F32)), lazy=True)])
    opt.step([gpu.put(np.zeros((4, 2), F32))], mask=np.zeros(4, bool))
    assert opt.t == 2 and not fake_cupy.launches


def test_streams(gpu: Gpu) -> None:
    """What a step reads is not written anew before it is done, whichever stream the next one is on."""
    p, values = gpu.put(np.ones((4, 2), F32)), gpu.put(np.ones((1, 2), F32))
    lent = SparseGrad([2], fake_cupy.Foreign(np.ones((1, 2), F32), stream=88), True)
    opt = fused_adam.AdamW([p])
    opt.step([SparseGrad([1], values, True)], stream=7)
    fake_cupy.waits.clear()
    opt.step([lent], stream=7)
    opt.step([lent], stream=9)
    assert fake_cupy.waits == [(7, 88), (7, 7), (9, 88), (9, 7)]
    assert [stream for *_, stream in fake_cupy.launches] == [7, 7, 9]


def test_a_capture_is_refused(gpu: Gpu) -> None:
    p, values = gpu.put(np.ones((4, 2), F32)), gpu.put(np.ones((1, 2), F32))
    opt = fused_adam.AdamW([p])
    fake_cupy.capturing.add(5)
    with pytest.raises(RuntimeError, match="a step over rows cannot be captured in a CUDA graph"):
        opt.step([SparseGrad([1], values)], stream=5)
    assert opt.t == 0 and not fake_cupy.launches and not fake_cupy.copies


@pytest.mark.parametrize("own", [False, True], ids=["one t", "own t"])
def test_what_is_wrong_changes_nothing(gpu: Gpu, own: bool) -> None:
    host = [np.ones((4, 2), F32), np.ones(3, F32), np.ones((5, 2), F32)]
    device = [gpu.put(a) for a in host]
    opt = fused_adam.AdamW(device, per_row_step=own)
    right = [SparseGrad([1, 1], gpu.put(np.ones((2, 2), F32))), gpu.put(np.ones(3, F32)), gpu.put(np.ones((5, 2), F32))]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (SparseGrad([0, 1], device[0][:2]), ValueError, r"grads\[2\] overlaps a parameter"),
        (SparseGrad([5], gpu.put(np.ones((1, 2), F32))), ValueError, r"grads\[2\].indices"),
        (SparseGrad([1], gpu.put(np.ones((2, 2), F32))), ValueError, r"grads\[2\].values has shape \(2, 2\)"),
        (SparseGrad([1], np.ones((1, 2), F32)), ValueError, r"grads\[2\].values is in host memory"),
        (SparseGrad([1], gpu.put(np.ones((1, 2)))), ValueError, r"grads\[2\].values has dtype float64"),
        (gpu.put(np.ones((5, 3), F32)), ValueError, r"grads\[2\] has shape \(5, 3\)"),
    ]
    for g, error, match in wrong:
        with pytest.raises(error, match=match):
            opt.step([*right[:2], g])
    opt.step([*right[:2], SparseGrad([0], gpu.put(np.ones((1, 2), F32)))])  # compiles, and has its tables
    before = [a.get() for a in device]
    for k in range(20):
        fake_cupy.fail["alloc"] = k
        try:
            fused_adam.AdamW([device[0], device[1]], per_row_step=own).step(right[:2])
            break
        except MemoryError:
            assert all(same_bits(a, b.get()) for a, b in zip(before, device, strict=True))
    assert k >= 3 and opt.t == 1  # two states, and what moves
