"""The CuPy backend on a GPU that is not there (see fake_cupy): bytes, launches, uploads, refusals, streams."""

from __future__ import annotations

import copy
import pickle

import fake_cupy
import numpy as np
import pytest
from conftest import require, same_bits

import fused_adam

F32 = np.float32
CLASSES = [
    lambda p, **k: fused_adam.SGD(p, lr=0.1, **k),
    lambda p, **k: fused_adam.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, maximize=True, **k),
    lambda p, **k: fused_adam.Adagrad(p, initial_accumulator_value=0.1, **k),
    lambda p, **k: fused_adam.RMSprop(p, centered=True, momentum=0.5, **k),
    lambda p, **k: fused_adam.Adam(p, amsgrad=True, **k),
    lambda p, **k: fused_adam.AdamW(p, **k),
    lambda p, **k: fused_adam.Lion(p, weight_decay=0.1, **k),
]


@pytest.fixture
def cupy(monkeypatch):
    with fake_cupy.installed(monkeypatch) as module:
        yield module


def tree(dtype=F32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W1": (10, 13), "b1": (13,), "empty": (0, 3), "scalar": (), "W2": (64, 128), "long": (5000,)}
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def both(cupy, dtype=F32):
    """The same parameters in host memory and on the GPU."""
    host = tree(dtype)
    return host, {name: cupy.asarray(a) for name, a in host.items()}


def gradients(cupy, dtype, step):
    host = tree(dtype, seed=step)
    return host, {name: cupy.asarray(a) for name, a in host.items()}


def assert_same(host, device):
    for name, a in host.items():
        assert same_bits(a, device[name].get()), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("layout", ["arrays", "flat", "flat, loose gradients", "list"])
def test_every_class_gives_the_bytes_of_numpy(cupy, make, dtype, layout):
    host, device = both(cupy, dtype)
    ours = fused_adam.flatten(device) if layout.startswith("flat") else device
    if layout == "list":
        ours, host_params = list(device.values()), list(host.values())
    else:
        host_params = host
    expected, opt = make(host_params, backend="numpy"), make(ours)
    assert opt.backend == "cupy"
    for step in range(1, 4):
        g, d = gradients(cupy, dtype, step)
        expected.step(g if layout != "list" else list(g.values()))
        if layout == "flat":
            flat = ours.zeros_like()
            for name, a in d.items():
                flat[name] = a
            opt.step(flat)
        else:
            opt.step(d if layout != "list" else list(d.values()))
    assert_same(host, ours if layout.startswith("flat") else device)
    for mine, theirs in zip(opt.state_dict()["state"], expected.state_dict()["state"], strict=True):
        assert all(same_bits(mine[name], theirs[name]) for name in theirs)
    assert opt.t == 3


def test_one_launch_for_all_groups_and_parameters(cupy):
    host, device = both(cupy)
    groups = [{"params": [a], "lr": 0.1 * (k + 1)} for k, a in enumerate(device.values())]
    expected = fused_adam.AdamW([{"params": [a], "lr": 0.1 * (k + 1)} for k, a in enumerate(host.values())])
    opt = fused_adam.AdamW(groups)
    for step in (1, 2):
        g, d = gradients(cupy, F32, step)
        opt.step([[a] for a in d.values()])
        expected.step([[a] for a in g.values()])
    assert [name for name, _, _ in fake_cupy.launches] == ["adamw_f32"] * 2
    assert_same(host, device)


def test_more_groups_than_one_launch_takes(cupy):
    rng = np.random.default_rng(0)
    host = [rng.normal(size=5).astype(F32) for _ in range(130)]
    device = [cupy.asarray(a) for a in host]

    def make(params):
        return fused_adam.AdamW([{"params": [p], "lr": 0.01 * k} for k, p in enumerate(params)])

    expected, opt = make(host), make(device)
    gs = [rng.normal(size=5).astype(F32) for _ in host]
    expected.step([[g] for g in gs])
    opt.step([[cupy.asarray(g)] for g in gs])
    assert len(fake_cupy.launches) == 3
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))


