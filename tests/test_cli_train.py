"""`fused-adam train`: its numbers, its plots, and what is left of it after Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli_cases import ON_CPU, PNG, Terminal, run, run_json

import fused_adam
from fused_adam.cli import network, tasks


@pytest.mark.parametrize("loss", [network.squared_error, network.cross_entropy])
def test_gradients_are_the_differences_of_the_loss(rng, loss):
    params = fused_adam.flatten(network.initial((5, 4, 3), rng, np.float64))
    grads = params.zeros_like()
    x, y = rng.standard_normal((7, 5)), np.eye(3)[rng.integers(0, 3, 7)]
    network.backward(params, grads, x, y, loss)
    for name in ("W1", "b1", "W2", "b2"):
        numeric = np.zeros_like(grads[name])
        for k in np.ndindex(numeric.shape):
            values = []
            for h in (1e-6, -2e-6):
                params[name][k] += h
                values.append(loss(network.forward(params, x)[1], y)[0])
            params[name][k] += 1e-6
            numeric[k] = (values[0] - values[1]) / 2e-6
        assert np.abs(numeric - grads[name]).max() < 1e-8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_backend_prints_the_same_numbers(capsys, task, dtype):
    printed = {
        run(capsys, "train", task, "--epochs", 5, "--seed", 3, "--dtype", dtype, "--backend", name)[:2]
        for name in ON_CPU
    }
    assert len(printed) == 1
    status, out = printed.pop()
    assert status == 0
    assert len(re.findall(r"^\d+ +\d\.\d{8}", out, re.MULTILINE)) >= 5
    assert "\x1b" not in out


@pytest.mark.parametrize("seed", range(5))
def test_digits_reach_97_percent(capsys, seed):
    status, result = run_json(capsys, "train", "digits", "--seed", seed)
    assert status == 0
    assert result["test_accuracy"] >= 0.97
    assert (result["rule"], result["steps"], len(result["losses"])) == ("adamw", 1350, 1350)


@pytest.mark.parametrize("rule", tasks.RULES)
def test_the_regression_loss_falls_steadily(capsys, rule):
    status, result = run_json(capsys, "train", "regression", "--rule", rule)
    losses = np.array(result["losses"])
    assert status == 0
    assert len(losses) == 1000
    assert (np.diff(losses.reshape(20, 50).mean(axis=1)) < 0).all()
    assert (np.diff(losses) < 0).mean() > 0.99
    assert result["final_loss"] < 0.05 * losses[0]


@pytest.mark.parametrize("rule", tasks.RULES)
def test_every_rule_learns_digits(capsys, rule):
    _, result = run_json(capsys, "train", "digits", "--rule", rule, "--epochs", 10)
    assert result["test_accuracy"] > 0.93


@pytest.mark.parametrize(
    ("argv", "batch", "steps"),
    [
        (["digits", "--epochs", 1], 32, 45),  # 1,438 samples, the last batch is short
        (["digits", "--steps", 7, "--batch", 100], 100, 7),
        (["regression", "--steps", 7], 1000, 7),
        (["regression", "--epochs", 2, "--batch", 300], 300, 8),
        (["regression", "--epochs", 2, "--batch", 9999], 1000, 2),
    ],
)
def test_steps_epochs_and_batches(capsys, argv, batch, steps):
    status, result = run_json(capsys, "train", *argv)
    assert status == 0
    assert (result["batch"], result["steps"], len(result["losses"])) == (batch, steps, steps)
    assert result["points"][-1]["step"] == steps


def test_a_loss_that_overflows_exits_1_and_is_null_in_json(capsys):
    status, result = run_json(capsys, "train", "regression", "--rule", "sgd", "--lr", 1e30)
    assert status == 1
    assert result["losses"][-1] is None
    status, _, err = run(capsys, "train", "regression", "--rule", "sgd", "--lr", 1e30)
    assert status == 1
    assert "try a lower --lr" in err


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_plot_is_a_png(capsys, tmp_path, task):
    path = tmp_path / "loss.png"
    assert run(capsys, "train", task, "--epochs", 2, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("missing", "argv"),
    [
        ("sklearn", ["train", "digits"]),
        ("matplotlib", ["train", "regression", "--plot", "loss.png"]),
    ],
)
def test_a_missing_package_exits_1_with_the_fix(capsys, monkeypatch, missing, argv):
    for name in [n for n in sys.modules if n.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert "pip install" in err


@pytest.mark.parametrize("form", ["table", "json"])
def test_ctrl_c_saves_what_there_is_and_exits_130(tmp_path, form):
    path = tmp_path / "loss.png"
    argv = ["train", "regression", "--steps", "10000000", "--plot", path, *(["--json"] if form == "json" else [])]
    terminal = Terminal(*argv, stdout=subprocess.PIPE)
    terminal.read(until=r"steps/s")
    terminal.process.send_signal(signal.SIGINT)
    err = terminal.read()
    out = terminal.process.communicate(timeout=60)[0].decode()
    assert terminal.process.returncode == 130
    done = int(re.search(r"interrupted after ([\d,]+) of 10,000,000 steps", err)[1].replace(",", ""))
    assert done > 0
    assert path.read_bytes().startswith(PNG)
    if form == "json":
        result = json.loads(out)
        assert result["interrupted"] and result["steps"] == len(result["losses"]) == done
        assert result["points"][-1]["step"] == done
    else:
        assert re.search(rf"^{done:,} +\d\.\d{{8}}$", out, re.MULTILINE)
