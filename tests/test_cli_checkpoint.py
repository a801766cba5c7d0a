"""fused-adam checkpoint verify, show and convert."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import CLASSES, adam, params, put, stepped
from cli_cases import COMMAND, Terminal, run, run_json
from conftest import require, same_bits
from watch import memory

import fused_adam
from fused_adam import checkpoint
from fused_adam.cli import console


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any, Any]:
    p, opt = adam()
    checkpoint.save(tmp_path / "run", opt, keep_last=None)
    checkpoint.save(tmp_path / "run", opt, extra={"epoch": 3}, keep_last=None)
    return tmp_path / "run", p, opt


def flip(path: Path, k: int) -> None:
    data = bytearray(path.read_bytes())
    data[k] ^= 4
    put(path, bytes(data))


# --- verify and show --------------------------------------------------------------------------------------------------


def test_verify_reads_all_saves_of_a_folder(saved, capsys):
    path, *_ = saved
    lines = [f"{path}/save-0000000{k}: every byte as it was saved\n" for k in (1, 2)]
    assert run(capsys, "checkpoint", "verify", path) == (0, "".join(lines), "")
    assert run(capsys, "checkpoint", "verify", path / "save-00000001") == (0, lines[0], "")
    flip(path / "save-00000001" / "shard-00000.safetensors", 5000)
    status, out, err = run(capsys, "checkpoint", "verify", path)
    assert (status, err) == (4, "")
    first, second = out.splitlines(keepends=True)
    assert re.search(r"save-00000001/shard-00000.safetensors is damaged: block 0 \(bytes 0 to \d+\)", first)
    assert second == lines[1]
    status, document = run_json(capsys, "checkpoint", "verify", path)
    assert status == 4 and not document["right"]
    assert [(s["path"][-4:], s["right"], len(s["damage"])) for s in document["saves"]] == [
        ("0001", False, 1),
        ("0002", True, 0),
    ]


def test_what_is_not_there_exits_1(tmp_path, capsys):
    for command in ("verify", "show"):
        status, out, err = run(capsys, "checkpoint", command, tmp_path / "no")
        assert (status, out) == (1, "") and "No such file" in err
        status, out, err = run(capsys, "checkpoint", command, tmp_path)
        assert (status, out) == (1, "") and "holds no checkpoint" in err


def test_show(saved, capsys):
    path, _, opt = saved
    status, out, err = run(capsys, "checkpoint", "show", path)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= max(80, len(str(path)) + 14)
    for pattern in (
        r"^optimizer +AdamW, t = 3$",
        r"^size +19\.\d kB in 1 shard$",
        r"^saves +save-00000001, save-00000002$",
        r"^group 0 +parameters 0 to 4, lr 0.001, betas \[0.9, 0.999\]",
        r'^extra +\{"epoch": 3\}$',
        r'^0 +F32 +30x50 +\["W"\]: p, m, v$',
        r'^3 +F32 +\(\) +\["s"\]: p, m, v$',
    ):
        assert re.search(pattern, out, re.MULTILINE), pattern
    status, d = run_json(capsys, "checkpoint", "show", path / "save-00000001")
    assert status == 0 and (d["optimizer"], d["t"], d["extra"], d["shards"], d["saves"]) == ("AdamW", 3, {}, 1, [])
    about = {"name": '["F"]', "dtype": "F32", "shape": [5, 4, 3], "arrays": ["p", "m", "v"], "dtypes": ["F32"] * 3}
    assert d["parameters"][4] == about
    assert d["param_groups"][0]["weight_decay"] == opt.param_groups[0]["weight_decay"]


def test_show_of_a_damaged_manifest_exits_4(saved, capsys):
    path, *_ = saved
    flip(path / "save-00000002" / "manifest.json", 300)
    status, out, err = run(capsys, "checkpoint", "show", path)
    assert (status, out) == (4, "") and "manifest.json is damaged: it does not have its checksum" in err


def test_names_do_not_move_the_cursor(tmp_path, capsys):
    evil = "\x1b[2J\n\u202eW" + "x" * 300
    checkpoint.save(tmp_path, fused_adam.SGD({evil: np.ones(2)}, backend="numpy"), extra={"a": evil})
    status, out, _ = run(capsys, "checkpoint", "show", tmp_path)
    assert status == 0 and "\x1b" not in out and "\u202e" not in out and "\ufffd[2J\ufffd\ufffdW" in out
    with pytest.raises(ValueError, match="parameter 0 is") as caught:
        checkpoint.load(tmp_path, fused_adam.SGD({"W": np.ones(2)}, backend="numpy"))
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(rich, tmp_path, monkeypatch, capsys):
    """A bar with the bytes and their rate; nothing where stderr is no terminal (see the others)."""
    opt = fused_adam.SGD(np.zeros(5 * 2**18), backend="numpy")
    path = checkpoint.save(tmp_path / "run", opt)
    monkeypatch.setattr(console, "_use_rich", lambda stream: rich and importlib.util.find_spec("rich") is not None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, _, err = run(capsys, "checkpoint", "verify", path)
    assert status == 0
    assert re.search(r"10\.5/10\.5 MB|10,485,\d+/10,485,\d+ bytes", err) and "B/s" in err


def test_progress_of_the_command(saved):
    path, *_ = saved
    terminal = Terminal("checkpoint", "verify", str(path))
    text = terminal.read()
    assert terminal.process.wait() == 0
    assert "every byte as it was saved" in text and "B/s" in text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_340_000, "12.3 MB"),
        (10**12, "1.0 TB"),
        (10**20, "100000.0 PB"),
    ],
)
def test_sizes(n, text):
    assert console.size(n) == text


def test_a_reader_that_has_gone(saved):
    """Not told as a failure of the disk."""
    path, *_ = saved
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "checkpoint", "show", path], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# --- convert ----------------------------------------------------------------------------------------------------------


def convert(capsys: Any, *argv: Any) -> None:
    assert run(capsys, "checkpoint", "convert", *argv) == (0, "", "")


def shard(path: Path) -> bytes:
    return next(path.glob("save-*/shard-00000.safetensors")).read_bytes()


@pytest.mark.parametrize("kind", ["npz", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", range(len(CLASSES)), ids=[f"{c.__name__}{k}" for k, (c, _) in enumerate(CLASSES)])
def test_there_and_back(case, dtype, kind, tmp_path, capsys):
    """The same bytes in the file, and the same of everything else."""
    if kind == "torch":
        require("torch")
    cls, hyper = CLASSES[case]
    hyper = {k: v for k, v in hyper.items() if kind == "npz" or k not in ("numerics", "eps_root")}
    p = params(dtype)
    opt = stepped(cls(p, backend="numpy", **hyper), p, 3)
    checkpoint.save(tmp_path / "run", opt, extra={"epoch": [3]})
    out = tmp_path / f"out.{'npz' if kind == 'npz' else 'pt'}"
    convert(capsys, tmp_path / "run", out, "--to", kind)
    convert(capsys, out, "--to", "checkpoint", tmp_path / "back")
    assert shard(tmp_path / "back") == shard(tmp_path / "run")
    q = params(dtype, seed=9)
    other = cls(q, lr=0.5, backend="numpy", **hyper)
    assert checkpoint.load(tmp_path / "back", other) == {"epoch": [3]}
    assert memory([p, opt]) == memory([q, other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", out.name, "run"]


def test_npz_is_read_by_numpy(saved, tmp_path, capsys):
    path, p, opt = saved
    convert(capsys, path, tmp_path / "o.npz", "--to", "npz")
    with np.load(tmp_path / "o.npz") as archive:
        assert same_bits(archive["0.p"], p["W"])
        assert same_bits(archive["4.v"], np.ascontiguousarray(opt.state_dict()["state"][4]["v"]))
        assert json.loads(archive["manifest"].tobytes())["t"] == 3


def torch_class(name: str) -> Any:
    torch = require("torch")
    return fused_adam_torch().Lion if name == "Lion" else getattr(torch.optim, name)


def fused_adam_torch() -> Any:
    import fused_adam.torch

    return fused_adam.torch


@pytest.mark.parametrize("case", range(len(CLASSES)), ids=[f"{c.__name__}{k}" for k, (c, _) in enumerate(CLASSES)])
def test_torch_continues(case, tmp_path, capsys):
    """Its own class with the same steps goes where ours goes; and from its state dict ours goes on."""
    torch = require("torch")
    cls, hyper = CLASSES[case]
    hyper = {k: v for k, v in hyper.items() if k not in ("numerics", "eps_root")}
    p = params(np.float64)
    del p["e"], p["F"]
    opt = stepped(cls(p, lr=0.01, backend="numpy", **hyper), p, 3)
    checkpoint.save(tmp_path / "run", opt)
    convert(capsys, tmp_path / "run", "--to", "torch", tmp_path / "o.pt")
    d = torch.load(tmp_path / "o.pt", weights_only=True)
    assert (d["class"], d["t"], d["names"]) == (cls.__name__, 3, ['["W"]', '["b"]', '["s"]'])
    tensors = [t.clone().requires_grad_() for t in d["params"]]
    theirs = torch_class(cls.__name__)(tensors, lr=0.5)
    theirs.load_state_dict(d["optimizer"])
    for seed in (5, 6):
        rng = np.random.default_rng(seed)
        for a, tensor in zip(p.values(), tensors, strict=True):
            tensor.grad = torch.from_numpy(np.asarray(rng.standard_normal(a.shape)))
        theirs.step()
        stepped(opt, p, 1, seed)
    for a, tensor in zip(p.values(), tensors, strict=True):
        assert np.allclose(a, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)

    # back, from a plain state dict: without parameters and names, and of the class that its keys tell
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    states = opt.state_dict()["state"][0]
    argv = [tmp_path / "theirs.pt", tmp_path / "back", "--to", "checkpoint"]
    if not states:
        status, _, err = run(capsys, "checkpoint", "convert", *argv, "--t", 5)
        assert status == 1 and "parameter 0 has no states, nor are there 'params'" in err
        return
    argv += ["--t", 5] if cls.__name__ == "SGD" else []
    argv += ["--optimizer", "Lion"] if cls.__name__ == "Lion" else []
    convert(capsys, *argv)
    q = [a.copy() for a in p.values()]
    other = cls(q, lr=0.5, backend="numpy", **hyper)
    checkpoint.load(tmp_path / "back", other)
    assert other.t == 5 and other.param_groups[0]["lr"] == 0.01
    for mine, both in zip(opt.state_dict()["state"], other.state_dict()["state"], strict=True):
        assert mine.keys() == both.keys()
        assert all(np.allclose(mine[k], both[k], rtol=1e-12, atol=1e-12) for k in mine)


def test_groups_for_torch(tmp_path, capsys):
    torch = require("torch")
    p = [np.ones(k, np.float32) for k in (2, 3, 4)]
    opt = fused_adam.Adam([{"params": p[:1], "lr": 0.5}, {"params": p[1:], "weight_decay": 0.1}], backend="numpy")
    opt.step([[np.ones(2, np.float32)], [np.ones(3, np.float32), np.ones(4, np.float32)]])
    checkpoint.save(tmp_path / "run", opt, params=False)
    convert(capsys, tmp_path / "run", tmp_path / "o.pt", "--to", "torch")
    d = torch.load(tmp_path / "o.pt", weights_only=True)
    assert "params" not in d
    groups = d["optimizer"]["param_groups"]
    assert [(g["params"], g["lr"], g["weight_decay"]) for g in groups] == [([0], 0.5, 0.0), ([1, 2], 1e-3, 0.1)]
    convert(capsys, tmp_path / "o.pt", tmp_path / "back", "--to", "checkpoint")
    before = memory(opt)
    checkpoint.load(tmp_path / "back", opt)
    assert memory(opt) == before


@pytest.mark.parametrize("t", [0, 1, 2**24 - 1, 2**24, 2**53 + 1])
def test_counts_of_steps_for_torch(t, tmp_path, capsys):
    torch = require("torch")
    p = np.ones(3, np.float32)
    opt = fused_adam.Adam(p, backend="numpy")
    opt.load_state_dict(opt.state_dict() | {"t": t})
    checkpoint.save(tmp_path / "run", opt)
    convert(capsys, tmp_path / "run", tmp_path / "o.pt", "--to", "torch")
    d = torch.load(tmp_path / "o.pt", weights_only=True)
    assert d["t"] == t
    if t == 0:  # torch's own start
        assert d["optimizer"]["state"] == {}
        return
    step = d["optimizer"]["state"][0]["step"]
    assert step.dtype == (torch.float32 if t < 2**24 else torch.float64) and step.item() == float(t)
    convert(capsys, tmp_path / "o.pt", tmp_path / "back", "--to", "checkpoint")
    checkpoint.load(tmp_path / "back", opt)
    assert opt.t == t


def torch_file(change: Any) -> Any:
    """Writes what torch saves of an AdamW with one parameter, after a change."""

    def write(path: Path) -> None:
        torch = require("torch")
        w = torch.ones(3, requires_grad=True)
        theirs = torch.optim.AdamW([w])
        w.grad = torch.ones(3)
        theirs.step()
        d = theirs.state_dict()
        torch.save(change(d) or d, path)

    return write


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def executed(path: Path) -> None:
    require("torch").save({"optimizer": Evil()}, path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", "x")


def single_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(2))


REFUSED: dict[str, tuple[str, Any, list[str], str]] = {
    "a pickle": ("o.pt", lambda path: put(path, b"cos\nsystem\n(S'true'\ntR."), [], "is refused by torch.load"),
    "a call": ("o.pt", executed, [], "is refused by torch.load: Weights only load failed"),
    "a text": ("o.pt", lambda path: put(path, b"text"), [], "is refused by torch.load"),
    "a list": ("o.pt", torch_file(lambda d: [1]), [], "does not hold what torch.optim saves"),
    "another dict": ("o.pt", torch_file(lambda d: {"model": {}}), [], "does not hold what torch.optim saves"),
    "no groups": ("o.pt", torch_file(lambda d: d | {"param_groups": []}), [], "does not hold what torch.optim saves"),
    "no state": ("o.pt", torch_file(lambda d: d | {"state": {}}), ["--t", "1"], "parameter 0 has no 'exp_avg': it has"),
    "no steps": ("o.pt", torch_file(lambda d: d | {"state": {}}), [], "it has no count of steps, and a checkpoint has"),
    "a class": ("o.pt", torch_file(lambda d: None), ["--optimizer", "LBFGS"], "torch has no optimizer 'LBFGS'; SGD, "),
    "t": ("o.pt", torch_file(lambda d: None), ["--t", "-1"], r"t should be in \[0, 2\*\*63\), got -1"),
    "an unknown class": (
        "o.pt",
        torch_file(lambda d: d["param_groups"][0].pop("decoupled_weight_decay") and None),
        [],
        "of which optimizer it is, it does not say; name it, as one of SGD, Adagrad",
    ),
    "a number": ("o.pt", torch_file(lambda d: d["param_groups"][0].update(lr=-1.0)), [], "lr should be at least 0"),
    "shapes": (
        "o.pt",
        torch_file(lambda d: d["state"][0].update(exp_avg=d["state"][0]["exp_avg"][:2])),
        [],
        "parameter 0 has arrays of different shapes or dtypes",
    ),
    "half": (
        "o.pt",
        torch_file(lambda d: d["state"][0].update(exp_avg=d["state"][0]["exp_avg"].int())),
        [],
        "a checkpoint cannot hold int32",
    ),
    "a text as npz": ("o.npz", lambda path: put(path, b"text"), [], "is no npz"),
    "an array": ("o.npz", single_array, [], "is no npz but a single array"),
    "other arrays": ("o.npz", lambda path: np.savez(path, a=np.ones(2)), [], "has no array 'manifest'; only what was"),
    "a broken zip": ("o.npz", lambda path: put(path, b"PK\3\4" + b"x" * 99), [], "is no npz"),
    "no arrays": ("o.npz", zipped, [], "has no array 'manifest'"),
    "a folder": ("o", lambda path: path.mkdir(), [], "is a folder; --to checkpoint takes"),
    "nothing": ("o.pt", lambda path: None, [], "No such file"),
}


@pytest.mark.parametrize(("name", "write", "argv", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted(name, write, argv, message, tmp_path, capsys, monkeypatch):
    require("torch")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    status, out, err = run(
        capsys, "checkpoint", "convert", tmp_path / name, tmp_path / "back", "--to", "checkpoint", *argv
    )
    assert (status, out) == (2 if name == "o" else 1, "") and re.search(message, err)
    assert not (tmp_path / "back").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: fused_adam.Adam(p, numerics="keras", backend="numpy"), "no formula like numerics='keras'"),
        (lambda p: fused_adam.Adam(p, per_row_step=True, backend="numpy"), "torch has nothing for 0.row_steps"),
        (lambda p: Plain(p, lr=0.1, backend="numpy"), "torch has no optimizer 'Plain'"),
    ],
)
def test_what_torch_has_not(make, message, tmp_path, capsys):
    require("torch")
    checkpoint.save(tmp_path / "run", make([np.ones(3)]))
    status, out, err = run(capsys, "checkpoint", "convert", tmp_path / "run", tmp_path / "o.pt", "--to", "torch")
    assert (status, out) == (1, "") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@fused_adam.rule
def Plain(p, g, lr):  # a class
    p = p - lr * g
    return p


def test_convert_overwrites_nothing(saved, tmp_path, capsys, monkeypatch):
    path, *_ = saved
    for out in (path, tmp_path / "there"):
        (tmp_path / "there").write_text("mine")
        status, _, err = run(capsys, "checkpoint", "convert", path, out, "--to", "npz")
        assert status == 2 and "is there already; name one that is not" in err
    assert (tmp_path / "there").read_text() == "mine"
    assert run(capsys, "checkpoint", "convert", path, tmp_path / "o", "--to", "npz", "--t", "1")[0] == 2
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    status, _, err = run(capsys, "checkpoint", "convert", path, tmp_path / "o", "--to", "npz")
    assert status == 1 and "full" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "there"]


def test_without_torch(saved, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    path, *_ = saved
    status, _, err = run(capsys, "checkpoint", "convert", path, tmp_path / "o.pt", "--to", "torch")
    assert status == 1 and "PyTorch is not installed; pip install 'fused-adam[torch]'" in err


def test_a_damaged_checkpoint_is_not_converted(saved, tmp_path, capsys):
    path, *_ = saved
    shutil.rmtree(path / "save-00000001")
    flip(path / "save-00000002" / "shard-00000.safetensors", 9000)
    status, _, err = run(capsys, "checkpoint", "convert", path, tmp_path / "o.npz", "--to", "npz")
    assert status == 4 and "block 0" in err and not (tmp_path / "o.npz").exists()