def test_groups_of_several_rules_and_dtypes(cupy):
    def make(a, b, c):
        return fused_adam.Adam(
            [{"params": [a, b]}, {"params": [c], "amsgrad": True, "weight_decay": 0.1, "maximize": True}]
        )

    rng = np.random.default_rng(1)
    host = [rng.normal(size=300).astype(t) for t in (np.float32, np.float64, np.float32)]
    device = [cupy.asarray(a) for a in host]
    expected, opt = make(*host), make(*device)
    for _ in range(3):
        gs = [rng.normal(size=300).astype(a.dtype) for a in host]
        expected.step([gs[:2], gs[2:]])
        ds = [cupy.asarray(g) for g in gs]
        opt.step([ds[:2], ds[2:]])
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))
    assert len(fake_cupy.launches) == 9


def test_what_is_uploaded(cupy):
    """Tables once; gradient pointers only when they moved; nothing at all for one segment."""
    _, device = both(cupy)
    params = list(device.values())
    opt = fused_adam.AdamW(params)
    opt.prepare()
    assert fake_cupy.compiled and not fake_cupy.launches
    fake_cupy.copies.clear()
    gs = [cupy.zeros(p.shape, F32) for p in params]
    opt.step(gs)
    assert fake_cupy.copies == [5 * 8]  # the empty one has no segment
    fake_cupy.copies.clear()
    opt.step(gs)
    opt.step(list(gs))
    assert fake_cupy.copies == []
    gs[0] = cupy.zeros(params[0].shape, F32)
    opt.step(gs)
    opt.step(gs)
    assert fake_cupy.copies == [5 * 8]

    fake_cupy.copies.clear()
    p, g = cupy.zeros(1000, F32), cupy.zeros(1000, F32)
    single = fused_adam.AdamW(p)
    single.step(g)
    single.step(cupy.zeros(1000, F32))
    assert fake_cupy.copies == []


def test_gradients_that_come_once_are_not_kept(cupy):
    """One set at most is kept alive, and none once another one has come."""
    import weakref

    p = [cupy.zeros(5, F32)]
    opt = fused_adam.AdamW(p)
    refs = []
    for _ in range(4):
        g = [cupy.zeros(5, F32)]
        refs.append(weakref.ref(g[0]))
        opt.step(g)
        del g
    assert sum(ref() is not None for ref in refs) == 0


def test_empty_and_nothing_to_do(cupy):
    p = cupy.zeros((0, 4), F32)
    opt = fused_adam.AdamW([p])
    opt.step([cupy.zeros((0, 4), F32)])
    assert opt.t == 1 and fake_cupy.launches == [] and opt.backend == "cupy"


def test_fortran_order(cupy):
    rng = np.random.default_rng(2)
    host = np.asfortranarray(rng.normal(size=(7, 9)).astype(F32))
    device = cupy.asarray(host)
    g = np.asfortranarray(rng.normal(size=(7, 9)).astype(F32))
    expected, opt = fused_adam.AdamW([host]), fused_adam.AdamW([device])
    expected.step([g])
    opt.step([cupy.asarray(g)])
    assert same_bits(host, device.get())
    with pytest.raises(ValueError, match=r"grads\[0\] is in C order but the parameter is in F order"):
        opt.step([cupy.asarray(np.ascontiguousarray(g))])


def test_adam_step(cupy):
    rng = np.random.default_rng(3)
    host = [np.abs(rng.normal(size=(33, 77))).astype(F32) for _ in range(5)]
    device = [cupy.asarray(a) for a in host]
    p, g, m, v, top = host
    fused_adam.adamw_step(p, g, m, v, step=7, max_v=top)
    p, g, m, v, top = device
    fused_adam.adamw_step(p, g, m, v, step=7, max_v=top)
    assert all(same_bits(a, b.get()) for a, b in zip(host, device, strict=True))
    assert len(fake_cupy.launches) == 1 and not fake_cupy.copies
    with pytest.raises(ValueError, match="p and m share memory"):
        fused_adam.adam_step(p, g, p, v, step=1)
    with pytest.raises(ValueError, match="m is in host memory but p is in the memory of GPU 0; copy one"):
        fused_adam.adam_step(p, g, host[2], v, step=1)
    assert len(fake_cupy.launches) == 1


