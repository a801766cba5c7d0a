"""`make gpu` without a GPU: compute-sanitizer and ncu that only print, and processes that only take their time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from fused_adam.bench.gpu import first_step, profile, sanitizer, worker
from fused_adam.bench.gpu.worker import Case, Skipped


def outcome(run):
    return worker._outcome(Case("it", run))


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
the steps are done
========= ERROR SUMMARY: {} errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
the steps are done
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
========= ERROR SUMMARY: 1 error
"""
NCU = """==PROF== Connected to process 4711 (/usr/bin/python3)
==PROF== Profiling "adamw_f32" - 0: 0%....50%....100% - 1 pass
the steps are done
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3","127.0.0.1","adamw_f32","1","7","(256, 1, 1)","(16384, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","1,073,741,824"
"0","4711","python3","127.0.0.1","adamw_f32","1","7","(256, 1, 1)","(16384, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_write.sum","Mbyte","805.306368"
"0","4711","python3","127.0.0.1","adamw_f32","1","7","(256, 1, 1)","(16384, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.25"
"0","4711","python3","127.0.0.1","adamw_f32","1","7","(256, 1, 1)","(16384, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","ns","437,000"
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A command of this name that prints this text and ends with this status; without a call there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(name, text, status=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <<'END'\n{text}END\nexit {status}\n")
        path.chmod(0o755)

    return install


def test_absent_tools_are_skipped(tool):
    assert outcome(lambda: sanitizer.check("memcheck"))["reason"] == "compute-sanitizer is not on the PATH"
    assert outcome(profile.profile) == {"status": "skipped", "reason": "ncu is not on the PATH"}


def test_the_sanitizer(tool):
    tool("compute-sanitizer", MEMCHECK.format(0))
    assert sanitizer.check("memcheck") == {"note": "ERROR SUMMARY: 0 errors"}
    tool("compute-sanitizer", RACECHECK)
    assert sanitizer.check("racecheck")["note"] == "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    tool("compute-sanitizer", MEMCHECK.format(3))
    assert "ERROR SUMMARY: 3 errors" in outcome(lambda: sanitizer.check("memcheck"))["reason"]
    tool("compute-sanitizer", MEMCHECK.format(0).replace("done", ""), status=1)
    assert outcome(lambda: sanitizer.check("memcheck"))["status"] == "failed"  # the bits were wrong
    for text in (REFUSED, "Unable to find injection library\n", ""):
        tool("compute-sanitizer", text, status=1)
        assert outcome(lambda: sanitizer.check("memcheck"))["status"] == "skipped"
    tool("compute-sanitizer", REFUSED)
    assert "Device not supported" in outcome(lambda: sanitizer.check("memcheck"))["reason"]


def test_a_tool_that_never_ends(tmp_path, monkeypatch):
    program = tmp_path / "sleeper"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path / 'pid'}\nwait\n")
    program.chmod(0o755)
    with pytest.raises(Skipped, match="sleeper took more than 1 s"):
        sanitizer.run_tool([str(program)], 0.7)
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    deadline = time.monotonic() + 10  # on a busy machine the kill takes a while to arrive
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "what it started was not killed with it"


def test_the_profiler(tool):
    tool("ncu", NCU)
    found = profile.profile()["note"]
    assert found["seconds"] == pytest.approx(437e-6) and found["percent of peak"] == 91.25
    assert found["of 28 bytes an element"] == pytest.approx((2**30 + 805.306368e6) / (28 * 2**26))
    assert found["bytes a second"] == pytest.approx((2**30 + 805.306368e6) / 437e-6)
    tool("ncu", NCU.replace("91.25", "n/a"))
    assert outcome(profile.profile)["status"] == "skipped"
    tool("ncu", "==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", status=1)
    assert "LibraryNotLoaded" in outcome(profile.profile)["reason"] and outcome(profile.profile)["status"] == "skipped"


def test_first_steps(monkeypatch):
    monkeypatch.setattr(first_step, "usable", lambda backend: "bridged")
    look = "import os, json, sys; f = os.environ['CUPY_CACHE_DIR'] + '/kernel'; print('noise'); "
    look += "print(json.dumps({'first step': float(os.path.exists(f)), 'is': sys.argv[1]})); open(f, 'w')"
    found = first_step.first_step("cupy", (sys.executable, "-c", look))
    assert found["starts"] == {k: {"first step": s, "is": "cupy"} for k, s in (("empty", 0.0), ("full", 1.0))}
    assert found["bridge"] == "bridged"
    broken = outcome(lambda: first_step.first_step("cupy", (sys.executable, "-c", "raise ValueError('no')")))
    assert broken["status"] == "failed" and "ValueError: no" in broken["reason"]
    compile(first_step._PROGRAM, "first_step", "exec")
