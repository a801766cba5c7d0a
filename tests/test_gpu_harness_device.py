"""What of `make gpu` needs more of a device than fake_cupy is: run once each, on a larger pretence.

Whether streams are in order and times are right only a GPU can tell; that the code is free of slips is told here.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import fake_cupy
import fake_stored
import numpy as np
import pytest
from fused_adam.bench.gpu import arrays, bits, bits_device, bits_guard, bits_stored, peers, speed, subject, worker
from fused_adam.bench.gpu.clock import Gpu
from fused_adam.bench.gpu.peers import Tensors
from fused_adam.bench.gpu.worker import Different, Skipped

from fused_adam.backends import _cuda_stored

ROOM = [2**40]


class Stream(fake_cupy.Stream):
    """Never done. What is launched while it captures is launched by its graph instead."""

    captured: list | None = None
    done = False

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking
        super().__init__(4711)

    def synchronize(self):
        pass

    def begin_capture(self):
        Stream.captured = []

    def end_capture(self):
        calls, Stream.captured = Stream.captured, None
        return SimpleNamespace(launch=lambda: [run(*arguments) for run, arguments in calls])


class Device(fake_cupy.Device):
    def __init__(self, number=0):
        super().__init__(number)

    def synchronize(self):
        pass


class Event(fake_cupy.Event):
    def __init__(self, disable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        self.ptr = stream.ptr if stream is not None else 0


class RawKernel:
    def __init__(self, code, name):
        assert f"void {name}(" in code

    def __call__(self, grid, block, arguments):
        assert all(isinstance(a, fake_cupy.ndarray | np.int64) for a in arguments)
        if len(arguments) == 4:
            late, source, n, _ = arguments
            late[:n] = source[:n]


class Pool:
    def set_limit(self, size):
        """Each 512 bytes are room for one allocation."""
        fake_cupy.fail.clear()
        if size:
            fake_cupy.fail["alloc"] = (size - 1) // 512

    def total_bytes(self):
        return 0

    def free_all_blocks(self):
        pass


@contextmanager
def pretended(monkeypatch):
    """fake_cupy with streams, graphs, events and a memory pool."""

    def launch(self, grid, block, args, shared, stream):
        if Stream.captured is None:
            run(self, grid, block, args, shared, stream)
        else:
            Stream.captured.append((run, (self, grid, block, tuple(a.copy() for a in args), shared, stream)))

    run = fake_cupy._Function.__call__
    monkeypatch.setattr(fake_cupy._Function, "__call__", launch)
    monkeypatch.setattr(fake_cupy.Stream, "done", False, raising=False)
    with fake_cupy.installed(monkeypatch) as module:
        module.RawKernel = RawKernel
        module.empty = module.zeros
        module.empty_like = lambda a: module.zeros(a.shape, a.dtype)
        module.get_default_memory_pool = Pool
        module.cuda.Stream, module.cuda.Event = Stream, Event
        module.cuda.Device = Device
        module.cuda.get_elapsed_time = lambda start, end: 1.0  # millisecond
        module.cuda.set_allocator = lambda allocator: None
        module.cuda.runtime.memGetInfo = lambda: (ROOM[0], ROOM[0])
        module.cuda.runtime.memcpyDeviceToDevice = 3
        copy = module.cuda.runtime.memcpyAsync
        module.cuda.runtime.memcpyAsync = lambda to, of, n, kind, stream: kind == 3 or copy(to, of, n, kind, stream)
        monkeypatch.setattr(peers, "_TILE", 100)
        peers._tile.cache_clear()
        yield module
        peers._tile.cache_clear()


@pytest.fixture
def cupy(monkeypatch):
    with pretended(monkeypatch) as module:
        yield module


def test_every_case_of_the_device(cupy, monkeypatch):
    for name, value in (("_TILE", 1021), ("_WINDOW", 64), ("_LARGE", (("momentum", 9000), ("sgd", 70_000)))):
        monkeypatch.setattr(bits_device, name, value)
    lib = arrays.library("cupy")
    notes = {name: run(lib, "cupy", *arguments) for name, run, *arguments in bits_device.cases()}
    assert notes["memory that ends anywhere"] == {"note": "refused 5 times"}  # two states and three tables
    late = [note for name, note in notes.items() if "late gradient" in name]
    assert late == [{"note": "the step returned before its gradient was there"}] * 4
    assert {stream for *_, stream in fake_cupy.launches} == {0, 4711}
    assert (0, 4711) in fake_cupy.waits
    with pytest.raises(Skipped, match="cannot be limited"):
        bits_device.room_case(lib, "numba-cuda")
    monkeypatch.setattr(arrays._Cupy, "free_bytes", lambda self: 1000)
    with pytest.raises(Skipped, match="9000 elements need 1 GiB; 0 are free"):
        bits_device.large_case(lib, "cupy")


def test_replays(cupy, monkeypatch):
    monkeypatch.setattr(bits_guard, "REPLAYS", 9)
    note = bits_guard.replay_case(arrays.library("cupy"), "cupy", np.dtype(np.float32))
    assert note == {"note": "t 7, 3 skipped"}


def test_numbers_in_16_and_8_bits(cupy, monkeypatch):
    monkeypatch.setattr(bits_stored, "REPLAYS", 3)
    monkeypatch.setattr(bits_stored, "SHAPES", bits_stored.SHAPES[:4])
    lib = arrays.library("cupy")
    assert len(bits_stored.kernels()) == 57 and len(bits_stored.cases()) == 57 + 3
    for name, run, *arguments in bits_stored.cases()[:8]:
        assert run(lib, "cupy", *arguments) is None, name
    bits_stored.replay_case(lib, "cupy")
    for name, value in (("_TILE", 64 * 9), ("_WINDOW", 128)):
        monkeypatch.setattr(bits_stored, name, value)
    bits_stored.large_case(lib, "cupy", 5001)
    held = fake_cupy.held
    monkeypatch.setattr(Pool, "total_bytes", lambda self: held())
    note = bits_stored.memory_case(lib, "cupy", 2**16)["note"]
    assert note == "5.0625 bytes a parameter beside the gradient, at most 1.0000 times the arrays"
    monkeypatch.setattr(Pool, "total_bytes", lambda self: 2 * held())
    with pytest.raises(Different, match="bytes a parameter, at most"):
        bits_stored.memory_case(lib, "cupy", 2**16)
    with pytest.raises(Skipped, match="only CuPy steps over numbers in 16 and 8 bits"):
        bits_stored.replay_case(lib, "numba-cuda")


def test_wrong_bytes_in_16_and_8_bits_are_found(cupy, monkeypatch):
    """A step number that the kernel does not see changes random bits and dithers."""
    monkeypatch.setattr(_cuda_stored.StoredLaunch, "__call__", _cuda_stored._cuda.StepLaunch.__call__)
    monkeypatch.setattr(fake_stored, "checker", lambda text: lambda a, blocks: None)
    lib = arrays.library("cupy")
    cases = {name: arguments for name, _, *arguments in bits_stored.cases()}
    with pytest.raises(Different, match="stochastic False, flat False: parameter 0"):
        bits_stored.stored_case(lib, "cupy", *cases["stored adamw bfloat16 bfloat16 int8 split8"])
    monkeypatch.setattr(bits_stored, "_TILE", 64 * 9)
    with pytest.raises(Different, match="m from element 0"):
        bits_stored.large_case(lib, "cupy", 5001)


def test_a_wrong_window_and_a_stale_gradient_are_found(cupy, monkeypatch):
    for name, value in (("_TILE", 1021), ("_WINDOW", 64), ("_LARGE", (("sgd", 70_000),))):
        monkeypatch.setattr(bits_device, name, value)
    lib = arrays.library("cupy")
    tables = bits.shared()
    monkeypatch.setattr(tables, "run", lambda on, *rest, run=tables.run: None if on == "cupy" else run(on, *rest))
    with pytest.raises(Different, match="sgd: p from element 0: 64 of 64 differ"):
        bits_device.large_case(lib, "cupy")
    monkeypatch.setattr(RawKernel, "__call__", lambda self, grid, block, arguments: None)  # it never gets there
    with pytest.raises(Different, match="stream=: 5000 of 5000 differ"):
        bits_device.streams_case(lib, "cupy", "stream=")


def test_the_speed_cases(cupy, monkeypatch):
    monkeypatch.setattr(speed, "SIZES", (2**10, 2**12))
    monkeypatch.setattr(speed, "MANY", ((9, 2**10),))
    monkeypatch.setattr(speed, "wall_times", partial(speed.wall_times, sample_s=1e-4))
    monkeypatch.setattr(speed, "values_case", lambda clock, free, values=speed.values_case: values(clock, free, 2**10))
    monkeypatch.setattr(speed, "stored_case", lambda clock, free, stored=speed.stored_case: stored(clock, free, 2**10))
    monkeypatch.setattr(speed, "host_case", lambda clock, host=speed.host_case: host(clock, more=10))
    found = {case.name: worker._outcome(case) for case in speed.cases()}
    assert list(found) == ["2^10", "2^12", "9 x 2^10", "9 x 2^10, 8 groups", "host time", "values", "stored"]
    assert {e["status"] for e in found.values()} == {"ok"}, found
    assert set(found["2^10"]["samples"]["device"]) >= {"cupy", "roof", "copy"}
    assert set(found["9 x 2^10, 8 groups"]["samples"]["end to end"]) >= {"cupy", "cupy list"}
    assert set(found["values"]["samples"]["device"]) == {"random", "zero gradients", "subnormal"}
    stored = {f"{kind}{v}" for kind in ("12 bytes", "bf16") for v in ("", ", zeros", ", subnormal")}
    assert set(found["stored"]["samples"]["device"]) == stored | {"copy, 12 bytes", "copy, bf16"}
    assert {"list of 1,000", "flat buffer of 20"} <= set(found["host time"]["samples"]["host"])
    for e in found.values():  # PyTorch and Numba do not fall for this GPU
        assert all("torch" in name or "numba" in name for name in e.get("absent", {})), e["absent"]
    ROOM[0] = 1000
    try:
        assert worker._outcome(speed.cases()[0])["reason"] == "it needs 8 GiB, and 0 are free"
    finally:
        ROOM[0] = 2**40


def test_tensors(cupy):
    params, grads = Tensors(5, 70, groups=2).draw()
    assert [len(p) for p in params] == [3, 2] == [len(g) for g in grads]
    tile = peers._tile(0)[:100] * np.float32(0.1)
    assert (params[1][0].get() == np.resize(tile, 350)[70:140]).all()
    assert (peers.random(30, 3, 1e-39, positive=True).get() > 0).all()


def test_the_clock(cupy):
    gpu = Gpu()
    gpu.spin(0.1)
    gpu.flush()
    gpu.synchronize()
    assert gpu.elapsed(gpu.record(), gpu.record()) == 1e-3 and gpu.now() < gpu.now()


def test_what_the_tools_look_at(cupy, monkeypatch):
    subject.small()
    assert len(fake_cupy.launches) == 20
    plain = {f"{n}_{t}" for n in ("adamw", "sgd", "adamw_rows") for t in ("f32", "f64")}
    assert {name for name, *_ in fake_cupy.launches} == plain | {"adamw_bf16_bf16_int8_split8_stochastic"}
    monkeypatch.setattr(subject, "LARGE", 5000)
    subject.large()
    assert fake_cupy.launches[20:] == [("adamw_f32", 3, 0)] * 5