def test_an_own_rule(cupy):
    @fused_adam.rule
    def update(p, g, states, c, lr):  # names that the kernel itself uses
        states = (states - c * states) + c * g
        p = p - lr * sign(states)  # noqa: F821
        return p, states

    host, device = both(cupy)
    expected, opt = update(host, c=0.1, lr=0.5), update(device, c=0.1, lr=0.5)
    g, d = gradients(cupy, F32, 1)
    expected.step(g)
    opt.step(d)
    assert_same(host, device)


# --- what is refused --------------------------------------------------------------------------------------------------


def bad_gradients(cupy):
    ok = cupy.zeros((4, 6), F32)
    foreign = fake_cupy.Foreign
    return [
        (np.zeros((4, 6), F32), r"grads\[0\] is in host memory but the parameter is in the memory of GPU 0"),
        (None, r"grads\[0\] is None"),
        (cupy.zeros((4, 5), F32), r"grads\[0\] has shape \(4, 5\) but the parameter has \(4, 6\)"),
        (cupy.zeros((4, 6), np.float64), r"grads\[0\] has dtype float64 but the parameter has float32"),
        (cupy.zeros((4, 6), np.int32), r"grads\[0\] has dtype int32; expected float32 or float64"),
        (cupy.zeros((8, 6), F32)[::2], r"grads\[0\] is not contiguous; pass cupy.ascontiguousarray"),
        (foreign(ok, mask=ok), r"grads\[0\] cannot be read as memory on a GPU: it is masked"),
        (foreign(ok, data=(12345, False)), r"grads\[0\] cannot be read as memory on a GPU: 0x3039 is no memory"),
        ("abc", r"grads\[0\] should be a NumPy array or one on a GPU, got a str"),
    ]


@pytest.mark.parametrize("k", range(9))
def test_bad_gradients_change_nothing(cupy, k):
    p = cupy.zeros((4, 6), F32)
    opt = fused_adam.AdamW([p])
    bad, message = bad_gradients(cupy)[k]
    with pytest.raises((TypeError, ValueError), match=message):
        opt.step([bad])
    assert opt.t == 0 and not fake_cupy.launches


def test_gradients_that_overlap(cupy):
    data = cupy.zeros(100, F32)
    opt = fused_adam.AdamW([data[:50]])
    with pytest.raises(ValueError, match=r"grads\[0\] overlaps a parameter or a state that the step writes"):
        opt.step([data[25:75]])
    flat = fused_adam.flatten([cupy.zeros(50, F32)])
    opt = fused_adam.AdamW(flat)
    with pytest.raises(ValueError, match="grads overlaps"):
        opt.step(flat)
    with pytest.raises(ValueError, match="grads is in host memory but its parameter is in the memory of GPU 0"):
        opt.step(fused_adam.flatten([np.zeros(50, F32)]))


def test_bad_parameters(cupy):
    on_gpu, on_host = cupy.zeros(5, F32), np.zeros(5, F32)
    with pytest.raises(ValueError, match=r"params\[1\] is in host memory but params\[0\] is in the memory of GPU 0"):
        fused_adam.AdamW([on_gpu, on_host])
    with pytest.raises(ValueError, match=r"params\[0\] is read-only"):
        fused_adam.AdamW([fake_cupy.Foreign(on_gpu, read_only=True)])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory|params\[1\] and params\[0\] share"):
        fused_adam.AdamW([on_gpu, on_gpu[2:]])
    with pytest.raises(ValueError, match=r"params\[0\] is not contiguous; make it so"):
        fused_adam.AdamW([on_gpu[::2]])
    with pytest.raises(RuntimeError, match="'numpy' does not step over arrays in the memory of a GPU"):
        fused_adam.AdamW([on_gpu], backend="numpy")
    with pytest.raises(RuntimeError, match="'cupy' does not step over arrays in host memory"):
        fused_adam.AdamW([on_host], backend="cupy")
    with pytest.raises(ValueError, match="tree\\[1\\] is in host memory but tree\\[0\\] is in the memory of GPU 0"):
        fused_adam.flatten([on_gpu, on_host])


# --- other libraries and streams --------------------------------------------------------------------------------------


