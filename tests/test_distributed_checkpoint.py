"""Checkpoints and state dicts of sharded optimizers: any number of ranks goes on where any other was, bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_bits
from distributed_cases import FORMATS, digest, gradients, make, numbers, trained

import fused_adam
from fused_adam import checkpoint
from fused_adam.distributed import Sharded, Threads, _checkpoint

RANKS = (1, 2, 3, 4)
LATER = 2


def save(path: Path, ranks: int, steps: int = 3, **more: Any) -> list[str]:
    """The digest of each rank."""

    def run(c: Any) -> str:
        params, opt = trained(c, "float32", "ordered", steps, **more)
        assert opt.save(path, extra={"epoch": 3} if c.rank == 0 else None) == path / "save-00000001"
        return digest(opt, params)

    return Threads.run(ranks, run)


def same_gradients(opt: Any, step: int) -> Any:
    """The same sum for any number of ranks."""
    found = numbers("float32", 1, step, 0)
    return found if opt.collective.rank == 0 else {name: np.zeros_like(a) for name, a in found.items()}


@pytest.mark.parametrize("readers", RANKS)
@pytest.mark.parametrize("writers", RANKS)
def test_any_number_of_ranks_goes_on_with_what_any_other_saved(writers, readers, tmp_path):
    expected = save(tmp_path, writers)
    assert len(list(tmp_path.glob("save-00000001/shard-*"))) == writers

    def run(c: Any) -> Any:
        params, opt = make(c, average=False)
        opt.step(gradients(opt, 9))
        assert opt.load(tmp_path) == {"epoch": 3}
        loaded = digest(opt, params)
        for step in range(LATER):
            opt.step(same_gradients(opt, step))
        return loaded, digest(opt, params)

    found = Threads.run(readers, run)
    assert {loaded for loaded, _ in found} == {*expected}

    p = numbers("float32", 9)
    plain = fused_adam.AdamW(p, lr=9.0, max_grad_norm=10.0)
    assert checkpoint.load(tmp_path, plain) == {"epoch": 3}
    for step in range(LATER):
        plain.step(numbers("float32", 1, step, 0))
    assert {later for _, later in found} == {digest(plain, p)}


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_go_on_with_what_one_optimizer_saved(ranks, tmp_path):
    p = numbers("float32", 0)
    plain = fused_adam.AdamW(p, lr=0.1)
    plain.step(numbers("float32", 1, 0, 0))
    checkpoint.save(tmp_path, plain, extra={"epoch": 3})

    def run(c: Any) -> str:
        params, opt = make(c, backend="numba", flat=True)
        opt.load(tmp_path)
        assert opt.param_groups[0]["lr"] == 0.1
        return digest(opt, params)

    assert {*Threads.run(ranks, run)} == {digest(plain, p)}


@pytest.mark.parametrize("form", FORMATS)
def test_any_number_of_ranks_goes_on_in_every_format(form, tmp_path):
    """Codes, scales and masters are saved as they are kept, each by who owns it."""

    def first(c: Any) -> str:
        params, opt = trained(c, form, "invariant", 2)
        opt.save(tmp_path)
        opt.step(gradients(opt, 2, FORMATS[form][0]))
        return digest(opt, params)

    def go_on(c: Any) -> str:
        params, opt = make(c, form, "invariant")
        opt.load(tmp_path)
        opt.step(gradients(opt, 2, FORMATS[form][0]))
        return digest(opt, params)

    expected = {*Threads.run(4, first)}
    for ranks in (1, 2, 8):
        assert {*Threads.run(ranks, go_on)} == expected


@pytest.mark.parametrize("form", FORMATS)
def test_state_dicts_go_from_any_number_of_ranks_to_any_other(form):
    def run(c: Any) -> Any:
        params, opt = trained(c, form, "invariant", 2)
        kept = {name: p.copy() for name, p in params.items()}
        return kept, opt.state_dict(), _on(opt, params)

    def _on(opt: Any, params: Any) -> str:
        opt.step(gradients(opt, 2, FORMATS[form][0]))
        return digest(opt, params)

    kept, d, expected = Threads.run(4, run)[0]

    def go_on(c: Any) -> str:
        params, opt = make(c, form, "invariant")
        for name, p in params.items():
            p[...] = kept[name]
        opt.load_state_dict(d)
        return _on(opt, params)

    for ranks in (1, 2, 8):
        assert {*Threads.run(ranks, go_on)} == {expected}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"t": -1}, r'state_dict\["t"\] should be in \[0'),
        (lambda d: d | {"format": 9}, "has format 9"),
        (lambda d: d | {"state": d["state"][1:]}, r'"state"\] should be a list of 5'),
        (lambda d: d | {"state": [{**s, "m": s["m"].ravel()[:1]} for s in d["state"]]}, r"has shape \(1,\); expected"),
        (lambda d: d | {"state": [{"m": s["m"]} for s in d["state"]]}, r"should have the keys \['m', 'v'\]"),
    ],
    ids=["t", "format", "count", "shape", "keys"],
)
def test_state_dicts_that_do_not_fit_change_nothing(change, message):
    """One rank gets a wrong one; all refuse."""

    def run(c: Any) -> Any:
        params, opt = trained(c, "float32", "ordered", 1)
        before = digest(opt, params)
        d = opt.state_dict()
        opt.step(gradients(opt, 1))
        after = digest(opt, params)
        with pytest.raises((TypeError, ValueError), match=message):
            opt.load_state_dict(change(d) if c.rank == 1 else d)
        assert digest(opt, params) == after != before
        return True

    assert Threads.run(2, run) == [True, True]


# --- errors -----------------------------------------------------------------------------------------------------------


def remove_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()


def flip(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "more", "message"),
    [
        (remove_shard, {}, "shard-00001.safetensors is missing"),
        (flip, {}, r"shard-00000.safetensors is damaged: block 0 \(bytes 0 to "),
        (None, {"rule": fused_adam.Lion}, "is of 'AdamW' but this is Lion"),
        (None, {"form": "float64"}, r'parameter 0 is \["W"\] \(F32, .* but \["W"\] \(F64'),
        (None, {"amsgrad": True}, "asks for states .'m', 'v'. but this optimizer has .'m', 'v', 'max_v'"),
        (lambda folder: folder.rename(folder.parent / "other"), {}, "holds no checkpoint"),
    ],
    ids=["missing", "flipped", "class", "dtype", "states", "gone"],
)
def test_checkpoints_that_do_not_fit_change_nothing(damage, more, message, tmp_path):
    """On all ranks, although only some read what is damaged."""
    save(tmp_path, 2)
    if damage:
        damage(tmp_path / "save-00000001")

    def run(c: Any) -> Any:
        params, opt = make(c, **more)
        before = digest(opt, params)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            opt.load(tmp_path)
        assert digest(opt, params) == before
        opt.step(gradients(opt, 0, "float64" if more.get("form") else "float32"))
        return opt.t

    assert Threads.run(3, run) == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_rank_leaves_the_last_one(rank, tmp_path, monkeypatch):
    write_shard = _checkpoint.write_shard

    def full(folder: Path, number: int, *rest: Any) -> Any:
        if number == rank and (tmp_path / "save-00000001").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(folder, number, *rest)

    monkeypatch.setattr(_checkpoint, "write_shard", full)

    def run(c: Any) -> Any:
        params, opt = trained(c, "float32", "ordered", 1)
        opt.save(tmp_path)
        saved = digest(opt, params)
        opt.step(gradients(opt, 1))
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            opt.save(tmp_path)
        opt.load(tmp_path)
        return digest(opt, params) == saved

    assert Threads.run(2, run) == [True, True]
    checkpoint.verify(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "save-00000001"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"extra": {"x": np.ones(1)}}, "extra"),
        ({"keep_last": 0}, "keep_last should be in"),
        ({"params": 1}, "params should be True or False"),
    ],
)
def test_arguments_of_save(more, message, tmp_path):
    def run(c: Any) -> None:
        _, opt = make(c)
        with pytest.raises((TypeError, ValueError), match=message):
            opt.save(tmp_path / "x", **(more if c.rank == 0 else {}))

    Threads.run(2, run)
    assert not (tmp_path / "x").exists() or not [*(tmp_path / "x").glob("save*")]


def test_without_parameters_they_stay(tmp_path):
    def run(c: Any) -> Any:
        params, opt = trained(c, "float32", "ordered", 1)
        opt.save(tmp_path, params=False)
        other, again = make(c)
        again.load(tmp_path)
        assert_same_bits(params, other.values(), numbers("float32", 0).values())
        return again.t

    assert Threads.run(2, run) == [1, 1]


def test_each_rank_reads_what_it_owns(tmp_path):
    """Not all of every shard."""
    n = 2**22

    def run(c: Any) -> int:
        p = np.zeros(n, np.float32)
        opt = Sharded(fused_adam.SGD, p, c, lr=1.0, bucket_elements=n)
        if not (tmp_path / "save-00000001").exists():
            opt.save(tmp_path)
        reads = []
        opt.load(tmp_path, progress=lambda done, total: reads.append((done, total)))
        return reads[-1]

    assert Threads.run(4, run) == [(2 * n, 2 * n)] * 4  # twice, a quarter of 4 n bytes


def test_the_function_of_checkpoint_says_what_to_use(tmp_path):
    _, opt = make(None)
    with pytest.raises(TypeError, match="a Sharded by its save"):
        checkpoint.save(tmp_path, opt)
