"""`train --distributed`: alone, under torchrun, and without what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

import fused_adam
from fused_adam.cli import main, ranks, tasks, train
from fused_adam.distributed import Threads

DIGITS = ["train", "digits", "--distributed", "--epochs", "1"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fused_adam.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_torchrun_prints_what_one_process_prints():
    """Nothing but that, and once."""
    require("torch")
    require("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fused_adam", *DIGITS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "45 steps in" in done.stderr and ", 2 ranks" in done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "fused_adam", *DIGITS], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == alone.stdout
    assert float(done.stdout.splitlines()[-2].split()[2]) > 90  # % of the digits that it has not seen


@pytest.mark.parametrize("rule", ["momentum", "amsgrad"])
def test_any_number_of_ranks_trains_the_same(rule):
    """Also batches that do not divide by the number of micro-batches, or have fewer samples than that."""

    def run(n: int, batch: int) -> list[object]:
        options = {"rule": rule, "steps": 12, "batch": batch}
        found = Threads.run(n, lambda c: train.train(tasks.TASKS["regression"], collective=c, **options))
        assert {result.ranks for result in found} == {n}
        return [(result.losses, result.points) for result in found]

    for batch in (1000, 30, 5):
        expected = run(1, batch)
        assert run(2, batch) == 2 * expected and run(8, batch) == 8 * expected
        plain = train.train(tasks.TASKS["regression"], rule=rule, steps=12, batch=batch)
        assert expected[0][0] == pytest.approx(plain.losses, rel=1e-3)


def test_json_says_how_many_there_are(capsys):
    assert main(["train", "regression", "--distributed", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 1


@pytest.mark.parametrize(
    ("argv", "size", "status", "message"),
    [
        (["--style", "tf"], "1", 2, "--distributed is for the CPU and --style flat"),
        (["--device", "cuda"], "1", 2, "leave out --style and --device"),
        ([], "3", 2, "--distributed runs on 1, 2, 4 or 8 processes, got 3"),
        (["--lr", "-1"], "1", 2, "lr should be at least 0"),
    ],
)
def test_usage(argv, size, status, message, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["train", "regression", "--distributed", "--steps", "1", *argv]) == status
    assert message in capsys.readouterr().err


def test_without_torch(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for module in ("torch", "torch.distributed"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "regression", "--distributed"]) == 3
    assert "torchrun needs PyTorch: pip install 'fused-adam[torch]'" in capsys.readouterr().err
    assert ranks.MICRO_BATCHES == 8


def test_a_rank_that_is_lost_ends_the_training(capsys, monkeypatch):
    def lost(*_: object) -> None:
        raise ConnectionError("rank 1 has died")

    monkeypatch.setattr(ranks.Ranks, "step", lost)
    assert main(["train", "regression", "--distributed", "--steps", "1"]) == 1
    assert "fused-adam: rank 1 has died" in capsys.readouterr().err
