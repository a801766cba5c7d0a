"""The command line: its numbers, its exit codes, and what it does in a pipe, on a terminal and on Ctrl-C."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fused_adam
from fused_adam import _codegen, _rules
from fused_adam.backends import ON_GPU
from fused_adam.cli import console, demo, main, network, oracle, tasks, train, verify

AVAILABLE = [name for name, ok, _ in fused_adam.backends() if ok]
ON_CPU = [name for name in AVAILABLE if name not in ON_GPU]
UNAVAILABLE = [name for name, ok, _ in fused_adam.backends() if not ok]
COMMAND = [sys.executable, "-m", "fused_adam"]
PNG = b"\x89PNG\r\n\x1a\n"


def run(capsys, *argv):
    """status, stdout, stderr of the command in this process."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *argv):
    """status and the parsed document; NaN and Infinity are not JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    status, out, _ = run(capsys, *argv, "--json")
    return status, json.loads(out, parse_constant=refuse)


class Terminal:
    """A command whose stderr, and stdout unless piped, is a terminal."""

    def __init__(self, *argv, stdout=None, **env):
        self._master, slave = os.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            [*COMMAND, *argv],
            stdin=subprocess.DEVNULL,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment | env,
            # a parent that ignores Ctrl-C, as a background job does, would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(slave)
        self.text = ""

    def read(self, until=None):
        """Read what comes until the pattern is seen, or until the end."""
        while until is None or not re.search(until, self.text):
            try:
                data = os.read(self._master, 65536)
            except OSError:  # how Linux says that the last writer has gone
                data = b""
            if not data:
                assert until is None, f"{until} never came: {self.text}"
                os.close(self._master)
                return self.text
            self.text += data.decode()
        return self.text


# --- the command as a whole -------------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = "numba", "torch", "matplotlib", "rich", "sklearn", "plotext", "cupy"
    code = f"import sys, fused_adam.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("module", ["fused_adam", "fused_adam.cli"])
def test_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert {"info", "verify", "train", "kernel", "demo"} <= set(re.findall(r"^    (\w+) ", done.stdout, re.MULTILINE))
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["nothing"], "nothing"),
        (["kernel", "nothing"], "'adamw'"),
        (["train", "cats"], "digits"),
        (["train", "regression", "--rule", "nothing"], "adagrad"),
        (["train", "regression", "--dtype", "float16"], "float32"),
        (["train", "regression", "--backend", "nothing"], "numpy"),
        (["train", "regression", "--lr", "-1"], "lr should be at least 0"),
        (["train", "regression", "--lr", "nan"], "lr should be finite"),
        (["train", "regression", "--steps", "0"], "at least 1"),
        (["train", "regression", "--steps", "1", "--epochs", "1"], "not allowed"),
        (["train", "regression", "--seed", "-1"], "--seed"),
        (["train", "regression", "--plot", "loss.jpg"], ".png"),
        (["train", "regression", "--plot", "no/such/folder/loss.png"], "no/such/folder"),
        (["verify", "--size", "0"], "--size"),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_wrong(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.skipif(not UNAVAILABLE, reason="every backend is available here")
@pytest.mark.parametrize("argv", [["train", "regression"], ["verify"]])
def test_an_unavailable_backend_exits_3_with_its_reason(capsys, argv):
    name = UNAVAILABLE[0]
    status, out, err = run(capsys, *argv, "--backend", name)
    assert (status, out) == (3, "")
    assert next(why for n, _, why in fused_adam.backends() if n == name) in err


def test_a_reader_that_has_gone_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "kernel", "adam"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_before_there_is_a_result(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert run(capsys, "train", "regression") == (130, "", "fused-adam: interrupted\n")


# --- info, kernel -----------------------------------------------------------------------------------------------------


def test_info_reports_every_backend_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    status, out, _ = run(capsys, "info")
    assert status == 0
    for name, ok, _ in fused_adam.backends():
        assert re.search(rf"^{name} +{'yes' if ok else 'no'}\b", out, re.MULTILINE)
    assert re.search(rf"^numpy +{re.escape(np.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^OMP_WAIT_POLICY +passive$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_info_json(capsys):
    status, report = run_json(capsys, "info")
    assert status == 0
    assert [(b["name"], b["available"]) for b in report["backends"]] == [b[:2] for b in fused_adam.backends()]
    assert all(b["reason"] and b["fix"] for b in report["backends"] if not b["available"])
    assert report["versions"]["numpy"] == np.__version__
    if "numba" in AVAILABLE:
        assert report["threads"]["numba threading layer"] in ("tbb", "omp", "workqueue")


def test_info_does_not_import_torch():
    code = "import sys; from fused_adam.cli import main; main(['info', '--json']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("rule", _rules.RULES)
def test_kernel_prints_the_source_of_a_rule(capsys, rule):
    assert run(capsys, "kernel", rule) == (0, _codegen.cuda(rule), "")


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_this_machine_right(capsys):
    status, out, _ = run(capsys, "verify", "--size", 5000)
    assert status == 0
    assert "DIFFERENT" not in out
    assert len(AVAILABLE) == 1 or f"bit-identical on numpy, {', '.join(n for n in AVAILABLE if n != 'numpy')}" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("backend", AVAILABLE)
def test_verify_json_names_one_backend(capsys, backend):
    status, report = run_json(capsys, "verify", "--backend", backend, "--seed", 7, "--size", 300)
    assert status == 0
    assert report["right"] and not report["flush_to_zero"] and report["seed"] == 7
    assert report["backends"] == list(dict.fromkeys(["numpy", backend]))
    assert {r["rule"].split(",")[0] for r in report["results"]} == set(oracle.RULES)
    assert all(0 < r["update_ulps"] <= report["limit_ulps"] for r in report["results"])


@pytest.mark.parametrize("factor", [1.00001, np.nan])
def test_verify_catches_a_wrong_update(capsys, monkeypatch, factor):
    right = verify._step

    def wrong(case, inputs, t, backend):
        got = right(case, inputs, t, backend)
        if case.name == "adamw":
            got["p"] = (inputs["p"] + (got["p"] - inputs["p"]) * factor).astype(got["p"].dtype)
        return got

    monkeypatch.setattr(verify, "_step", wrong)
    status, out, _ = run(capsys, "verify", "--seed", 1, "--size", 300)
    assert status == 4
    assert re.findall(r"^WRONG: (.*), (float\d\d);", out, re.MULTILINE) == [("adamw", "float32"), ("adamw", "float64")]


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="only one backend is available")
def test_verify_catches_one_differing_bit(capsys, monkeypatch):
    right = verify._step

    def wrong(case, inputs, t, backend):
        got = right(case, inputs, t, backend)
        if (case.name, backend) == ("lion", AVAILABLE[0]):
            got["m"].view(np.uint8)[-4 if got["m"].itemsize == 4 else -8] ^= 1
        return got

    monkeypatch.setattr(verify, "_step", wrong)
    status, report = run_json(capsys, "verify", "--seed", 1, "--size", 300)
    assert status == 4
    different = [r["rule"] for r in report["results"] if not all(r["identical"].values())]
    assert different == ["lion", "lion"]


@pytest.mark.skipif(not shutil.which("gcc") or os.uname().machine != "x86_64", reason="needs gcc on x86-64")
def test_verify_sees_a_library_that_flushes_to_zero(tmp_path):
    """What a library built with -ffast-math does when it is loaded."""
    source, library = tmp_path / "fast.c", tmp_path / "fast.so"
    source.write_text(
        "__attribute__((constructor)) static void fast(void)"
        "{ __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = f"""
