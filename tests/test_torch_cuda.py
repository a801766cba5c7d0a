"""`fused_adam.torch` on a GPU that is not there: tensors in host memory that pass for CUDA's; the bytes of NumPy."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import pickle
import re
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import fake_cupy
import numpy as np
import pytest
from conftest import same_bits
from fused_adam.bench.gpu import bits_torch
from fused_adam.bench.gpu.worker import Different
from torch_cases import full, give, ours, parameters, refuses, torch

from fused_adam.torch import _flat, _tensors
from fused_adam.torch._flat import _part

STREAM = 77
_kept: list[Any] = []  # or torch would give their memory to others


def on_gpu(t: Any) -> Any:
    """Let the memory of a tensor pass for the device's."""
    storage = t.untyped_storage()
    start, n = storage.data_ptr(), storage.nbytes()
    if n and not fake_cupy.on_device(start, n):
        room = np.frombuffer((ctypes.c_uint8 * n).from_address(start), np.uint8)
        fake_cupy._memory[start] = n, room
        fake_cupy.bisect.insort(fake_cupy._starts, start)
        _kept.append((storage, room))
    return t


def part_on_gpu(buffer: Any, start: int, p: Any) -> Any:
    """The memory that parameters lie in one behind the other is the device's as a whole."""
    return _part(buffer if _tensors.device(p) is None else on_gpu(buffer), start, p)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All tensors are on a GPU, but within `hosted`."""
    with fake_cupy.installed(monkeypatch) as module, monkeypatch.context() as patch:
        patch.setattr(_tensors, "device", lambda t: 0 if on_gpu(t) is t else None)
        patch.setattr(_flat, "_part", part_on_gpu)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
        yield module
        _kept.clear()


@contextmanager
def hosted() -> Any:
    """All tensors are in host memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tensors, "device", lambda t: None)
        yield


def give_there(params: list[Any], seed: int, absent: tuple[int, ...] = ()) -> None:
    give(params, seed, absent)
    for p in params:
        if p.grad is not None:
            on_gpu(p.grad)


def plain(t: Any) -> Any:
    """What NumPy takes."""
    return t.detach().view(torch.int16) if t.dtype == torch.bfloat16 else t.detach()


class Pair:
    """The same parameters in host memory, and on the GPU."""

    def __init__(self, name: str, kwargs: dict[str, Any], dtype: Any = None, **options: Any) -> None:
        self.host, self.device = parameters(dtype or torch.float32), parameters(dtype or torch.float32)
        here = {key: value for key, value in options.items() if key != "capturable"}
        with hosted():
            self.expected = getattr(ours, name)(self.host, backend="numpy", **kwargs, **here)
        self.ours = getattr(ours, name)(self.device, **kwargs, **options)

    def step(self, seed: int, absent: tuple[int, ...] = ()) -> None:
        with hosted():
            give(self.host, seed, absent)
            self.expected.step()
        give_there(self.device, seed, absent)
        self.ours.step()
        self.check()

    def check(self) -> None:
        assert all(same_bits(plain(a), plain(b)) for a, b in zip(self.host, self.device, strict=True))
        a, b = self.expected.state_dict()["state"], self.ours.state_dict()["state"]
        assert a.keys() == b.keys()
        for key, state in a.items():
            assert state.keys() == b[key].keys()
            assert all(same_bits(plain(x), plain(b[key][name])) for name, x in state.items())


@full
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes(cupy: Any, name: str, kwargs: dict[str, Any], dtype: str) -> None:
    pair = Pair(name, kwargs, getattr(torch, dtype))
    for n, absent in enumerate([(), (1,), (1,), (), (0, 2, 3, 4)]):
        pair.step(n, absent)
    assert {stream for _, _, stream in fake_cupy.launches} == {STREAM}


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("bfloat16", {}),
    ("bfloat16", {"state_dtype": "float32", "stochastic_rounding": True, "seed": 3}),
    ("bfloat16", {"master": "split16"}),
    ("bfloat16", {"master": "split8", "state_dtype": "int8"}),
    ("float16", {"master": "float32"}),
    ("float32", {"state_dtype": "int8"}),
]


@pytest.mark.parametrize(("dtype", "options"), FORMATS)
def test_bytes_of_formats(cupy: Any, dtype: str, options: dict[str, Any]) -> None:
    """Of parameters, and of all that is kept beside them; some are at other steps than the rest."""
    pair = Pair("AdamW", {"lr": 0.01}, getattr(torch, dtype), **options)
    for n, absent in enumerate([(), (1,), (1,), (), (0, 2, 3, 4)]):
        pair.step(n, absent)
    assert pair.ours.state_dict()["state"][1]["step"] == 3


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"zero_grads": True}])
def test_what_formats_do_not_go_with(cupy: Any, options: dict[str, Any]) -> None:
    params = parameters(torch.float16)
    opt = ours.AdamW(params, **options)
    give_there(params, 0)
    refuses(opt, (ValueError,), f"{next(iter(options))} is not offered with float16 parameters")


