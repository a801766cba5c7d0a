"""Checkpoints: what was saved continues bit for bit, wherever it is loaded; what does not fit is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import fake_cupy
import fake_numba
import numpy as np
import pytest
from checkpoint_cases import CLASSES, SHAPES, adam, load_file, params, stepped
from conftest import require, same_bits
from watch import memory, refused

import fused_adam
from fused_adam import checkpoint
from fused_adam._layout import leaves


def layouts(p: dict[str, np.ndarray], how: str) -> Any:
    """The same parameters in another layout, whose order is that of the dict."""
    if how == "flat":
        return fused_adam.flatten(p)
    if how == "groups":
        names = list(p)
        return [{"params": {k: p[k] for k in names[:2]}}, {"params": {k: p[k] for k in names[2:]}, "lr": 0.02}]
    return p


def values(p: Any) -> list[bytes]:
    return [a.tobytes() for _, a in leaves(p, "") if isinstance(a, np.ndarray)]


def step(optimizer: Any, how: str, rng: np.random.Generator, p: Any) -> None:
    grads = {k: np.asarray(rng.standard_normal(a.shape), a.dtype, order="F" if k == "F" else "C") for k, a in p.items()}
    names = list(grads)
    if how == "groups":
        optimizer.step([{k: grads[k] for k in names[:2]}, {k: grads[k] for k in names[2:]}])
    else:
        optimizer.step(grads)


@pytest.mark.parametrize("how", ["flat", "loose", "groups"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", range(len(CLASSES)), ids=[f"{c.__name__}{k}" for k, (c, _) in enumerate(CLASSES)])
def test_resumes_bit_for_bit(case, dtype, how, backend, tmp_path):
    """As if it had never stopped, on the other backend; and over parameters of other values, which come back too."""
    cls, hyper = CLASSES[case]
    other = {"numpy": "numba", "numba": "numpy"}[backend]
    runs = []
    for seed, name in ((0, backend), (9, other)):
        p = layouts(params(dtype, seed), how)
        runs.append((p, cls(p, lr=0.01 if seed == 0 else 0.5, backend=name, **hyper)))
    (p, first), (q, second) = runs
    like = params(dtype)
    rng = np.random.default_rng(1)
    for _ in range(3):
        step(first, how, rng, like)
    checkpoint.save(tmp_path / "run", first)
    checkpoint.load(tmp_path / "run", second)
    assert second.t == 3 and second.param_groups[0]["lr"] == 0.01
    again = np.random.default_rng(2), np.random.default_rng(2)
    for _ in range(3):
        step(first, how, again[0], like)
        step(second, how, again[1], like)
    assert memory(first) == memory(second) and values(p) == values(q)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_of_rows_resume(dtype, backend, tmp_path):
    def made(seed: int) -> tuple[Any, Any]:
        p = {k: a for k, a in params(dtype, seed).items() if k != "F"}
        return p, fused_adam.Adam(p, per_row_step=True, backend=backend)

    def mask(k: int) -> Any:
        return {
            name: np.arange(shape[0]) % 3 != k % 3 if shape else None for name, shape in SHAPES.items() if name != "F"
        }

    (p, first), (q, second) = made(0), made(9)
    for k in range(4):
        first.step({name: np.ones_like(a) * k for name, a in p.items()}, mask=mask(k))
    checkpoint.save(tmp_path / "run", first)
    checkpoint.load(tmp_path / "run", second)
    for k in range(4, 8):
        for opt, x in ((first, p), (second, q)):
            opt.step({name: np.ones_like(a) * k for name, a in x.items()}, mask=mask(k))
    assert memory([p, first]) == memory([q, second])
    assert {*np.unique(second.state_dict()["state"][0]["row_steps"])} == {5, 6}


def test_flat_and_loose_load_each_other(tmp_path):
    p, opt = adam()
    checkpoint.save(tmp_path / "loose", opt)
    flat = fused_adam.flatten(params(seed=9))
    other = fused_adam.AdamW(flat, backend="numpy")
    checkpoint.load(tmp_path / "loose", other)
    checkpoint.save(tmp_path / "flat", other)
    q, third = adam(0, seed=5)
    checkpoint.load(tmp_path / "flat", third)
    assert all(same_bits(p[k], flat[k]) and same_bits(p[k], q[k]) for k in p)
    assert memory(opt) == memory(third)


def test_a_rule_of_ones_own(tmp_path):
    p, q = np.ones(300, np.float32), np.zeros(300, np.float32)
    opt, other = (Signum(x, c=0.1, lr=lr, backend="numpy") for x, lr in ((p, 1e-3), (q, 1.0)))
    opt.step(np.linspace(-1, 1, 300, dtype=np.float32))
    checkpoint.save(tmp_path, opt)
    checkpoint.load(tmp_path, other)
    assert memory([p, opt]) == memory([q, other])


@fused_adam.rule
def Signum(p, g, m, c, lr):  # a class
    m = (m - c * m) + c * g
    p = p - lr * sign(m)  # noqa: F821 # of the rules' own functions
    return p, m


@pytest.mark.parametrize("library", ["cupy", "numba"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_gpu_and_the_host_load_each_other(library, flat, monkeypatch, tmp_path):
    """On a GPU that is not there. One parameter is in Fortran order, one has a NaN, one is of more than one piece."""
    host = params(shapes=SHAPES | {"large": (1500, 1000)})
    host["W"][3, 4] = np.nan
    opt = stepped(fused_adam.AdamW(host, backend="numpy"), host, 2)
    checkpoint.save(tmp_path / "host", opt)
    require("numba")
    with (fake_cupy if library == "cupy" else fake_numba).installed(monkeypatch) as module:
        put = module.asarray if library == "cupy" else module.to_device
        device = {k: put(np.zeros_like(a)) for k, a in host.items()}
        device = fused_adam.flatten(device) if flat else device
        ours = fused_adam.AdamW(device)
        checkpoint.load(tmp_path / "host", ours)
        fake_cupy.check_guards()
        checkpoint.save(tmp_path / "gpu", ours)
    q = {k: np.zeros_like(a) for k, a in host.items()}
    other = fused_adam.AdamW(q, lr=0.5, backend="numpy")
    checkpoint.load(tmp_path / "gpu", other)
    assert all(same_bits(host[k], q[k]) for k in host) and memory(opt)[:2] == memory(other)[:2]
    shards = [next((tmp_path / d).glob("*/shard*")).read_bytes() for d in ("host", "gpu")]
    assert shards[0] == shards[1]


def test_scalars_on_a_gpu(monkeypatch, tmp_path):
    """t and lr come from and go to the device."""
    with fake_cupy.installed(monkeypatch) as cupy:
        opts = [fused_adam.AdamW(cupy.zeros(9, np.float32), lr=lr, device_scalars=True) for lr in (0.1, 0.2)]
        for _ in range(2):
            opts[0].step(cupy.asarray(np.ones(9, np.float32)))
        checkpoint.save(tmp_path, opts[0])
        checkpoint.load(tmp_path, opts[1])
        for opt in opts:
            opt.step(cupy.asarray(np.ones(9, np.float32)))
        assert [opt.t for opt in opts] == [3, 3]
        a, b = (opt.param_groups[0]["params"].get() for opt in opts)
        assert same_bits(a, b) and a[0] != 0


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_safetensors_reads_the_file(dtype, tmp_path):
    p = params(dtype)
    p["d"] = np.arange(3, dtype=np.float32)
    opt = stepped(fused_adam.Adam(p, backend="numpy"), p, 2)
    (shard,) = checkpoint.save(tmp_path, opt).glob("shard-*")
    found = load_file(shard)
    assert len(found) == 3 * len(p)
    for k, (a, state) in enumerate(zip(p.values(), opt.state_dict()["state"], strict=True)):
        for name, b in {"p": a, **state}.items():
            assert same_bits(found[f"{k}.{name}"], b)
    with require("safetensors").safe_open(shard, "numpy") as file:
        assert same_bits(file.get_slice("0.m")[3:5], opt.state_dict()["state"][0]["m"][3:5])


def test_all_nans_are_saved_as_one(tmp_path):
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000], np.uint32)
    p = bits.view(np.float32)
    checkpoint.save(tmp_path, fused_adam.SGD(p, backend="numpy"))
    assert (bits[:4] != 0x7FC00000).sum() == 3  # what was saved is as it was
    q = np.zeros(7, np.float32)
    checkpoint.load(tmp_path, fused_adam.SGD(q, backend="numpy"))
    assert [*q.view(np.uint32)] == [0x7FC00000] * 4 + [*bits[4:]]


@pytest.mark.parametrize("keep_last", [1, 2, 3, None])
def test_keep_last(keep_last, tmp_path):
    p = np.zeros(5)
    opt = fused_adam.SGD(p, lr=1.0, backend="numpy")
    paths = []
    for _ in range(5):
        opt.step(-np.ones(5))
        paths.append(checkpoint.save(tmp_path / "a" / "run", opt, keep_last=keep_last))
    assert [path.name for path in paths] == [f"save-{k:08d}" for k in range(1, 6)]
    kept = sorted(path for path in (tmp_path / "a" / "run").iterdir() if path.name != ".lock")
    assert kept == paths[-keep_last if keep_last else 0 :]
    for path in kept:
        checkpoint.load(path, opt)
        assert p[0] == opt.t == int(path.name[-8:])
    checkpoint.load(tmp_path / "a" / "run", opt)
    assert opt.t == 5


def test_the_last_is_the_last_that_was_saved(tmp_path):
    """Not the one of the most steps: a run that has gone back is saved too."""
    for steps in (3, 3, 3, 3, 3, 3, 3, 3, 2, 1):
        checkpoint.save(tmp_path, adam(steps)[1], keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("save-*")) == ["save-00000009", "save-00000010"]
    _, opt = adam(0)
    checkpoint.load(tmp_path, opt)
    assert opt.t == 1


def test_without_parameters(tmp_path):
    _, opt = adam()
    checkpoint.save(tmp_path, opt, params=False)
    q, other = adam(1, seed=9)
    before = memory(q)
    checkpoint.load(tmp_path, other)
    assert memory(q) == before and memory(opt) == memory(other)


def test_extra_comes_back(tmp_path):
    _, opt = adam()
    rng = np.random.default_rng(3)
    rng.random(5)
    extra = {"epoch": 3, "loss": 0.1, "rng": rng.bit_generator.state, "none": [None, True, "\u00e9\n", (1, 2)], "": {}}
    checkpoint.save(tmp_path, opt, extra=extra)
    back = checkpoint.load(tmp_path, opt)
    assert back.pop("none") == [None, True, "\u00e9\n", [1, 2]]
    assert back == {k: v for k, v in extra.items() if k != "none"}
    again = np.random.default_rng(0)
    again.bit_generator.state = back["rng"]
    assert again.random() == rng.random()
    checkpoint.save(tmp_path, opt)
    assert checkpoint.load(tmp_path, opt) == {}


def test_progress(tmp_path):
    """In bytes, up to all of them; what it raises ends a save, and a load before or after all is written."""
    p = np.arange(3 * 2**20, dtype=np.float32)
    opt = fused_adam.SGD(p, backend="numpy")
    seen: list[tuple[int, int]] = []
    checkpoint.save(tmp_path, opt, progress=lambda *x: seen.append(x))
    assert seen == [(4 * 2**20 * k, 12 * 2**20) for k in (1, 2, 3)]
    for call, passes in ((checkpoint.verify, 1), (checkpoint.load, 2)):
        seen.clear()
        call(tmp_path, *[opt] * (passes - 1), progress=lambda *x: seen.append(x))
        total = passes * (tmp_path / "save-00000001" / "shard-00000.safetensors").stat().st_size
        assert [total for _, total in seen] == [total] * len(seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen) and total - seen[-1][0] < 2000

    def stop(after: int) -> Any:
        def progress(done: int, total: int) -> None:
            if done > after:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, opt, progress=stop(5 * 2**20))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "save-00000001"]
    expected = p.copy()
    for after in (5 * 2**20, 15 * 2**20):
        p[:] = 7
        with pytest.raises(KeyboardInterrupt):
            checkpoint.load(tmp_path, opt, progress=stop(after))
        assert (p == (7 if after < 12 * 2**20 else expected)).all()


def test_many_parameters(tmp_path):
    """So many that the header of the file is of more than one block."""
    p = [np.full(3, k, np.float32) for k in range(6000)]
    opt = fused_adam.Adam(p, backend="numpy")
    opt.step([a.copy() for a in p])
    path = checkpoint.save(tmp_path, opt)
    q = [np.zeros(3, np.float32) for _ in p]
    other = fused_adam.Adam(q, backend="numpy")
    checkpoint.load(tmp_path, other)
    assert all(same_bits(a, b) for a, b in zip(p, q, strict=True)) and memory(opt) == memory(other)
    with open(path / "shard-00000.safetensors", "rb") as file:
        assert int.from_bytes(file.read(8), "little") > 2**20
    assert len(load_file(path / "shard-00000.safetensors")) == 18000


# --- what is refused --------------------------------------------------------------------------------------------------


MISMATCHES = [
    ("a class", lambda p: fused_adam.Adam(p), "is of 'AdamW' but this is Adam"),
    ("a list", lambda p: fused_adam.AdamW([*p.values()]), r'parameter 0 is \["W"\] .* in .* but \[0\] .* in this'),
    (
        "an order",
        lambda p: fused_adam.AdamW({k: p[k] for k in reversed(p)}),
        r'parameter 0 is \["W"\] \(F32, shape \(30, 50\)\) in .*save-00000001 but \["F"\] \(F32, shape \(5, 4, 3\)\)',
    ),
    ("fewer", lambda p: fused_adam.AdamW({"W": p["W"]}), "has 5 parameters but this optimizer has 1; make the"),
    ("a dtype", lambda p: fused_adam.AdamW({k: a.astype(np.float64) for k, a in p.items()}), r"\(F32, .* but .*\(F64"),
    ("a shape", lambda p: fused_adam.AdamW(p | {"b": np.ones(8, np.float32)}), r"shape \(7,\)\) in .*shape \(8,\)\)"),
    ("amsgrad", lambda p: fused_adam.AdamW(p, amsgrad=True), r"param_groups.*asks for states .* but this .*max_v"),
    (
        "rows",
        lambda p: fused_adam.AdamW({k: a.copy() for k, a in p.items()}, per_row_step=True),
        r"of parameter 0, .* has p \(F32, \(30, 50\)\), m .* but this optimizer .* row_steps \(I64, \(30,\)\); make",
    ),
    ("groups", lambda p: fused_adam.AdamW([{"params": p}, {"params": [np.ones(2)]}]), "has 5 parameters but .* has 6"),
    (
        "groups of the same parameters",
        lambda p: fused_adam.AdamW([{"params": {"W": p["W"]}}, {"params": {k: p[k] for k in list(p)[1:]}}]),
        "param_groups.* should be a list of 2",
    ),
]


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in MISMATCHES], ids=[row[0] for row in MISMATCHES])
def test_what_does_not_fit_is_refused(make, message, tmp_path):
    _, opt = adam()
    checkpoint.save(tmp_path, opt)
    p = params(seed=9)
    other = make(p)
    with refused(message, p, other, errors=ValueError):
        checkpoint.load(tmp_path, other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"extra": [1]}, TypeError, "extra should be a dict, got a list"),
        ({"extra": {1: 2}}, TypeError, "extra has the key 1, but JSON has strings only"),
        ({"extra": {"a": [{"b": np.ones(2)}]}}, TypeError, r"extra\['a'\]\[0\]\['b'\] should be .* got a NumPy array"),
        ({"extra": {"a": np.float32(1)}}, TypeError, r"extra\['a'\] .* got a NumPy scalar of float32; NumPy's have"),
        ({"extra": {"a": float("nan")}}, ValueError, r"extra\['a'\] should be finite, got nan"),
        ({"keep_last": 0}, ValueError, r"keep_last should be in \[1"),
        ({"keep_last": True}, TypeError, "keep_last should be an int"),
        ({"params": 1}, TypeError, "params should be True or False"),
        ({"progress": 1}, TypeError, "not callable"),
    ],
)
def test_wrong_arguments_leave_the_last_save(arguments, error, message, tmp_path):
    _, opt = adam()
    checkpoint.save(tmp_path, opt)
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path, opt, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "save-00000001"]
    checkpoint.load(tmp_path, opt)


def test_other_optimizers_are_refused(tmp_path):
    torch = require("torch")
    other = torch.optim.SGD([torch.zeros(2)])
    for call in (checkpoint.save, checkpoint.load):
        with pytest.raises(
            TypeError, match=r"should be one of fused_adam's, got a torch.SGD; those of fused_adam.torch"
        ):
            call(tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


def test_where_there_is_none(tmp_path):
    p, opt = adam()
    with refused("No such file", p, opt, errors=FileNotFoundError):
        checkpoint.load(tmp_path / "no", opt)
    with refused("holds no checkpoint: neither manifest.json nor", p, opt, errors=FileNotFoundError):
        checkpoint.load(tmp_path, opt)
    (tmp_path / "file").write_text("")
    with refused("Not a directory", p, opt, errors=NotADirectoryError):
        checkpoint.load(tmp_path / "file", opt)
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "file", opt)


def test_importing_it_is_light():
    heavy = "torch", "numba", "safetensors", "rich", "zipfile"
    code = (
        "import sys, numpy; before = {*sys.modules}; import fused_adam.checkpoint; "
        f"print({{*{heavy}}} & {{*sys.modules}} - before)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
