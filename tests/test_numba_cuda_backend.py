"""The host side of the numba-cuda backend on a GPU that is not there (see fake_numba)."""

from __future__ import annotations

import pickle
import sys
import types

import fake_cupy
import fake_numba
import numpy as np
import pytest
from conftest import require, same_bits
from test_cuda_arrays import Producer

import fused_adam
from fused_adam._codegen import bind
from fused_adam.backends._cuda_source import norm_source, rows_source, source

F32 = np.float32


@pytest.fixture
def cuda(monkeypatch):
    require("numba")
    with fake_numba.installed(monkeypatch) as module:
        yield module


def arrays(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(40, 50 + k)).astype(F32) for k in range(n)]


@pytest.mark.parametrize("flat", [False, True])
def test_the_bytes_of_numpy(cuda, flat):
    host = arrays()
    device = [cuda.to_device(a) for a in host]
    params = fused_adam.flatten(device) if flat else device
    opt = fused_adam.Adagrad(params, initial_accumulator_value=0.5)
    expected = fused_adam.Adagrad(host, initial_accumulator_value=0.5)
    assert opt.backend == "numba-cuda"
    for step in range(3):
        gs = arrays(seed=step + 1)
        expected.step(gs)
        opt.step([cuda.to_device(g) for g in gs])
    result = list(params) if flat else device
    assert all(isinstance(a, fake_numba.DeviceNDArray) for a in result)
    assert all(same_bits(a, b.get()) for a, b in zip(host, result, strict=True))
    ours, theirs = opt.state_dict()["state"], expected.state_dict()["state"]
    assert all(same_bits(a["v"], b["v"]) for a, b in zip(ours, theirs, strict=True))
    assert len(fake_cupy.launches) == 3 and len(fake_cupy.compiled) == 1


def test_adam_step_and_one_kernel_for_many_calls(cuda):
    host = [np.abs(a) for a in arrays(4)]
    host = [a[:, :50].copy() for a in host]
    device = [cuda.to_device(a) for a in host]
    for step in (1, 2, 3):
        fused_adam.adam_step(*host, step=step)
        fused_adam.adam_step(*device, step=step)
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))
    assert len(fake_cupy.compiled) == 1 and len(fake_cupy.launches) == 3


def test_each_kernel_by_its_source(cuda):
    from fused_adam.backends import numba_cuda

    rule, dtype = bind("adamw"), np.dtype(F32)
    made = [(source(rule, dtype), rule), (rows_source(rule, dtype), rule), (norm_source(dtype), None)]
    for one, of in made:
        numba_cuda._driver.kernel(one, of, dtype, 0)
    assert fake_cupy.compiled == ["adamw_f32", "adamw_rows_f32", "norm_f32"]


def test_streams(cuda):
    p, g = cuda.to_device(np.zeros(9, F32)), cuda.to_device(np.zeros(9, F32))
    opt = fused_adam.AdamW([p])
    opt.step([g])
    opt.step([g], stream=cuda.external_stream(7))
    opt.step([fake_cupy.Foreign(np.zeros(9, F32), stream=88)])
    assert [stream for *_, stream in fake_cupy.launches] == [0, 7, 0]
    assert fake_cupy.waits == [(0, 88)]


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_that_only_speak_dlpack(cuda, order):
    host = np.asarray(arrays(1)[0], order=order)
    opt, expected = fused_adam.AdamW([device := Producer(host)]), fused_adam.AdamW([host])
    g = np.asarray(arrays(1, seed=1)[0], order=order)
    opt.step([Producer(g)])
    expected.step([g])
    assert same_bits(host, device.array)
    assert same_bits(fused_adam.flatten([device])[0].get(), np.ascontiguousarray(host))
    saved = expected.state_dict()
    saved["state"][0] = {name: Producer(a) for name, a in saved["state"][0].items()}
    opt.load_state_dict(saved)
    ours, theirs = (o.state_dict()["state"][0] for o in (opt, expected))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_a_capture_is_refused(cuda):
    p, g = cuda.to_device(np.zeros(9, F32)), cuda.to_device(np.zeros(9, F32))
    opt = fused_adam.AdamW([p])
    opt.step([g], stream=5)
    fake_cupy.capturing.add(5)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph; use CuPy's"):
        opt.step([g], stream=5)
    assert opt.t == 1


