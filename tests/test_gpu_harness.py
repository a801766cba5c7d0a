"""`make gpu` without a GPU: its bits on a pretended one, and what becomes of crashes, time-outs and wrong bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from fused_adam.bench.gpu import (
    arrays,
    bits,
    bits_api,
    record,
    session,
    stages,
    worker,
)
from fused_adam.bench.gpu.journal import Journal
from fused_adam.bench.gpu.worker import Case, Different

import fused_adam

ABOUT = {"device": {"name": "NVIDIA H200"}, "versions": {}, "installed": "no"}
F32 = np.float32


@pytest.fixture
def cupy(monkeypatch):
    with fake_cupy.installed(monkeypatch) as module:
        yield module


def outcome(run):
    return worker._outcome(Case("it", run))


# --- bits -------------------------------------------------------------------------------------------------------------


def some_bits(part):
    """A few of each kind, and small."""
    backend = part.removeprefix("bits-")
    bits.SIZES, bits.ALONE = (0, 1, 2, 3, 5, 40, 127, 2049, 4100), (1, 4099)
    names = "adamw float32", "sgd float32", "class own rule float32", "class AdamW float64", "adamw_step float32"
    names += "1 segments float32", "2 segments float64", "groups of several rules and dtypes"
    names += "states to the host and back", "no memory for states", "rows own rule, own t float32"
    names += "guarded AdamW all float32", "guarded own rule all float64"
    found = [case for case in bits.cases(backend) if case.name in names]
    lib = arrays.library(backend)
    found.append(Case("20 steps", lambda: bits_api.steps_case(lib, backend, F32, 20)))
    return found


def test_bits_on_a_pretended_gpu(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "SIZES", ())  # `some_bits` sets them; they are put back
    monkeypatch.setattr(bits, "ALONE", ())
    journal = Journal(tmp_path / "journal")
    assert worker.work("bits-cupy", "0/1", some_bits, journal, 0, time.monotonic() + 200) == 0
    found = record.outcomes(journal.read(), "bits-cupy")
    assert len(found) == 14 and [e for e in found if e["status"] != "ok"] == []
    assert {name for name, *_ in fake_cupy.launches} >= {"adamw_f32", "adamw_f64", "sgd_f32", "clipped_rows_f32"}


def test_the_whole_list_of_bits(cupy):
    names = [case.name for case in bits.cases("cupy")]
    assert len(names) == len(set(names)) > 130
    for variant in bits.shared().VARIANTS:
        for dtype in ("float32", "float64"):
            assert f"{bits.shared().variant_id(variant)} {dtype}" in names
    assert any("late gradient" in name for name in names[:25]), "the most telling come first"


def test_a_backend_that_cannot_run_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "reason", lambda name: "no driver")
    journal = Journal(tmp_path / "journal")
    assert worker.work("bits-cupy", "0/2", worker.cases, journal, 0, time.monotonic() + 60) == 0
    assert [(e["status"], e["reason"]) for e in journal.read()] == [("skipped", "no driver")]


def test_same():
    a = np.array([1.0, np.nan, -0.0, np.inf] * 1000, F32)
    b = a.copy()
    b.view(np.uint32)[1] ^= 1  # another NaN
    arrays.same("a", a, b)
    for k, other in ((2, 0.0), (3999, np.nan), (0, np.nextafter(F32(1), F32(2)))):
        c = b.copy()
        c[k] = other
        with pytest.raises(Different, match=f"what: 1 of 4000 differ, the first at {k}"):
            arrays.same("what", a, c)
    with pytest.raises(Different, match="against"):
        arrays.same("what", a, a.astype(np.float64))


def test_the_bridge(monkeypatch):
    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(np, "row_stack", raising=False)
    assert arrays.bridge() == "" and not hasattr(np, "row_stack")
    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: 1)
    monkeypatch.setattr(arrays.importlib.metadata, "version", lambda name: "0.30.4")
    try:
        assert arrays.bridge().startswith("numpy.row_stack = numpy.vstack for numba-cuda 0.30.4 under NumPy")
        assert vars(np)["row_stack"] is np.vstack
    finally:
        vars(np).pop("row_stack", None)


# --- stages -----------------------------------------------------------------------------------------------------------

TOY = """
import os, sys, time
from fused_adam.bench.gpu import worker
from fused_adam.bench.gpu.worker import Case, Different, Skipped