import ctypes, sys
from fused_adam.cli import main
ctypes.CDLL({str(library)!r})
sys.exit(main(["verify", "--size", "300", "--backend", "numpy"]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 4
    assert "flush-to-zero: ON" in done.stdout and "-ffast-math" in done.stdout


def test_the_oracle_is_independent():
    """It is also tests/reference.py; a common source would mean a common mistake."""
    imports = [n for n in ast.walk(ast.parse(Path(oracle.__file__).read_text())) if isinstance(n, ast.ImportFrom)]
    assert {n.module for n in imports} <= {"__future__", "collections.abc", "typing"}
    assert (Path(__file__).parent / "reference.py").read_bytes() == Path(oracle.__file__).read_bytes()


# --- train ------------------------------------------------------------------------------------------------------------


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


# --- terminals and pipes ----------------------------------------------------------------------------------------------

COLOUR = re.compile(r"\x1b\[[0-9;]*[39][0-7]m|\x1b\[[0-9;]*[34]8;")


@pytest.mark.parametrize("argv", [["info"], ["train", "regression", "--steps", "2000"]])
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_colour_only_on_a_terminal_that_wants_it(argv, env):
    pytest.importorskip("rich")
    terminal = Terminal(*argv, **env)
    text = terminal.read()
    assert terminal.process.wait() == 0
    assert bool(COLOUR.search(text)) == (not env)


def test_a_pipe_sees_only_results(capsys):
    done = subprocess.run([*COMMAND, "train", "regression", "--steps", "50"], capture_output=True, text=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert "steps/s" not in done.stdout
    assert len(done.stderr.splitlines()) == 1  # the summary, no progress


@pytest.mark.parametrize("plain", [False, True])
def test_progress_on_a_terminal(capsys, monkeypatch, plain):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if plain:
        monkeypatch.setitem(sys.modules, "rich", None)
    with console.progress(3) as update:
        for step in range(1, 4):
            update(step, 0.5)
    err = capsys.readouterr().err
    assert re.search("3/3", err)
    assert re.search(r"loss 0\.500000, [\d,]+ steps/s", err)


def test_plain_tables_wrap_at_80_columns(capsys):
    console.table("title", ["name", "text"], [["a", "word " * 40], ["long name", ""]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["title", "name       text"]
    assert all(len(line) <= 80 and line.startswith(" " * 11 + "word") for line in lines[3:-2])
    assert lines[-2:] == ["long name", ""]


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_shows_everything(capsys, monkeypatch, tmp_path):
    calls = []
    bench = SimpleNamespace(run=lambda argv, **_: calls.append(argv[1:]) or subprocess.CompletedProcess(argv, 0))
    monkeypatch.setattr(demo, "subprocess", bench)
    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "demo", "--plot", "demo.png")
    assert status == 0
    assert calls == [["-m", "fused_adam.bench", "--quick"]]
    assert Path("demo.png").read_bytes().startswith(PNG)
    for task in tasks.TASKS:
        assert f"{task}: the same losses on {' and '.join(ON_CPU)}" in out
    assert "┌" in out  # plotext's frame
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_demo_says_when_backends_disagree(capsys, monkeypatch, tmp_path):
    right = train.train

    def wrong(task, **options):
        result = right(task, steps=20, **options)
        if options["backend"] == ON_CPU[-1]:
            result.losses[-1] += 1e-9
        return result

    if len(ON_CPU) < 2:
        pytest.skip("only one backend is available")
    monkeypatch.setattr(train, "train", wrong)
    status, _, err = run(capsys, "demo", "--plot", tmp_path / "demo.png")
    assert status == 4
    assert "fused-adam verify" in err
