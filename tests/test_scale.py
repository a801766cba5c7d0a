"""docs/scale.md keeps its word: its table is what the script prints, and the script's numbers are what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require
from fused_adam.bench import scale
from fused_adam.bench.distributed import LIMITS, ratios

DOCUMENT = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()


def test_the_table_is_the_script_s():
    begin = "<!-- scale: begin; written by python -m fused_adam.bench.scale -->\n"
    assert DOCUMENT.partition(begin)[2].partition("<!-- scale: end -->")[0] == scale.table()


@pytest.mark.parametrize("number", [scale.COPY_RATE / 1e12, scale.LINK_RATE / 1e9, scale.MEMORY / 1e9])
def test_its_assumptions_are_stated(number):
    assert f" {number:g} " in DOCUMENT


def test_an_estimate_by_hand():
    """1e11 parameters of 4 bytes fill 70.5 GB eight times over; of 28 bytes 1e11 / 64 take 10.2 ms at 4.3 TB/s."""
    e = scale.estimate(1e11, 64)
    assert e.model_parallel == 8 and e.weights == 5e10
    assert e.states == (1e11 * 12 / 64, 1e11 * 3.0625 / 64)
    assert e.kernel[0] == pytest.approx(1e11 * 28 / 64 / 4.3e12)
    assert e.communication == pytest.approx(1e11 * 4 / 8 * 7 / 8 / 45e9)
    assert scale.estimate(1e11, 8) is None
    assert scale.estimate(1e9, 1).communication == 0


def test_ratios():
    seconds = {"step": 4.4, "communication": 3, "kernel": 1, "ordered reduction": 1, "native reduction": 4}
    assert ratios(seconds) == {name: pytest.approx(x) for name, x in zip(LIMITS, (1.1, 0.25), strict=True)}


def test_the_measurement_runs():
    """On one process, which says nothing about speed."""
    require("torch")
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = ["--size", "2^10", "--bucket", "2^9", "--rounds", "2", "--json"]
    command = [sys.executable, "-W", "error", "-m", "fused_adam.bench.distributed", *arguments]
    done = subprocess.run(command, env={**os.environ, **rank}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 1 and found["ratios"] == pytest.approx(ratios(found["seconds"]))