def error(kind):
    raise kind("because")

KINDS = {
    "fine": Case("fine", lambda: {"note": 7}),
    "wrong": Case("wrong", lambda: error(Different)),
    "skip": Case("skip", lambda: error(Skipped)),
    "broken": Case("broken", lambda: error(RuntimeError)),
    "crash": Case("crash", lambda: os._exit(3)),
    "hang": Case("hang", lambda: time.sleep(60), limit=0.1),
    "slow": Case("slow", lambda: time.sleep(60)),
    "last": Case("last", lambda: None),
}
make = lambda part: [KINDS[name] for name in part.split()]
sys.exit(worker.main(sys.argv[1:], make))
"""


def staged(tmp_path, part, shards=1, seconds=30.0, script=TOY):
    """Status and reason of each case of a stage in processes of its own, and all entries."""
    journal = Journal(tmp_path / "journal")
    stage = stages.Stage("toys", seconds, ((part, shards),))
    stages.run(stage, [sys.executable, "-c", script], journal, tmp_path / "log", time.monotonic() + seconds)
    entries = journal.read()
    return {e["case"]: (e["status"], e.get("reason", "")) for e in record.outcomes(entries, part)}, entries


def test_a_crash_a_hang_and_an_error_cost_one_case_each(tmp_path):
    found, entries = staged(tmp_path, "crash fine broken hang wrong skip last", shards=2)
    assert found["fine"] == ("ok", "") and found["last"] == ("ok", "")
    assert found["wrong"] == ("different", "because") and found["skip"] == ("skipped", "because")
    assert found["broken"] == ("failed", "RuntimeError: because")
    assert found["crash"] == ("failed", "its process ended with status 3")
    assert found["hang"] == ("failed", "its process ended with status 1")
    assert len(found) == 7 and entries[-1]["stage"] == "toys"
    log = (tmp_path / "log").read_text()
    assert "Timeout (0:00:00.1" in log and "RuntimeError: because" in log and "from case 1" in log


def test_when_time_is_up(tmp_path, monkeypatch):
    """Once the second case is under way the stage's time is up, whatever the clock of this machine says."""
    started = '"case": "slow", "number": 1, "status": "started"'
    journal = tmp_path / "journal"

    def monotonic():
        return 1e18 if journal.exists() and started in journal.read_text() else 0.0

    monkeypatch.setattr(stages, "time", SimpleNamespace(sleep=time.sleep, monotonic=monotonic))
    found, _ = staged(tmp_path, "fine slow last")
    assert found["fine"] == ("ok", "") and found["last"] == ("dropped", "it ran past the stage's time")
    assert found["slow"] == ("failed", "it ran past the stage's time")


def test_no_case_starts_late(tmp_path):
    found, _ = staged(tmp_path, "fine last", seconds=0.0)
    assert set(found.values()) == {("dropped", "the stage's time was up")}


def test_processes_that_never_get_to_a_case(tmp_path):
    found, _ = staged(tmp_path, "fine", script="import sys; sys.exit(9)")
    assert found == {"start": ("failed", "the process ended with status 9 before its first case")}
    (tmp_path / "journal").unlink()
    found, _ = staged(tmp_path, "nonsense")
    assert found == {"start": ("failed", "KeyError: 'nonsense'")}


