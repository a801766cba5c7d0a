"""`fused-adam bench run`: what it refuses, who takes part, what it prints and writes, and how it ends."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from cli_cases import COMMAND, UNAVAILABLE, Terminal, run
from conftest import require
from fused_adam.bench import cases, check, machine, options, peers, race, results, timing
from fused_adam.bench import run as bench_run
from fused_adam.bench.problem import HYPER, Candidate, Problem, Skipped, bytes_per_parameter
from test_gpu_harness_device import pretended

FEW = ("--backend", "numpy", "--peers", "naive-numpy", "--quick")
SMALL = ("--sizes", "1000", *FEW)


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch):
    """The other tests of this process keep the libraries, and the threads, that they have; nobody waits for silence."""
    monkeypatch.setattr(cases, "prepare", lambda: None)
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "waited", lambda: None)


def bench(capsys, *argv):
    return run(capsys, "bench", "run", *argv)


def table_rows(out):
    """candidate: cells, of the last table that has it."""
    return {line.split("  ")[0]: line.split() for line in out.splitlines() if " us " in line or " ns " in line}


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2^20", [2**20]), ("1048576", [2**20]), ("2^16, 2^20,10^3", [2**16, 2**20, 1000]), ("7,7", [7])],
)
def test_sizes_are_numbers_or_powers(text, expected):
    assert options.counts(text) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "0"], "'0' is no number of elements"),
        (["--sizes", "2^"], "write 1048576 or 2^20"),
        (["--sizes", "-5"], "--sizes"),
        (["--sizes", "10,,20"], "no number of elements"),
        (["--sizes", "1e6"], "no number of elements"),
        (["--sizes", "100", "--tensors", "200"], "--sizes 100 is too small for 200 tensors"),
        (["--dtype", "float16"], "choose from float32, float64"),
        (["--rule", "nothing"], "adamw"),
        (["--backend", "nothing"], "numba-cuda"),
        (["--backend", "numpy,cupy"], "not all of one device"),
        (["--backend", ","], "--backend names none"),
        (["--peers", "nothing"], "torch-fused"),
        (["--mode", "warm"], "choose from e2e, cold, graph"),
        (["--mode", "graph", "--backend", "numpy"], "--mode graph needs a GPU"),
        (["--max-noise", "much"], "write 5 or 5%"),
        (["--timeout", "0"], "no number of seconds"),
        (["--json", "no/such/folder/x.json"], "no/such/folder"),
        (["--plot", "speed.jpg"], ".png"),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_wrong(capsys, argv, message):
    status, out, err = bench(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


@pytest.mark.parametrize("size", ["2^50", "123456789012345678", "2^999"])
def test_an_impossible_size_is_refused_before_anything_is_allocated(capsys, monkeypatch, size):
    monkeypatch.setattr(race, "Problem", None)
    status, out, err = bench(capsys, "--sizes", f"2^10,{size}", *FEW)
    assert (status, out) == (2, "")
    needed = 84 * options.counts(size)[0]
    assert f"needs {needed:,} bytes, 84 an element" in err
    assert int(re.search(r"([\d,]+) are free", err)[1].replace(",", "")) < needed


@pytest.mark.skipif(not UNAVAILABLE, reason="every backend is available here")
def test_an_absent_backend_that_was_named_exits_3(capsys):
    status, out, err = bench(capsys, "--backend", UNAVAILABLE[0])
    assert (status, out) == (3, "")
    assert f"backend {UNAVAILABLE[0]!r} is not available" in err


@pytest.mark.parametrize(
    ("absent", "expected"),
    [((), ["cupy", "numba-cuda"]), (("numba-cuda",), ["cupy"]), (("cupy", "numba"), ["numpy"])],
)
def test_without_a_name_all_backends_of_one_device_take_part(monkeypatch, absent, expected):
    monkeypatch.setattr(bench_run, "reason", lambda name: "absent" if name in absent else "")
    assert bench_run._backends(None) == expected


@pytest.mark.parametrize("argv", [["bench", "--help"], ["bench", "run", "--help"]])
def test_help_fits(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80


def test_other_commands_do_not_load_the_benchmark():
    code = "import sys, fused_adam.cli as c; c.main(['kernel', 'sgd']); sys.exit('fused_adam.bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench_run, "on_cpu", None)
    status, out, _ = bench(capsys, "--list")
    assert status == 0
    assert re.search(r"^fused_adam numpy +ours +yes$", out, re.MULTILINE)
    assert re.search(r"^naive-numpy +peer +yes$", out, re.MULTILINE)
    assert {line.split("  ")[0] for line in out.splitlines()} >= {*peers.PEERS, "memory roof"}
    assert max(map(len, out.splitlines())) <= 80


# --- what is timed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtype", "expected"),
    [("adamw", "float32", 28), ("adam", "float64", 56), ("sgd", "float32", 12), ("lion", "float32", 20),
     ("amsgrad", "float32", 36)],
)  # fmt: skip
def test_bytes_of_a_parameter(rule, dtype, expected):
    assert bytes_per_parameter(rule, dtype) == expected


def test_tensors_share_the_elements_and_one_memory():
    x = Problem(1003, tensors=10, dtype="float64", rule="amsgrad")
    assert [a.size for a in x.params.tree] == [101] * 3 + [100] * 7
    assert set(x.states) == {"m", "v", "max_v"}
    before = x.host("p")
    cases.ours("numpy")(x)()
    assert all((a != b).all() for a, b in zip(before, x.params.tree, strict=True))
    x.draw()
    assert all((a == b).all() for a, b in zip(before, x.params.tree, strict=True))


def everybody(tensors):
    mine = [c for backend in ("numpy", "numba") for c in cases.candidates(backend, tensors, on_gpu=False)]
    return [c for c in [*mine, *peers.PEERS.values()] if not c.missing]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", HYPER)
def test_everybody_passes_the_check(rule, dtype):
    checked = 0
    for tensors in (1, 3):
        for candidate in everybody(tensors):
            try:
                assert check.wrong(candidate, Problem(2500, tensors, dtype, rule)) == "", candidate.name
                checked += 1
            except Skipped:
                assert candidate.kind == "peer"
    assert checked >= 4


def _planted(fault):
    """The textbook's step, and then a fault in what it did to p."""

    def build(x):
        right = peers.textbook(x)

        def step():
            before = x.p.copy()
            right()
            x.p[...] = before + fault(x.p - before)

        return step

    return Candidate("naive-numpy", build)


