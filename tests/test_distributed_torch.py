"""Sharded steps on processes of torch.distributed with gloo, against the same on threads."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import require
from distributed_cases import FORMATS, digest, hashed, make, results, spawn, trained

import fused_adam
from fused_adam import checkpoint
from fused_adam.distributed import Alone, Sharded, Threads, TorchCollective

torch = require("torch")


def test_the_bits_of_threads(tmp_path):
    """One spawn for all numbers of ranks: `invariant` on all the same, `ordered` as threads, `fast` to rounding."""
    processes = spawn("bits", 4, tmp_path)
    forms = {form: Threads.run(1, lambda c, form=form: hashed(c, form, "invariant"))[0] for form in FORMATS}
    ordered = {
        (form, n): set(Threads.run(n, lambda c, form=form: hashed(c, form, "ordered", steps=5)))
        for form in ("float32", "bfloat16")
        for n in (1, 2, 4)
    }
    exact = {
        n: Threads.run(
            n, lambda c: np.concatenate([p.ravel() for p in trained(c, "float32", "ordered", 5)[0].values()])
        )
        for n in (1, 2, 4)
    }
    found = results(processes, tmp_path, [0, 1, 2, 3])
    for rank in range(4):
        for n in (1, 2, 4):
            if rank < n:
                for form, expected in forms.items():
                    assert found[rank][f"invariant {form} {n}"] == expected, (rank, n, form)
                for form in ("float32", "bfloat16"):
                    assert ordered[form, n] == {found[rank][f"ordered {form} {n}"]}, (rank, n, form)
                error = np.abs(np.array(found[rank][f"fast {n}"]) - exact[n][0])
                assert error.max() < 1e-6 * np.abs(exact[n][0]).max()

    def load(collective):
        params, opt = make(collective, mode="invariant", micro_batches=4)
        assert opt.load(tmp_path / "saved") == {"epoch": 3}
        return digest(opt, params)

    checkpoint.verify(tmp_path / "saved")
    assert {*Threads.run(2, load)} == {found[0]["saved"]}


def test_what_one_rank_refuses_all_refuse(tmp_path):
    zero, one = results(spawn("refusals", 2, tmp_path), tmp_path, [0, 1])
    for found in (zero, one):
        assert found["mode"].startswith("ValueError: no rank made an optimizer, because the ranks differ: rank 0 has ")
        assert found["mode"].endswith("mode = ordered where rank 1 of 2 has mode = fast")
        assert "'lr': 0.01" in found["lr"] and "'lr': 0.001" in found["lr"]
        assert found["unchanged"] == "True"
        assert found["t"] == "1"
    assert one["gradient"] == 'ValueError: grads["b"] has shape (8,) but the parameter has (7,)'
    assert zero["gradient"].startswith("ValueError: no rank stepped, because rank 1 of 2 raised ValueError: grads")


@pytest.mark.parametrize("case", ["killed", "hanging"])
def test_a_rank_that_goes_in_mid_step(case, tmp_path):
    """The others say so within the engine's time-out, and go no further; the last checkpoint is whole."""
    timeout = 4
    processes = spawn(case, 3, tmp_path, timeout)
    try:
        others = results(processes, tmp_path, [0, 2])
    finally:
        processes[1].kill()
        processes[1].communicate()
    for rank, found in zip((0, 2), others, strict=True):
        first, second = found["errors"]
        assert first.startswith(f"ConnectionError: rank {rank} of 3, at t = 2: all_")
        assert "failed, for a rank has died, hangs or was left behind" in first
        assert "go on from the last checkpoint" in first
        assert second.startswith("RuntimeError: ")
        assert found["seconds"] < 2 * timeout + 2
    checkpoint.verify(tmp_path / "saved")

    def load(collective):
        _, opt = make(collective)
        opt.load(tmp_path / "saved")
        return opt.t

    assert Threads.run(2, load) == [1, 1]


def test_without_a_group():
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialized; call .*init_process_group"):
        TorchCollective()


def test_processes_that_were_not_made_ranks(monkeypatch):
    """Each would train on its own, and nobody would notice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    p = np.ones(3, np.float32)
    with pytest.raises(RuntimeError, match=r"one of 2 processes \(WORLD_SIZE\), but no rank yet; call torch"):
        Sharded(fused_adam.SGD, p)
    Sharded(fused_adam.SGD, p, Alone()).step(p.copy())


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"need PyTorch: pip install 'fused-adam\[torch\]'"):
        TorchCollective()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_stepped_in_place(dtype):
    """Alone, without a group."""
    more = {"dtype": "bfloat16"} if dtype == torch.bfloat16 else {}
    p = [torch.ones(3, 4, dtype=dtype), torch.zeros(130, dtype=dtype)]
    opt = Sharded(fused_adam.SGD, p, lr=0.5, momentum=0.9, **more)
    opt.step([torch.ones(3, 4, dtype=dtype), torch.full((130,), 2.0, dtype=dtype)])
    assert opt.params is p
    assert (p[0] == 0.5).all() and (p[1] == -1).all()


def test_tensors_that_require_gradients_are_refused():
    with pytest.raises(BufferError, match="detach"):
        Sharded(fused_adam.SGD, [torch.ones(3, requires_grad=True)])