def test_arrays_of_other_libraries(cupy):
    rng = np.random.default_rng(4)
    host, g = rng.normal(size=(2, 500)).astype(F32)
    device = fake_cupy.Foreign(host)
    opt, expected = fused_adam.AdamW([device]), fused_adam.AdamW([host])
    opt.step([fake_cupy.Foreign(g, read_only=True)])
    expected.step([g])
    assert opt.backend == "cupy" and same_bits(host, device.array)
    flat = fused_adam.flatten([device])
    assert isinstance(flat.data, cupy.ndarray) and same_bits(flat.data.get()[:500], host)


def test_the_stream_is_the_callers(cupy):
    p, g = cupy.zeros(9, F32), cupy.zeros(9, F32)
    opt = fused_adam.AdamW([p])
    opt.step([g])
    with cupy.cuda.Stream(77):
        opt.step([g])
        fused_adam.adam_step(p, g, cupy.zeros(9, F32), cupy.zeros(9, F32), step=1)
    opt.step([g], stream=5)
    opt.step([g], stream=cupy.cuda.Stream(6))
    assert [stream for *_, stream in fake_cupy.launches] == [0, 77, 77, 5, 6]
    assert fake_cupy.waits == []
    with pytest.raises(TypeError, match="stream should be a CUDA stream or its address, got a str"):
        opt.step([g], stream="7")
    with pytest.raises(ValueError, match="stream is for parameters on a GPU"):
        fused_adam.AdamW([np.zeros(3, F32)]).step([np.zeros(3, F32)], stream=1)


def test_gradients_of_another_stream_are_waited_for(cupy):
    p = cupy.zeros(9, F32)
    opt = fused_adam.AdamW([p])
    opt.step([fake_cupy.Foreign(p.copy(), stream=1)])  # the default stream is where the step runs
    assert fake_cupy.waits == []
    opt.step([fake_cupy.Foreign(p.copy(), stream=88)])
    assert fake_cupy.waits == [(0, 88)]


def test_a_stream_of_the_gradients_own_is_waited_for_each_time(cupy):
    class Bound(fake_cupy.Foreign):
        __module__ = "numba.cuda"

    opt, g = fused_adam.AdamW([cupy.zeros(9, F32)]), [Bound(np.zeros(9, F32), stream=88)]
    for _ in range(3):
        opt.step(g)
    assert fake_cupy.waits == [(0, 88)] * 3


def test_gradients_that_move_during_a_capture(cupy):
    """A graph would copy their addresses from memory of the host's that is another's when it is replayed."""
    p = [cupy.zeros(9, F32), cupy.zeros(9, F32)]
    g, other = ([cupy.zeros(9, F32) for _ in p] for _ in range(2))
    opt = fused_adam.AdamW(p)
    opt.step(g, stream=5)
    fake_cupy.capturing.add(5)
    opt.step(g, stream=5)
    with pytest.raises(RuntimeError, match="the gradients moved during a capture; do one step with these arrays"):
        opt.step(other, stream=5)
    fake_cupy.capturing.clear()
    opt.step(other, stream=5)
    assert opt.t == 3


def test_a_capture_that_is_refused_launches_nothing(cupy):
    """The first of two launches has a single segment, whose gradient needs no upload; the second has a table."""
    p = [cupy.zeros(9, F32) for _ in range(3)]
    opt = fused_adam.Adam([{"params": p[:1]}, {"params": p[1:], "amsgrad": True}])
    opt.prepare()
    fake_cupy.capturing.add(5)
    with pytest.raises(RuntimeError, match="moved during a capture"):
        opt.step([[p[0].copy()], [a.copy() for a in p[1:]]], stream=5)
    assert opt.t == 0 and fake_cupy.launches == []