def _no_tail(update):
    return np.where(np.arange(update.size) == update.size - 1, 0, update)


def _forgets(x):
    """Each step is the first."""

    def step():
        fresh = Problem(x.n, x.tensors, x.dtype.name, x.rule)
        fresh.p[...] = x.p
        peers.textbook(fresh)()
        x.p[...] = fresh.p

    return step


@pytest.mark.parametrize(
    "candidate",
    [
        _planted(lambda update: update * np.float32(1.01)),
        _planted(lambda update: update * np.float32(np.nan)),
        _planted(_no_tail),
        Candidate("naive-numpy", _forgets),
    ],
    ids=["1 % too far", "NaN", "without the last element", "forgets its state"],
)
def test_a_wrong_candidate_is_not_timed_and_exits_4(capsys, monkeypatch, tmp_path, candidate):
    monkeypatch.setitem(peers.PEERS, "naive-numpy", candidate)
    file = tmp_path / "bench.json"
    status, out, err = bench(capsys, *SMALL, "--check", "--json", file)
    assert status == 4
    assert "naive-numpy at 1,000 is wrong" in err
    assert "naive-numpy" not in table_rows(out) and "fused_adam numpy" in table_rows(out)
    (row,) = [row for row in results.load(file).rows if row.candidate == "naive-numpy"]
    assert row.status.startswith("wrong: ") and "% of the update" in row.status and row.samples == []


def test_without_check_nobody_is_held_against_the_oracle(capsys, monkeypatch):
    monkeypatch.setattr(check, "wrong", None)
    assert bench(capsys, *SMALL)[0] == 0