def test_a_line_that_was_cut_short(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.write(case="a", x=1)
    with open(journal.path, "a") as file:
        file.write('{"case": "b", "x')
    assert journal.read() == [{"case": "a", "x": 1}]


def test_nothing_is_left_running(tmp_path, monkeypatch):
    """What `run` started is gone even if it is interrupted."""
    code = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    journal = Journal(tmp_path / "journal")
    stage = stages.Stage("toys", 30, (("x", 1),))

    def interrupt(seconds):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.run(stage, [sys.executable, "-c", code], journal, tmp_path / "log", time.monotonic() + 30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- the session ------------------------------------------------------------------------------------------------------

FAKE = """
import sys
sys.path.insert(0, {tests!r})
import conftest, pytest, fake_cupy
import test_gpu_harness as harness
from fused_adam.bench.gpu import arrays, worker
with pytest.MonkeyPatch.context() as patch, fake_cupy.installed(patch):
    if {planted}:
        def get(self, a):
            host = a.get()
            if host.size > 4000:
                host.reshape(-1)[1234:1235].view("u1")[0] ^= 1
            return host
        patch.setattr(arrays._Cupy, "get", get)
    few = lambda part: [c for c in harness.some_bits(part) if c.name in ("adamw float32", "class own rule float32")]
    sys.exit(worker.main(sys.argv[1:], few))
"""


@pytest.mark.parametrize("planted", [False, True])
def test_a_wrong_byte_fails_the_session(planted, tmp_path, capsys):
    script = FAKE.format(tests=str(Path(__file__).parent), planted=planted)
    work = [stages.Stage("bits", 60, (("bits-cupy", 1),)), stages.Stage("bits again", 0, (("bits-numba-cuda", 1),))]
    status = session.run(tmp_path / "out", ABOUT, work, [sys.executable, "-c", script])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "nvidia-h200.json").read_text())
    tally = result["bits"]["cupy"]
    if planted:
        assert status == 4 and tally["ok"] == 0
        assert set(tally["different"]) == {"adamw float32", "class own rule float32"}
        assert "1 of" in tally["different"]["adamw float32"] and "at 1234" in tally["different"]["adamw float32"]
        assert "BITS DIFFER: bits cupy: adamw float32: p, sizes" in out
    else:
        assert status == 0 and tally == {"ok": 2}
    assert max(map(len, out.splitlines())) <= 80
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["gpu.jsonl", "gpu.log", "nvidia-h200.json"]


def test_the_record_of_a_run_that_was_cut_off(tmp_path, capsys):
    journal = Journal(tmp_path / session.JOURNAL)
    journal.write(about=ABOUT)
    journal.write(part="bits-cupy", shard="0/1", case="a", number=0, status="ok")
    journal.write(part="bits-cupy", shard="0/1", case="b", number=1, status="started")
    assert session.finish(tmp_path) == 1
    assert "FAILED: bits cupy: b: it never ended" in capsys.readouterr().out
    assert json.loads((tmp_path / "nvidia-h200.json").read_text())["bits"]["cupy"]["started"] == {"b": ""}


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(fused_adam, "backends", lambda: [(n, n == "numpy", "no driver") for n in ("cupy", "numpy")])
    start = time.monotonic()
    assert session.main() == 3
    assert "none can be used here:\n  cupy: no driver\n" in capsys.readouterr().err and time.monotonic() - start < 1


def test_installation(monkeypatch):
    package = Path(session.__file__).with_name("__init__.py")
    commands = []

    def run(command, **_):
        commands.append(command)
        pip = "pip" in command
        return subprocess.CompletedProcess(
            command, int(pip and broken), "" if pip else f"{imported}\n", "x\nerror: externally-managed-environment\n"
        )

    monkeypatch.setattr(session.subprocess, "run", run)
    broken, imported = False, package
    assert session.install() == ("fused_adam.bench.gpu", "editable, without dependencies")
    assert commands[0][1:3] == ["-m", "pip"]
    assert commands[0][-4:] == ["--no-build-isolation", "--no-deps", "-e", "."]
    imported = __file__  # another installation comes first
    assert session.install()[0] == "bench.gpu"
    broken = True
    package, how = session.install()
    assert package == "bench.gpu" and how.endswith("not installed: error: externally-managed-environment")


def test_the_plan():
    alone = session.plan({"compute_mode": "Exclusive_Process"})
    for work in (session.plan({"compute_mode": "Default"}), alone):
        assert sum(stage.seconds for stage in work) + stages.GRACE_S + 15 <= 480
        assert {part for stage in work for part, _ in stage.parts} == set(worker.PARTS)
    assert all(processes == 1 for stage in alone for _, processes in stage.parts)