def test_a_cupy_that_does_not_work_is_not_asked_for_its_stream(cuda, monkeypatch):
    with monkeypatch.context() as patch:  # undone before the fixture's own
        patch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))  # importable, and no more
        p, g = (cuda.to_device(np.zeros(9, F32)) for _ in range(2))
        fused_adam.adam_step(p, g, *(cuda.to_device(np.zeros(9, F32)) for _ in range(2)), step=1, backend="numba-cuda")
        assert len(fake_cupy.launches) == 1


def test_failures_change_nothing_and_are_named(cuda):
    values = arrays(3)
    device, gs = [cuda.to_device(a) for a in values], [cuda.to_device(a) for a in values]
    failed = 0
    for k in range(20):
        fake_cupy.fail["alloc"] = k
        try:
            fused_adam.AdamW(list(device)).step(gs)
            break
        except MemoryError:
            failed += 1
            assert all(same_bits(a, b.get()) for a, b in zip(values, device, strict=True))
    assert failed >= 6  # two states, three tables, the arguments
    fake_cupy.fail.clear()
    opt = fused_adam.AdamW(device)
    opt.prepare()
    fake_cupy.fail["launch"] = 0
    with pytest.raises(RuntimeError, match=r"launching adamw_f32 on GPU 0 failed: .*LAUNCH_OUT_OF_RESOURCES"):
        opt.step(gs)
    assert opt.t == 0


def test_without_any_cuda_package_the_message_says_what_to_install(cuda, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba_cuda", None)
        with pytest.raises(
            RuntimeError, match=r"no backend for it is available: cupy: .*cuda13.*numba-cuda: .*numba-cu13"
        ):
            fused_adam.AdamW([cuda.to_device(np.zeros(3, F32))])


def test_numpy_without_row_stack_is_said(cuda, monkeypatch):
    opt = fused_adam.AdamW([cuda.to_device(np.zeros(3, F32))])
    assert opt.backend == "numba-cuda"
    from fused_adam.backends import numba_cuda

    real = numba_cuda.importlib.import_module

    def import_module(name):
        if name == "numba.cuda.np.arrayobj":
            raise AttributeError("module 'numpy' has no attribute 'row_stack'")
        return real(name)

    monkeypatch.delattr(np, "row_stack", raising=False)
    monkeypatch.setattr(numba_cuda.importlib, "import_module", import_module)
    monkeypatch.setattr(numba_cuda.importlib.metadata, "version", lambda name: "0.30.4")
    why = {name: why for name, _, why in fused_adam.backends()}["numba-cuda"]
    assert why.startswith("numba-cuda 0.30.4 needs numpy.row_stack, which NumPy") and "CuPy" in why


def test_pickle(cuda):
    opt = fused_adam.AdamW(fused_adam.flatten([cuda.to_device(a) for a in arrays()]))
    opt.step([cuda.to_device(a) for a in arrays(seed=1)])
    again = pickle.loads(pickle.dumps(opt))
    again.step([cuda.to_device(a) for a in arrays(seed=2)])
    opt.step([cuda.to_device(a) for a in arrays(seed=2)])
    ours, theirs = (o.param_groups[0]["params"].data.get() for o in (opt, again))
    assert same_bits(ours, theirs) and isinstance(again.param_groups[0]["params"].data, fake_numba.DeviceNDArray)


def test_numbers_in_16_bits_are_refused(cuda):
    p = cuda.to_device(np.ones(5, np.float16))
    with pytest.raises(ValueError, match=r"numba-cuda backend does not step over float16 parameters .*install CuPy"):
        fused_adam.AdamW(p)