def test_peers_that_cannot_take_part_say_why(capsys, monkeypatch):
    def broken(x):
        raise OSError("no compiler")

    for name, candidate in {
        "optax": Candidate("optax", peers.optax, ("no_such_jax", "no_such_optax")),
        "deepspeed": Candidate("deepspeed", broken),
        "flashoptim": Candidate("flashoptim", peers.flashoptim),
    }.items():
        monkeypatch.setitem(peers.PEERS, name, candidate)
    argv = ("--sizes", "1000", "--backend", "numpy", "--peers", "optax,deepspeed,flashoptim,naive-numpy", "--quick")
    status, out, _ = bench(capsys, *argv)
    assert status == 0
    assert "optax: skipped: no_such_jax and no_such_optax not installed" in out
    assert "deepspeed: skipped: OSError: no compiler" in out
    assert "flashoptim: skipped: it needs a GPU" in out
    assert "naive-numpy" in table_rows(out)


def test_torch_and_ours_side_by_side(capsys):
    require("torch")
    argv = ("--sizes", "1000", "--tensors", "1,7", "--peers", "torch-fused,torch-foreach", "--quick", "--check")
    status, out, _ = bench(capsys, *argv)
    assert status == 0
    assert {"torch-fused", "torch-foreach", "fused_adam numpy", "fused_adam numpy list"} <= set(table_rows(out))


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_table_and_the_files(capsys, tmp_path):
    argv = [f"--{kind}={tmp_path}/bench.{kind}" for kind in ("json", "csv", "md")]
    argv += [f"--plot={tmp_path}/bench.png", "--sizes", "1000,2^11", "--tensors", "1,2", *FEW]
    status, out, err = bench(capsys, *argv)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert "28 bytes a parameter" in out
    assert "naive-numpy" in table_rows(out)
    assert max(map(len, out.splitlines()[1:])) <= 80

    report = results.load(tmp_path / "bench.json")
    assert (report.on, report.interrupted, report.revision) == ("cpu", False, machine.revision())
    assert report.rates["copy"] > 0
    assert {"versions", "threads", "processor"} <= set(report.environment)
    ours = [row for row in report.rows if row.kind == "ours"]
    assert {(row.size, row.tensors) for row in ours} == {(1000, 1), (2048, 1), (1000, 2), (2048, 2)}
    assert {row.candidate for row in ours} == {"fused_adam numpy", "fused_adam numpy list"}
    assert all(row.backend == "numpy" and 3 <= len(row.samples) <= 7 for row in ours)
    with open(tmp_path / "bench.csv") as lines:
        assert len(list(csv.DictReader(lines))) == len(report.rows)
    assert "| fused_adam numpy |" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_json_on_stdout_is_alone_there(capsys, tmp_path):
    status, out, _ = bench(capsys, *SMALL, "--json", "-")
    assert status == 0
    file = tmp_path / "bench.json"
    file.write_text(out)
    assert {row.candidate for row in results.load(file).rows} >= {"fused_adam numpy", "naive-numpy"}


def test_only_a_checkout_has_a_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "fused_adam" / "bench" / "machine.py"))
    assert machine.revision() == ""


@pytest.mark.parametrize(("most", "status"), [("0%", 1), ("1000000", 0)])
def test_max_noise(capsys, most, status):
    found, _, err = bench(capsys, *SMALL, "--max-noise", most)
    assert found == status
    assert ("has a spread of" in err) == bool(status)


