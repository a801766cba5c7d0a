"""The command line: its exit codes, and what it does in a pipe, on a terminal and on Ctrl-C."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_cases import AVAILABLE, COMMAND, ON_CPU, PNG, UNAVAILABLE, Terminal, run, run_json

import fused_adam
from fused_adam import _codegen, _rules
from fused_adam.cli import console, demo, tasks, train

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