def test_ctrl_c_while_gradients_are_looked_at(cupy, monkeypatch):
    """What was known of the last ones is not taken for what was just found of others."""

    def interrupted(*_):
        raise KeyboardInterrupt

    p = fused_adam.flatten([cupy.zeros(4, F32)])
    ones, fives = (fused_adam.flatten([cupy.asarray(np.full(4, x, F32))]) for x in (1, 5))
    opt = fused_adam.SGD(p, lr=1.0)
    opt.step(ones)
    with monkeypatch.context() as patch:
        patch.setattr(type(opt._stepper), "_launches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(fives)
    opt.step(ones)
    assert opt.t == 2 and p[0].get().tolist() == [-2] * 4


# --- failures ---------------------------------------------------------------------------------------------------------


def test_out_of_memory_changes_nothing(cupy):
    rng = np.random.default_rng(5)
    values = [rng.normal(size=50).astype(F32) for _ in range(3)]
    device = [cupy.asarray(a) for a in values]
    gs = [cupy.asarray(a) for a in values]
    failed = 0
    for k in range(10):
        fake_cupy.fail["alloc"] = k
        try:
            fused_adam.AdamW(device).step(gs)
            break
        except MemoryError as error:
            message = str(error)
        failed += 1
        assert "bytes" in message
        assert all(same_bits(a, b.get()) for a, b in zip(values, device, strict=True))
    assert failed >= 4  # two states and three tables
    fake_cupy.fail.clear()
    fused_adam.AdamW([a.copy() for a in device]).step(gs)


def test_a_launch_that_fails_is_named(cupy):
    p, g = cupy.zeros(9, F32), cupy.zeros(9, F32)
    opt = fused_adam.AdamW([p])
    fake_cupy.fail["launch"] = 0
    with pytest.raises(RuntimeError, match="launching adamw_f32 on GPU 0 failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        opt.step([g])
    assert opt.t == 0
    fake_cupy.fail.clear()
    opt.step([g])
    assert opt.t == 1 and len(fake_cupy.launches) == 1


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "to the host", "from the host", "device states"])
def test_continuing_is_exact(cupy, how):
    host, device = both(cupy)
    expected, opt = fused_adam.AdamW(host, lr=0.1), fused_adam.AdamW(fused_adam.flatten(device), lr=0.1)
    for step in (1, 2):
        g, d = gradients(cupy, F32, step)
        expected.step(g)
        opt.step(d)
    flat = opt.param_groups[0]["params"]
    if how == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
    elif how == "deepcopy":
        opt = copy.deepcopy(opt)
    elif how == "to the host":
        saved = opt.state_dict()
        opt = fused_adam.AdamW(params := {name: flat[name].get() for name in host}, backend="numpy")
        opt.load_state_dict(saved)
    elif how == "from the host":
        opt.load_state_dict(expected.state_dict())
    else:
        saved = opt.state_dict()
        if how == "device states":
            saved["state"] = [{k: cupy.asarray(a) for k, a in s.items()} for s in saved["state"]]
        opt = fused_adam.AdamW({name: flat[name] for name in host}, lr=0.5)
        opt.load_state_dict(saved)
    g, d = gradients(cupy, F32, 3)
    expected.step(g)
    opt.step(g if how == "to the host" else d)
    result = opt.param_groups[0]["params"]
    for name, a in host.items():
        assert same_bits(a, params[name] if how == "to the host" else result[name].get()), name


def test_flatten(cupy):
    host, device = both(cupy)
    flat, ours = fused_adam.flatten(host), fused_adam.flatten(device)
    assert same_bits(flat.data, ours.data.get()) and ours.layout == flat.layout
    assert isinstance(ours["W1"], cupy.ndarray) and ours["W1"].shape == (10, 13)
    ours["b1"] = cupy.asarray(np.arange(13, dtype=F32))
    assert same_bits(ours.data.get()[256 : 256 + 13], np.arange(13, dtype=F32))
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again.data, cupy.ndarray) and same_bits(again.data.get(), ours.data.get())
    strided = cupy.asarray(np.arange(20, dtype=F32))[::2]
    assert same_bits(fused_adam.flatten([strided]).data.get()[:10], np.arange(0, 20, 2, dtype=F32))


def test_apply_gradients(cupy):
    host, device = both(cupy)
    expected, opt = fused_adam.Adam(host), fused_adam.Adam(device)
    g, d = gradients(cupy, F32, 1)
    expected.step(g)
    opt.apply_gradients([(d[name], device[name]) for name in reversed(device)])
    assert_same(host, device)


def test_torch_tensors_that_need_gradients_are_refused_clearly(cupy):
    require("torch")

    class Tensor:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

    with pytest.raises(TypeError, match=r"params\[0\] cannot be read as memory on a GPU: Can't get"):
        fused_adam.AdamW([Tensor()])