@full
def test_bytes_of_the_flat_layout(cupy: Any, name: str, kwargs: dict[str, Any]) -> None:
    pair = Pair(name, kwargs, flat=True)
    for n in range(3):
        for params, opt in ((pair.host, pair.expected), (pair.device, pair.ours)):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(n)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
        with hosted():
            pair.expected.step()
        copied = len(fake_cupy.copies)
        pair.ours.step()
        assert n == 0 or len(fake_cupy.copies) == copied  # what has not moved is not sent again
        pair.check()


def test_one_launch_for_all_groups(cupy: Any) -> None:
    params = parameters(torch.float32)
    opt = ours.AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}])
    for n in range(2):
        give_there(params, n)
        opt.step()
    assert len(fake_cupy.launches) == 2


def test_moved_parameters_are_found_again(cupy: Any) -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(0)
    pair.device[0].data = on_gpu(pair.device[0].data.clone())
    pair.ours.state[pair.device[1]]["exp_avg"] = on_gpu(pair.ours.state[pair.device[1]]["exp_avg"].clone())
    pair.step(1)


def test_host_and_gpu_in_one_optimizer(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(torch.float32), *parameters(torch.float64)]
    wanted = [*parameters(torch.float32), *parameters(torch.float64)]
    opt, expected = ours.AdamW(params), ours.AdamW(wanted, backend="numpy")
    with monkeypatch.context() as patch:
        patch.setattr(_tensors, "device", lambda t: 0 if on_gpu(t).dtype == torch.float32 else None)
        for n in range(3):
            give_there(params, n)
            opt.step()
    with hosted():
        for n in range(3):
            give(wanted, n)
            expected.step()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(params, wanted, strict=True))
    assert len(fake_cupy.launches) == 3
    with monkeypatch.context() as patch:
        patch.setattr(_tensors, "device", lambda t: 0 if on_gpu(t).dtype == torch.float32 else None)
        where = re.escape("max_grad_norm needs parameters in one place, at one step; these are in host memory, the")
        refuses(ours.AdamW(params, max_grad_norm=1.0), ValueError, where)


GUARDS: list[dict[str, Any]] = [
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
    {"max_grad_norm": 2.0, "skip_nonfinite": True, "zero_grads": True, "count_unmoved": True},
    {"zero_grads": True},
]


@pytest.mark.parametrize("options", GUARDS, ids=[" ".join(options) for options in GUARDS])
def test_guards(cupy: Any, options: dict[str, Any]) -> None:
    pair = Pair("AdamW", {"lr": 0.1}, **options)
    for n in range(3):
        pair.step(n)
        if options.get("zero_grads"):
            assert not any(p.grad.any() for p in (*pair.host, *pair.device))
    a, b = pair.expected.last_stats(), pair.ours.last_stats()
    assert a == b and ("max_grad_norm" not in options or a.grad_norm > 0)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_step_that_is_skipped_leaves_no_trace(cupy: Any, name: str) -> None:
    pair = Pair(
        name, {"lr": 0.1} if name == "Adam" else {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, skip_nonfinite=True
    )
    for params, where in ((pair.host, give), (pair.device, give_there)):
        where(params, 0)
        params[0].grad[0] = torch.nan
    before = [p.detach().clone() for p in pair.device]
    with hosted():
        pair.expected.step()
    pair.ours.step()
    assert all(same_bits(a, b.detach()) for a, b in zip(before, pair.device, strict=True))
    assert pair.expected.last_stats().skipped == pair.ours.last_stats().skipped == 1
    # another set of gradients: what was bound is no more, what was counted is
    for n, absent in enumerate([(1,), ()]):
        with hosted():
            give(pair.host, n + 1, absent)
            pair.expected.step()
        give_there(pair.device, n + 1, absent)
        pair.ours.step()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(pair.host, pair.device, strict=True))
    assert pair.expected.last_stats().skipped == pair.ours.last_stats().skipped == 1


