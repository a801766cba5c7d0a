"""Checkpoints of numbers in 16 and 8 bits: as they are kept, bit for bit; and as float32 in files of other kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_cases import replace_shard
from conftest import require, same_bits
from test_checkpoint_shards import contents_of, owned, save
from test_cli import run, run_json
from watch import memory

import fused_adam
from fused_adam import _storage, checkpoint
from fused_adam.checkpoint import CheckpointError
from fused_adam.checkpoint._elements import of_optimizer
from fused_adam.checkpoint._saved import Saved

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"W": (30, 50), "b": (7,), "e": (0, 3), "s": (), "F": (5, 4, 30)}  # F in Fortran order
INT8 = {"state_dtype": "int8"}
# (class, dtype of p, options, safetensors' dtypes of W's arrays)
FORMATS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (fused_adam.AdamW, BF16, {}, "p BF16, m F32, v F32"),
    (fused_adam.AdamW, np.float16, {"stochastic_rounding": True}, "p F16, m F32, v F32"),
    (fused_adam.AdamW, BF16, {"state_dtype": "bfloat16", "stochastic_rounding": True}, "p BF16, m BF16, v BF16"),
    (fused_adam.Lion, np.float32, {"state_dtype": "bfloat16"}, "p F32, m BF16"),
    (fused_adam.AdamW, np.float16, {"master": "float32"}, "p F16, m F32, v F32, master F32"),
    (fused_adam.SGD, BF16, {"master": "split16", "momentum": 0.9}, "p BF16, m F32, master U16"),
    (fused_adam.Adam, BF16, {"master": "split8", "state_dtype": "bfloat16"}, "p BF16, m BF16, v BF16, master U8"),
    (fused_adam.AdamW, np.float32, INT8, "p F32, m I8, v U8, scales U16"),
    (fused_adam.AdamW, BF16, INT8 | {"stochastic_rounding": True}, "p BF16, m I8, v U8, scales U16"),
    (fused_adam.AdamW, BF16, INT8 | {"master": "float32"}, "p BF16, m I8, v U8, master F32, scales U16"),
    (fused_adam.AdamW, BF16, INT8 | {"master": "split8"}, "p BF16, m I8, v U8, master U8, scales U16"),
]
formats = pytest.mark.parametrize(
    ("cls", "dtype", "how", "kinds"), FORMATS, ids=[f"{row[0].__name__}: {row[3]}" for row in FORMATS]
)


def arrays(dtype: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    drawn = {k: np.asarray(rng.standard_normal(shape), np.float32).astype(dtype) for k, shape in SHAPES.items()}
    return {k: np.asfortranarray(a) if k == "F" else a for k, a in drawn.items()}


def stepped(opt: Any, dtype: Any, steps: int, seed: int = 1) -> Any:
    for k in range(steps):
        opt.step(arrays(dtype, 100 * seed + k))
    return opt


def made(cls: Any, dtype: Any, how: dict[str, Any], steps: int, seed: int = 0, **more: Any) -> tuple[Any, Any]:
    p = arrays(dtype, seed)
    return p, stepped(cls(p, **{"lr": 0.01, "seed": 5, **how, **more}), dtype, steps)


def everything(opt: Any) -> list[Any]:
    """Every byte, as it is kept."""
    parameters, located = of_optimizer(opt)
    return [
        np.array(located[number, name].read(0, spec.size)).tobytes()
        for number, parameter in enumerate(parameters)
        for name, spec in parameter.arrays.items()
    ]


@contextmanager
def refused(match: str, opt: Any, errors: Any = ValueError) -> Iterator[None]:
    """The block raises, and of the optimizer no byte changes."""
    before = everything(opt)
    with pytest.raises(errors, match=match):
        yield
    assert everything(opt) == before and opt.t == 1


@formats
def test_goes_on_bit_for_bit(
    cls: Any, dtype: Any, how: dict[str, Any], kinds: str, backend: str, tmp_path: Path
) -> None:
    """As if it had never stopped, on the other backend, over parameters of other values; and in no more bytes."""
    other = {"numpy": "numba", "numba": "numpy"}[backend]
    _, first = made(cls, dtype, how, 3, backend=backend)
    _, second = made(cls, dtype, how, 1, seed=9, lr=0.5, backend=other)
    shard = next(checkpoint.save(tmp_path, first).glob("shard-*"))
    with require("safetensors").safe_open(shard, "numpy") as file:
        assert kinds == ", ".join(f"{k[2:]} {file.get_slice(k).get_dtype()}" for k in in_order(file.keys()))
    assert everything(first) != everything(second)
    checkpoint.load(tmp_path, second)
    assert everything(first) == everything(second) and second.param_groups[0]["lr"] == 0.01
    for opt in (first, second):
        stepped(opt, dtype, 2, seed=2)
    assert everything(first) == everything(second)
    checkpoint.verify(tmp_path)


def in_order(keys: Any) -> list[str]:
    """Those of W, as an optimizer has them."""
    known = ["p", "m", "v", "master", "scales"]
    return sorted((k for k in keys if k.startswith("0.")), key=lambda k: known.index(k[2:]))


def test_bytes_on_the_disk(tmp_path: Path) -> None:
    n = 2**20
    opt = fused_adam.AdamW(np.zeros(n, np.uint16), dtype="bfloat16", master="split8", state_dtype="int8")
    checkpoint.save(tmp_path, opt)
    assert 5.06 * n < next(tmp_path.glob("*/shard-*")).stat().st_size < 5.07 * n


def test_uint16_and_ml_dtypes_load_each_other(tmp_path: Path) -> None:
    p, opt = made(fused_adam.AdamW, BF16, INT8 | {"master": "split8"}, 2)
    checkpoint.save(tmp_path, opt)
    q = {k: a.view(np.uint16) for k, a in arrays(BF16, 9).items()}
    other = fused_adam.AdamW(q, dtype="bfloat16", master="split8", state_dtype="int8")
    checkpoint.load(tmp_path, other)
    assert everything(opt) == everything(other) and all(np.array_equal(p[k].view(np.uint16), q[k]) for k in p)


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 4), (3, 1), (4, 2), (3, 3)])
@formats
def test_any_number_of_ranks(
    cls: Any, dtype: Any, how: dict[str, Any], kinds: str, writers: int, readers: int, tmp_path: Path
) -> None:
    """Each its intervals of canonical space, and the scales of the 64 elements in each block of them."""
    _, opt = made(cls, dtype, how, 2)
    save(tmp_path, opt, writers)
    contents, _ = contents_of(opt)
    _, other = made(cls, dtype, how, 1, seed=9)
    _, located = of_optimizer(other)
    for rank in range(readers):
        with Saved(tmp_path) as saved:
            for n, name, start, x in saved.read(owned(contents, rank, readers)):
                located[n, name].write(start, x)
    assert everything(opt) == everything(other)


# --- what is refused --------------------------------------------------------------------------------------------------

_SPLIT8 = INT8 | {"master": "split8"}
MISMATCHES = [
    ({}, r"has p \(BF16, \(30, 50\)\), m \(I8, .* scales \(U16, \(48,\)\) but this optimizer p \(BF16.* m \(F32"),
    (INT8, r"of parameter 0, .* master \(U8, .* but this .*; make it with the state_dtype and master of that one"),
    (INT8 | {"master": "split16"}, r"master \(U8, .* but this .* master \(U16"),
    (INT8 | {"master": "float32"}, r"master \(U8, .* but this .* master \(F32"),
    ({"master": "split8", "state_dtype": "bfloat16"}, r"m \(I8, .* but this .* m \(BF16"),
]


@pytest.mark.parametrize(("how", "message"), MISMATCHES)
def test_another_format_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, opt = made(fused_adam.AdamW, BF16, _SPLIT8, 2)
    checkpoint.save(tmp_path, opt)
    _, other = made(fused_adam.AdamW, BF16, how, 1)
    with refused(message, other):
        checkpoint.load(tmp_path, other)


def test_another_dtype_or_order_of_parameters_is_refused(tmp_path: Path) -> None:
    """In Fortran order, scales are of other elements."""
    _, opt = made(fused_adam.AdamW, BF16, INT8, 2)
    checkpoint.save(tmp_path, opt)
    _, other = made(fused_adam.AdamW, np.float32, INT8, 1)
    with refused(r'parameter 0 is \["W"\] \(BF16, .* but \["W"\] \(F32', other):
        checkpoint.load(tmp_path, other)
    q = {k: np.ascontiguousarray(a).reshape(a.shape) for k, a in arrays(BF16, 0).items()}
    other = stepped(fused_adam.AdamW(q, **INT8), BF16, 1)
    with refused(r"of parameter 4, .* fortran_scales \(U16, .* but this .* scales \(U16", other):
        checkpoint.load(tmp_path, other)


def test_a_master_without_its_parameters_is_refused(tmp_path: Path) -> None:
    _, opt = made(fused_adam.AdamW, BF16, _SPLIT8, 1)
    with pytest.raises(ValueError, match="params is False, but a master belongs to its parameters; leave it out"):
        checkpoint.save(tmp_path / "run", opt, params=False)
    assert not (tmp_path / "run").exists()


def test_a_corrupt_block_is_named(tmp_path: Path) -> None:
    _, opt = made(fused_adam.AdamW, BF16, _SPLIT8, 2)
    folder = checkpoint.save(tmp_path, opt)
    shard = folder / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    _, other = made(fused_adam.AdamW, BF16, _SPLIT8, 1)
    with refused(r"shard-00000.safetensors is damaged: block 0 \(bytes 0 to \d+\)", other, CheckpointError):
        checkpoint.load(tmp_path, other)


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        ("0.scales", 6, 0xFFFF, r"0.scales\[3\] is 65535, which no step has made"),
        ("0.scales", 2, 0x0020, r"0.scales\[1\] is 32, which"),
        ("4.fortran_scales", 0, 0x3F01, r"4.fortran_scales\[0\] is 16129, which"),
        ("0.m", 700, 0x80, r"0.m\[700\] is -128, which no step has made"),
    ],
)
def test_codes_that_no_step_has_made(key: str, place: int, value: int, message: str, tmp_path: Path) -> None:
    """With the checksums that they should have."""
    _, opt = made(fused_adam.AdamW, BF16, _SPLIT8, 2)
    folder = checkpoint.save(tmp_path, opt)
    data = bytearray((folder / "shard-00000.safetensors").read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    begin = length + json.loads(data[8:length])[key]["data_offsets"][0] + place
    width = 1 if key.endswith("m") else 2
    data[begin : begin + width] = value.to_bytes(width, "little")
    replace_shard(folder, bytes(data))
    _, other = made(fused_adam.AdamW, BF16, _SPLIT8, 1)
    with refused(message, other, CheckpointError):
        checkpoint.load(tmp_path, other)


# --- files of other kinds ---------------------------------------------------------------------------------------------


def wide(opt: Any) -> list[dict[str, Any]]:
    """Of each parameter its states, and its master, in float32."""
    found = []
    for state in opt.state_dict()["state"]:
        if "scales" in state:
            order: Any = "C" if state["m"].flags.c_contiguous else "F"
            codes = fused_adam._int8.to_floats(state["m"].ravel(order), state["v"].ravel(order), state.pop("scales"))
            state |= {name: np.reshape(a, state["m"].shape, order) for name, a in codes.items()}
        found.append(state)
    return found


@pytest.mark.parametrize("kind", ["npz", "torch"])
@formats
def test_converted_states_are_float32(
    cls: Any, dtype: Any, how: dict[str, Any], kinds: str, kind: str, tmp_path: Path, capsys: Any
) -> None:
    """And back: a checkpoint that an optimizer with float32 states, and float32 masters, loads."""
    p, opt = made(cls, dtype, how, 3)
    expected = wide(opt)
    checkpoint.save(tmp_path / "run", opt, extra={"epoch": 3})
    out = tmp_path / f"o.{kind}"
    argv = ["checkpoint", "convert"]
    assert run(capsys, *argv, tmp_path / "run", out, "--to", kind) == (0, "", "")
    for k, (state, a) in enumerate(zip(expected, p.values(), strict=True)):
        found = from_npz(out, k) if kind == "npz" else from_torch(out, k)
        assert same_bits(found.pop("p"), a.view(np.uint16) if dtype == BF16 else a)
        assert found.keys() == state.keys() and all(same_bits(found[name], state[name]) for name in state)
    assert run(capsys, *argv, out, tmp_path / "back", "--to", "checkpoint") == (0, "", "")
    plain = {"master": "float32"} if "master" in how else {}
    momentum = {k: how[k] for k in how.keys() & {"momentum"}}
    q, other = made(cls, dtype, plain | momentum, 0, seed=9)
    assert checkpoint.load(tmp_path / "back", other) == {"epoch": 3}
    for mine, theirs in zip(other.state_dict()["state"], expected, strict=True):
        assert mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)
    assert memory(p) == memory(q) and other.t == 3


def from_npz(path: Path, k: int) -> dict[str, Any]:
    with np.load(path) as archive:
        return {name.partition(".")[2]: archive[name] for name in archive.files if name.startswith(f"{k}.")}


def from_torch(path: Path, k: int) -> dict[str, Any]:
    torch = require("torch")
    d = torch.load(path, weights_only=True)
    p = d["params"][k]
    names = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m"}
    found = {names[key]: x.numpy() for key, x in d["optimizer"]["state"][k].items() if key in names}
    if "masters" in d:
        found["master"] = d["masters"][k].numpy()
    return found | {"p": (p.view(torch.uint16) if p.dtype == torch.bfloat16 else p).numpy()}


def test_torch_of_half_precision_becomes_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    """Its parameters and states are bfloat16."""
    torch = require("torch")
    w = torch.ones(300, dtype=torch.bfloat16, requires_grad=True)
    theirs = torch.optim.AdamW([w], lr=0.1)
    w.grad = torch.linspace(-1, 1, 300, dtype=torch.bfloat16)
    theirs.step()
    torch.save({"optimizer": theirs.state_dict(), "params": [w.detach()]}, tmp_path / "o.pt")
    argv = ["checkpoint", "convert", tmp_path / "o.pt", tmp_path / "run", "--to", "checkpoint"]
    assert run(capsys, *argv) == (0, "", "")
    p = [np.zeros(300, np.uint16)]
    opt = fused_adam.AdamW(p, dtype="bfloat16", state_dtype="bfloat16")
    checkpoint.load(tmp_path / "run", opt)
    assert np.array_equal(p[0], w.detach().view(torch.uint16).numpy()) and opt.t == 1
    assert same_bits(opt.state_dict()["state"][0]["m"], theirs.state[w]["exp_avg"].float().numpy())


def test_show_tells_the_dtypes(tmp_path: Path, capsys: Any) -> None:
    _, opt = made(fused_adam.AdamW, BF16, _SPLIT8, 1)
    checkpoint.save(tmp_path, opt)
    status, out, _ = run(capsys, "checkpoint", "show", tmp_path)
    pattern = r'^0 +BF16 +30x50 +\["W"\]: p, m I8, v U8, master U8, scales U16$'
    assert status == 0 and re.search(pattern, out, re.MULTILINE)
    _, d = run_json(capsys, "checkpoint", "show", tmp_path)
    assert d["parameters"][0]["dtypes"] == ["BF16", "I8", "U8", "U8", "U16"]


def test_a_masters_float32_is_what_it_stands_for(tmp_path: Path, capsys: Any) -> None:
    """In the file: not the bits beside the parameter."""
    p, opt = made(fused_adam.AdamW, BF16, {"master": "split16"}, 3)
    checkpoint.save(tmp_path / "run", opt)
    run(capsys, "checkpoint", "convert", tmp_path / "run", tmp_path / "o.npz", "--to", "npz")
    master = from_npz(tmp_path / "o.npz", 0)["master"]
    rounded = _storage.split(master.ravel(), np.dtype(np.uint16))[0]
    assert np.array_equal(rounded.reshape(SHAPES["W"]), p["W"].view(np.uint16))
