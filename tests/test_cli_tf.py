"""`fused-adam train --style tf`: the founding network through AdamOptimizer.minimize."""

from __future__ import annotations

import json
import sys

import fake_cupy
import numpy as np
import pytest
from conftest import BACKENDS

from fused_adam.backends import reason
from fused_adam.cli import main, tasks
from fused_adam.tf import AdamOptimizer

AVAILABLE = [name for name in BACKENDS if not reason(name)]


def train(capsys, *argv):
    """status, stdout, stderr."""
    return (main(["train", *map(str, argv)]), *capsys.readouterr())


def train_json(capsys, *argv):
    status, out, _ = train(capsys, *argv, "--json")
    assert status == 0
    return json.loads(out)


def test_the_founding_example_learns(capsys):
    result = train_json(capsys, "regression", "--style", "tf")
    losses = np.array(result["losses"])
    assert (result["style"], result["rule"], result["steps"]) == ("tf", "adam", 1000)
    assert (np.diff(losses.reshape(20, 50).mean(axis=1)) < 0).all()
    assert result["final_loss"] < 0.05 * losses[0]


def test_losses_are_those_of_the_flat_style_but_for_epsilon(capsys):
    """It is scaled by sqrt(1 - beta2**t) there, so steps differ by up to epsilon / sqrt(v) of themselves."""
    by_style = {
        style: train_json(capsys, "regression", "--rule", "adam", "--dtype", "float64", "--style", style)
        for style in ("flat", "tf")
    }
    flat, tf = (np.array(by_style[style]["losses"]) for style in ("flat", "tf"))
    assert by_style["flat"]["style"] == "flat"
    assert flat[0] == tf[0]  # the loss of before the step
    np.testing.assert_allclose(tf[:50], flat[:50], rtol=1e-5)  # a step 1 % too long shows at once: 7e-4
    np.testing.assert_allclose(tf, flat, rtol=2e-3)
    assert not np.array_equal(tf[1:], flat[1:])


def test_every_step_is_one_of_minimize(capsys, monkeypatch):
    calls = []
    right = AdamOptimizer.minimize

    def counted(self, loss_and_grads, var_list, *others):
        calls.append(self.learning_rate)
        assert [v.shape for v in var_list] == [(10, 10), (10,), (10, 1), (1,)]
        return right(self, loss_and_grads, var_list, *others)

    monkeypatch.setattr(AdamOptimizer, "minimize", counted)
    train_json(capsys, "regression", "--style", "tf", "--steps", 4, "--lr", 0.1)
    np.testing.assert_allclose(calls, [0.1, 0.075, 0.05, 0.025])  # falling linearly to zero


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_backend_prints_the_same_numbers(capsys, task):
    argv = [task, "--style", "tf", "--epochs", 5, "--backend"]
    printed = {train(capsys, *argv, name)[:2] for name in AVAILABLE}
    assert len(printed) == 1
    status, out = printed.pop()
    assert status == 0
    assert "\nadam, TensorFlow style, lr 0.01, " in out
    results = [train_json(capsys, *argv, name) for name in AVAILABLE]
    assert [r["backend"] for r in results] == AVAILABLE


def test_on_a_gpu_that_is_not_there_it_prints_the_numbers_of_the_cpu(capsys, monkeypatch):
    argv = ["regression", "--style", "tf", "--steps", 30]
    expected = train_json(capsys, *argv, "--backend", "numpy")
    with fake_cupy.installed(monkeypatch), monkeypatch.context() as patch:
        fake_cupy.allow_arithmetic(patch)
        result = train_json(capsys, *argv, "--device", "cuda")
        assert [name for name, *_ in fake_cupy.launches] == ["adam_f32"] * 30
    assert (result["device"], result["backend"], result["losses"]) == ("cuda", "cupy", expected["losses"])


def test_digits_too(capsys):
    assert train_json(capsys, "digits", "--style", "tf", "--epochs", 10)["test_accuracy"] > 0.93


def test_the_flat_style_prints_what_it_did(capsys):
    _, out, _ = train(capsys, "regression", "--steps", 5)
    assert "\nadam, lr 0.01, batches of 1000, float32, seed 0\n" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--style", "tf", "--rule", "lion"], "--style tf is Adam's; use --rule adam, or leave out --style for lion"),
        (["--style", "tf", "--rule", "adamw"], "use --rule adam"),
        (["--style", "keras"], "flat"),
        (["--style", "tf", "--lr", "-1"], "learning_rate should be at least 0"),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_wrong(capsys, argv, message):
    status, out, err = train(capsys, "regression", *argv)
    assert (status, out) == (2, "")
    assert message in err


def test_a_backend_that_cannot_run_exits_3(capsys, monkeypatch):
    """Here because it is none for host memory, or because there is no GPU."""
    monkeypatch.setattr(sys.modules["fused_adam.backends"], "OVERRIDE", "numba-cuda")
    status, out, err = train(capsys, "regression", "--style", "tf")
    assert (status, out) == (3, "")
    assert "FUSED_ADAM_BACKEND 'numba-cuda'" in err
