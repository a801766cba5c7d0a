"""Checkpoints of several ranks: any number writes what any other number reads, each only what it owns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import load_file, params, stepped
from conftest import same_bits
from watch import memory

import fused_adam
from fused_adam import checkpoint
from fused_adam.checkpoint import CheckpointError
from fused_adam.checkpoint._api import finish
from fused_adam.checkpoint._elements import OnHost, of_optimizer
from fused_adam.checkpoint._files import NewSave, shard_name
from fused_adam.checkpoint._manifest import BLOCK, Contents, Parameter, Spec
from fused_adam.checkpoint._saved import Saved
from fused_adam.checkpoint._shards import Piece, ShardFile, write_shard

BUCKET = 1024  # elements, of which each rank owns a part
ALIGNED = 128
SHAPES = {"W": (30, 50), "b": (7,), "e": (0, 3), "s": (), "F": (7, 11, 13), "v": (5000,)}
Intervals = dict[tuple[int, str], list[tuple[int, int]]]


def owned(contents: Contents, rank: int, world: int) -> Intervals:
    """The intervals of each array that are a rank's: of each bucket of canonical space a multiple of 128.

    Of the scales of 8-bit states, two for each 64 of these elements. The steps of rows, and scales of other elements
    than these, which have no place there, are the first rank's.
    """
    intervals: Intervals = {}
    offset = 0
    each = -(-BUCKET // ALIGNED // world) * ALIGNED
    for number, parameter in enumerate(contents.parameters):
        size = int(np.prod(parameter.shape))
        mine = []
        for bucket in range(0, offset + size, BUCKET):
            start = max(bucket + rank * each, offset)
            stop = min(bucket + (rank + 1) * each, bucket + BUCKET, offset + size)
            if start < stop:
                mine.append((start - offset, stop - offset))
        for name in parameter.arrays:
            everything = [(0, parameter.arrays[name].size)] if rank == 0 else []
            scales = [(start // 32, 2 * -(-stop // 64)) for start, stop in mine]
            kinds = {"row_steps": everything, "fortran_scales": everything, "scales": scales}
            intervals[number, name] = kinds.get(name, mine)
        offset += -(-size // ALIGNED) * ALIGNED
    return intervals


def contents_of(opt: Any) -> tuple[Contents, Any]:
    parameters, located = of_optimizer(opt)
    d = fused_adam._state_dict.numbers(opt)
    return Contents(d["optimizer"], d["t"], d["param_groups"], parameters, {"epoch": 1}), located


def save(path: Path, opt: Any, world: int) -> Path:
    contents, located = contents_of(opt)
    with NewSave(path) as new:
        shards = []
        for rank in range(world):
            pieces = [
                Piece(n, name, start, stop, contents.spec(n, name), located[n, name])
                for (n, name), intervals in owned(contents, rank, world).items()
                for start, stop in intervals
            ]
            shards.append(write_shard(new.folder, rank, pieces, lambda n: None))
        return finish(new, contents, shards, 1)


def optimizer(seed: int, steps: int, mixed: bool = False) -> tuple[Any, Any]:
    p = params(seed=seed, shapes=SHAPES)
    if mixed:
        p["b"], p["v"] = p["b"].astype(np.float64), p["v"].astype(np.float64)
    return p, stepped(fused_adam.Adam(p, amsgrad=True, backend="numpy"), p, steps)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(writers, readers, mixed, tmp_path):
    """Each reader takes its intervals into an optimizer of its own; together they have every element, bit for bit."""
    p, opt = optimizer(0, 2, mixed)
    save(tmp_path, opt, writers)
    assert len(list(tmp_path.glob("save-00000001/shard-*"))) == writers
    contents, expected = contents_of(opt)
    assert all(len(owned(contents, 0, world)[5, "m"]) >= 5 for world in (writers, readers))  # interleaved
    seen = {(n, name): np.zeros(spec.size, int) for n, name, spec in contents.arrays()}
    together, whole = optimizer(9, 0, mixed)
    _, located = of_optimizer(whole)
    for rank in range(readers):
        with Saved(tmp_path) as saved:
            assert saved.contents.parameters == contents.parameters
            for n, name, start, x in saved.read(owned(saved.contents, rank, readers)):
                assert same_bits(x, expected[n, name].read(start, start + len(x)))
                seen[n, name][start : start + len(x)] += 1
                located[n, name].write(start, x)
    assert all((counts == 1).all() for counts in seen.values())
    assert memory(p) == memory(together)
    q, other = optimizer(8, 0, mixed)
    assert checkpoint.load(tmp_path, other) == {"epoch": 1}
    assert memory([p, opt]) == memory([q, other])
    checkpoint.verify(tmp_path)


def test_steps_of_rows_are_an_array_of_their_own(tmp_path):
    p = {k: np.ones(shape) for k, shape in SHAPES.items() if k != "F"}
    opt = fused_adam.Adam(p, per_row_step=True, backend="numpy")
    opt.step({k: np.ones_like(a) for k, a in p.items()})
    save(tmp_path, opt, 3)
    q = {k: np.zeros_like(a) for k, a in p.items()}
    other = fused_adam.Adam(q, per_row_step=True, backend="numpy")
    checkpoint.load(tmp_path, other)
    assert memory([p, opt]) == memory([q, other])


def test_safetensors_reads_each_shard(tmp_path):
    """Arrays that lie in one file as a whole have their shape, parts the interval in their name."""
    p, opt = optimizer(0, 1, mixed=True)
    folder = save(tmp_path, opt, 3)
    found = [load_file(folder / shard_name(k)) for k in range(3)]
    assert found[1]["3.p"].shape == () and found[1]["1.m"].shape == (7,)
    parts = {key: a for shard in found for key, a in shard.items() if key.startswith("0.p[")}
    ordered = sorted(parts, key=lambda key: int(key[4:].split(":")[0]))
    assert ordered[0] == "0.p[0:384]"
    assert same_bits(np.concatenate([parts[key] for key in ordered]), p["W"].reshape(-1))


def test_a_rank_that_owns_nothing(tmp_path):
    p = np.ones(10, np.float32)
    opt = fused_adam.SGD([p], backend="numpy")
    folder = save(tmp_path, opt, 4)
    assert (folder / shard_name(3)).stat().st_size == 64
    assert load_file(folder / shard_name(3)) == {}
    q = np.zeros(10, np.float32)
    checkpoint.load(tmp_path, fused_adam.SGD([q], backend="numpy"))
    assert same_bits(p, q)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pieces: pieces[:-1], r"not each element of 0.m once: 1024 to 2048 are missing"),
        (lambda pieces: [*pieces, pieces[0]._replace(stop=5)], r"0.p once: 0 comes twice"),
        (lambda pieces: [pieces[0]._replace(start=1), *pieces[1:]], r"0.p once: 0 to 1 are missing"),
        (lambda pieces: [*pieces, pieces[0]._replace(number=1)], r"has '1.p\[0:1024\]', of which manifest.json knows"),
    ],
)
def test_ranks_that_do_not_fit_together_make_no_checkpoint(break_it, message, tmp_path):
    opt = fused_adam.SGD([np.arange(2048.0)], momentum=0.9, backend="numpy")
    checkpoint.save(tmp_path, opt)
    contents, located = contents_of(opt)
    pieces = [
        Piece(0, name, start, start + 1024, contents.spec(0, name), located[0, name])
        for name in "pm"
        for start in (0, 1024)
    ]
    with pytest.raises(CheckpointError, match=message), NewSave(tmp_path) as new:
        finish(new, contents, [write_shard(new.folder, 0, break_it(pieces), lambda n: None)], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "save-00000001"]


def test_a_rank_that_has_not_written(tmp_path):
    _, opt = optimizer(0, 1)
    contents, located = contents_of(opt)
    with NewSave(tmp_path) as new:
        pieces = [Piece(n, k, 0, spec.size, spec, located[n, k]) for n, k, spec in contents.arrays()]
        shard = write_shard(new.folder, 0, pieces, lambda n: None)
        with pytest.raises(CheckpointError, match=r"\.new/shard-00001.safetensors is missing"):
            finish(new, contents, [shard, shard], 1)
    assert [*tmp_path.glob("save*")] == []


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_shard_that_is_missing_is_named(lost, tmp_path):
    p, opt = optimizer(0, 1)
    folder = save(tmp_path, opt, 3)
    (folder / shard_name(lost)).unlink()
    before = memory([p, opt])
    with pytest.raises(CheckpointError, match=f"{shard_name(lost)} is missing"):
        checkpoint.load(tmp_path, opt)
    assert memory([p, opt]) == before


def test_shards_of_two_saves_do_not_mix(tmp_path):
    p, opt = optimizer(0, 1)
    first = save(tmp_path / "a", opt, 2)
    stepped(opt, p, 1)
    second = save(tmp_path / "b", opt, 2)
    os.replace(first / shard_name(1), second / shard_name(1))
    before = memory([p, opt])
    with pytest.raises(CheckpointError, match=f"{shard_name(1)} is damaged: block 0"):
        checkpoint.load(tmp_path / "b", opt)
    assert memory([p, opt]) == before


def test_only_the_blocks_that_are_asked_for_are_read(tmp_path, monkeypatch):
    n = 10 * BLOCK // 4
    a = np.arange(n, dtype=np.float32)
    spec = Spec("F32", (n,))
    contents = Contents("SGD", 0, [{"params": [0]}], [Parameter("", *("F32", (n,)), {"p": spec})], {})
    with NewSave(tmp_path) as new:
        shard = write_shard(new.folder, 0, [Piece(0, "p", 0, n, spec, OnHost(a, (n,)))], lambda n: None)
        finish(new, contents, [shard], 1)
    reads: list[int] = []
    block = ShardFile.block
    with Saved(tmp_path) as saved:
        monkeypatch.setattr(ShardFile, "block", lambda self, k: reads.append(k) or block(self, k))
        start, stop = 3 * BLOCK // 4 + 5, 4 * BLOCK // 4 + 7
        got = [x.copy() for *_, x in saved.read({(0, "p"): [(start, stop)]})]
        assert same_bits(np.concatenate(got), a[start:stop])
    assert reads == [3, 4]


BF16 = [0x3F80, 0x7F80, 0x7F81, 0xFFC0, 0xFF80, 0x8000]  # 1, inf, two NaNs, -inf, -0
F16 = [0x3C00, 0x7C00, 0x7C01, 0xFE00, 0xFC00, 0x8000]


@pytest.mark.parametrize(
    ("dtype", "bits", "kept"),
    [
        ("BF16", np.array(BF16, "u2"), [*BF16[:2], 0x7FC0, 0x7FC0, *BF16[4:]]),
        ("F16", np.array(F16, "u2").view("f2"), [*F16[:2], 0x7E00, 0x7E00, *F16[4:]]),
        ("U16", np.array([*BF16, *F16], "u2"), [*BF16, *F16]),
        ("U8", np.arange(256, dtype="u1"), [*range(256)]),
        ("I8", np.arange(-128, 128, dtype="i1"), [*range(128, 256), *range(128)]),
    ],
    ids=["BF16", "F16", "U16", "U8", "I8"],
)
def test_other_dtypes(dtype, bits, kept, tmp_path):
    """Which storage formats will use: as safetensors knows them, one NaN for all in those that have any."""
    spec = Spec(dtype, (len(bits),))
    contents = Contents("Adam", 0, [{"params": [0]}], [Parameter("", dtype, spec.shape, {"x": spec})], {})
    with NewSave(tmp_path) as new:
        piece = Piece(0, "x", 0, len(bits), spec, OnHost(bits, spec.shape))
        folder = finish(new, contents, [write_shard(new.folder, 0, [piece], lambda n: None)], 1)
    with Saved(tmp_path) as saved:
        ((_, _, _, x),) = saved.read({(0, "x"): [(0, len(bits))]})
        assert [*x.view(f"u{x.itemsize}")] == kept
    if dtype != "BF16":  # which NumPy does not have
        assert same_bits(load_file(folder / shard_name(0))["0.x"], x)


def test_a_dtype_of_the_same_size_is_another(tmp_path):
    bits, half, brain = np.ones(4, "u2"), Spec("F16", (4,)), Spec("BF16", (4,))
    contents = Contents("Adam", 0, [{"params": [0]}], [Parameter("", "BF16", (4,), {"x": brain})], {})
    with NewSave(tmp_path) as new:
        shard = write_shard(new.folder, 0, [Piece(0, "x", 0, 4, half, OnHost(bits.view("f2"), (4,)))], lambda n: None)
        with pytest.raises(CheckpointError, match=r"'0.x' in .* is F16 of shape \(4,\), and should be BF16 of \(4,\)"):
            finish(new, contents, [shard], 1)