def test_cold_is_slower_than_warm(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(race, "_FLUSH_BYTES", 2**26)
    file = tmp_path / "bench.json"
    argv = ("--sizes", "2^16", "--mode", "e2e,cold", "--backend", "numpy", "--peers", "", "--quick", "--json", file)
    assert bench(capsys, *argv)[0] == 0
    warm, cold = (row.median for row in results.load(file).rows if row.kind == "ours")
    assert cold > warm


def test_a_gpu_that_is_not_there(capsys, monkeypatch, tmp_path):
    """That the code is free of slips; what the times mean only a GPU can tell."""
    file = tmp_path / "bench.json"
    with pretended(monkeypatch) as cupy:
        cupy.cuda.runtime.deviceGetAttribute = lambda attribute, device: {36: 3_201_000, 37: 6144}[attribute]
        cupy.cuda.runtime.getDeviceProperties = lambda device: {"name": b"NVIDIA H200"}
        argv = ("--sizes", "5000", "--tensors", "1,2", "--mode", "e2e,cold,graph", "--quick", "--check")
        status, out, err = bench(capsys, *argv, "--backend", "cupy", "--peers", "naive-numpy", "--json", file)
    assert (status, err) == (0, "")
    assert "naive-numpy: skipped: it steps over arrays in host memory" in out
    report = results.load(file)
    assert (report.device, report.on) == ("NVIDIA H200", "cuda")
    assert set(report.rates) == {"copy", "peak", "roof"}
    found = {(row.mode, row.tensors, row.candidate): row for row in report.rows if row.status == "ok"}
    modes, flat = ("e2e", "cold", "graph"), ("fused_adam cupy", "memory roof")
    both = {(mode, tensors, name) for mode in modes for tensors in (1, 2) for name in flat}
    assert set(found) == both | {(mode, 2, "fused_adam cupy list") for mode in modes[:2]}
    assert all(bool(row.host) == (mode == "e2e") for (mode, _, _), row in found.items())
    assert found["e2e", 1, "fused_adam cupy"].launches == 1


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_timeout_ends_the_measuring_and_writes_what_there_is(capsys, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(race, "measure", lambda *a, **k: now.__setitem__(0, now[0] + 10) or timing.measure(*a, **k))
    monkeypatch.setattr(bench_run.time, "perf_counter", lambda real=timing.time.perf_counter: real() + now[0])
    file = tmp_path / "bench.json"
    status, out, err = bench(capsys, "--sizes", "1000,2000,3000", *FEW, "--timeout", "25", "--json", file)
    assert status == 0
    assert "--timeout: 2 of 3 cases were measured" in err  # the copy's rate takes a turn, too
    assert {row.size for row in results.load(file).rows} == {1000, 2000}
    assert "3,000" not in out


def test_ctrl_c_keeps_the_rounds_that_were_complete(capsys, monkeypatch, tmp_path):
    taken, real = [], timing._sample

    def sample(*arguments):
        taken.append(1)
        if len(taken) == 5 + 4 * 3 + 2:  # the copy's, four rounds of three, and not quite a fifth
            raise KeyboardInterrupt
        return real(*arguments)

    require("numba")
    monkeypatch.setattr(timing, "_sample", sample)
    file = tmp_path / "bench.json"
    status, out, err = bench(capsys, *SMALL, "--json", file)
    assert status == 130
    assert "interrupted; 1 of 1 cases were measured" in err
    report = results.load(file)
    assert report.interrupted
    assert {row.candidate: len(row.samples) for row in report.rows} == {
        "fused_adam numpy": 4, "naive-numpy": 4, "memory roof": 4,
    }  # fmt: skip
    assert "naive-numpy" in table_rows(out)


def test_a_real_ctrl_c_with_progress(tmp_path):
    file = tmp_path / "bench.json"
    argv = ("bench", "run", "--sizes", "1000,2^20", "--backend", "numpy", "--peers", "naive-numpy", "--json", str(file))
    terminal = Terminal(*argv, stdout=subprocess.PIPE)
    terminal.read(until=r"2\^20, 2 of 2: round \d+ of \d+, about \d+ s left")
    terminal.process.send_signal(signal.SIGINT)
    err = terminal.read()
    out = terminal.process.communicate(timeout=60)[0].decode()
    assert terminal.process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert "naive-numpy" in out and "\x1b" not in out
    report = results.load(file)
    assert report.interrupted and {row.size for row in report.rows} == {1000, 2**20}


@pytest.mark.parametrize("command", [[*COMMAND, "bench", "run"], [sys.executable, "-m", "fused_adam.bench"]])
def test_quick_as_a_process(command):
    argv = ["--quick", "--sizes", "1000", "--peers", "naive-numpy", "--backend", "numpy", "--json", "-"]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["kind"] == results.KIND


def test_the_targets_are_still_there(capsys, monkeypatch):
    from fused_adam.bench import __main__, ratios

    require("torch")
    require("numba")
    tiny = replace(ratios.EXPERIMENTS[4], rounds=3, targets=())
    one = replace(ratios.EXPERIMENTS[2], build=ratios._one(1000, cases.NUMBA, cases.TORCH_FUSED), rounds=3)
    monkeypatch.setattr(ratios, "EXPERIMENTS", (tiny, one))
    monkeypatch.setattr(__main__, "prepare", lambda: None)
    assert __main__.main(["--ratios"]) in (0, 1)
    assert "fused_adam numba" in capsys.readouterr().out