def captured(opt: Any, params: list[Any]) -> None:
    """A graph of one step, which is not run."""
    before = [p.detach().clone() for p in params]
    fake_cupy.capturing.add(STREAM)
    opt.step()
    fake_cupy.capturing.clear()
    assert all(same_bits(a, b.detach()) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("flat", [False, True])
def test_a_captured_step_is_replayed(cupy: Any, flat: bool) -> None:
    pair = Pair("AdamW", {"lr": 0.1}, capturable=True, flat=flat)

    def fill(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(pair.host, pair.device, strict=True):
            for p in (a, b):
                p.grad = on_gpu(torch.zeros_like(p)) if p.grad is None else p.grad
            b.grad.copy_(a.grad.copy_(torch.randn(a.shape, generator=generator)))

    def both(run: Any) -> None:
        with hosted():
            pair.expected.step()
        run()
        pair.check()

    fill(0)
    both(pair.ours.step)
    captured(pair.ours, pair.device)
    for n in range(1, 5):
        fill(n)
        if n == 3:
            for opt in (pair.ours, pair.expected):
                opt.param_groups[0]["lr"] = 0.01
            pair.ours.prepare()
        both(fake_cupy.replay)
    assert pair.ours.state_dict()["state"][0]["step"] == 5
    again = pickle.loads(pickle.dumps(pair.ours))
    assert again.state_dict()["state"][0]["step"] == 5
    fill(5)
    both(pair.ours.step)


def test_an_own_stream_and_scales_of_the_scaler(cupy: Any) -> None:
    pair = Pair("AdamW", {"lr": 0.1}, amp_scaling=True, max_grad_norm=1.0)
    reads = len(fake_cupy.reads)
    for n, (scale, found) in enumerate([(1024.0, 0.0), (512.0, 1.0), (512.0, 0.0)]):
        for params, opt, where in ((pair.host, pair.expected, give), (pair.device, pair.ours, give_there)):
            where(params, n)
            for p in params:
                p.grad *= scale
            there = opt is pair.ours
            opt.grad_scale = cupy.asarray(np.float32([scale])) if there else torch.tensor(scale)
            opt.found_inf = cupy.asarray(np.float32([found])) if there else torch.tensor(found)
        with hosted():
            pair.expected.step()
        pair.ours.step()
        assert len(fake_cupy.reads) == reads
    pair.check()
    assert pair.ours.last_stats().skipped == 1


def test_cuda_parameters_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensors, "device", lambda t: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    params = parameters(torch.float32)
    give(params, 0)
    refuses(ours.AdamW(params), RuntimeError, r"on a GPU and no backend .*pip install 'fused-adam\[cuda13\]'")


@pytest.fixture
def harness(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/gpu/bits_torch.py on the GPU that is not there."""

    def pair(*arguments: Any, real: Any = bits_torch._pair, **options: Any) -> Any:
        params, opt, wanted, expected = real(*arguments, **options)

        def step(step: Any = expected.step) -> None:
            with hosted():
                step()

        expected.step = step
        return params, opt, wanted, expected

    smaller = {"MANY": (3, 4), "SHAPES": [(10, 13), (0, 3), (2100,), (2, 3, 5, 5)], "STEPS": 2}
    smaller["CLASSES"] = {name: bits_torch.CLASSES[name] for name in ("AdamW", "Lion")}
    for name, value in {"_torch": lambda: torch, "there": on_gpu, "_pair": pair, **smaller}.items():
        monkeypatch.setattr(bits_torch, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_cases_of_the_gpu_harness(harness: None) -> None:
    rows = bits_torch.cases([np.dtype(np.float32)])
    notes = [row[1](None, "cupy", *row[2:]) for row in rows if row[1] is not bits_torch.replay_case]
    assert notes[-1]["note"].startswith("host time of 3 tensors: in place ")


def test_the_gpu_harness_sees_a_wrong_step(harness: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cupy._Function, "__call__", lambda *_: None)  # a launch that does nothing
    with pytest.raises(Different, match="in place: parameter 0"):
        bits_torch.class_case(None, "cupy", "AdamW", np.dtype(np.float32))


@pytest.mark.parametrize("how", ["bound anew", "loaded"])
def test_what_a_graph_reads_is_kept(cupy: Any, how: str) -> None:
    params = parameters(torch.float32)
    opt = ours.AdamW(params, capturable=True)
    give_there(params, 0)
    opt.step()
    captured(opt, params)
    control = weakref.ref(opt._bound._sides[0]._runner.stepper._control)
    if how == "loaded":
        opt.load_state_dict(opt.state_dict())
        opt.step()
    else:
        params[1].grad = None
        refuses(opt, RuntimeError, "captured in a CUDA graph, and its replays would go on with what has changed since")
    gc.collect()
    assert control() is not None
