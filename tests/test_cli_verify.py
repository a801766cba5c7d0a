"""`fused-adam verify`: it finds this machine right, and mistakes that were planted."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_cases import AVAILABLE, run, run_json

from fused_adam.cli import oracle, verify


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
