"""The README keeps its word: its programs run, and its figures are those of the committed results."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import fake_cupy
import pytest
from conftest import same_bits

from fused_adam.backends import reason

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WITHOUT_GPU = [block for block in BLOCKS if "import cupy" not in block]


def program(folder, blocks):
    """One program, in a file: a rule's source is read from there."""
    path = folder / f"readme_{len(blocks)}.py"
    path.write_text("\n".join([*blocks, "print(abs(error).mean())\n"]))
    return path


def run(path):
    out = subprocess.run([sys.executable, "-W", "error", path], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 0.4


def test_its_programs_run(tmp_path):
    assert len(WITHOUT_GPU) >= 2
    run(program(tmp_path, WITHOUT_GPU))


def test_its_program_for_a_gpu_runs_on_one_that_is_not_there(tmp_path, monkeypatch):
    """And gives the parameters that the one for the CPU gives: the arithmetic around the step is NumPy's too."""
    assert len(BLOCKS) > len(WITHOUT_GPU)
    host = runpy.run_path(str(program(tmp_path, WITHOUT_GPU)))
    with fake_cupy.installed(monkeypatch), monkeypatch.context() as patch:
        fake_cupy.allow_arithmetic(patch)
        on_gpu = runpy.run_path(str(program(tmp_path, BLOCKS)))
        assert [name for name, *_ in fake_cupy.launches] == ["adamw_f32"] * 200
        assert all(same_bits(host["flat"][name], on_gpu["flat"][name].get()) for name in "Wb")


@pytest.mark.skipif(reason("cupy") != "", reason="needs CuPy and a GPU")
def test_its_program_for_a_gpu_runs(tmp_path):
    run(program(tmp_path, BLOCKS))


def test_its_figures_are_the_measured_ones():
    measured = json.loads((ROOT / "bench" / "results" / "amd-epyc-2-cores.json").read_text())["ratios"]
    expected = []
    for row in measured:
        target = row["target"]
        cells = [target["ours"], target["peer"], row["where"], f"{target['least']:.2f}", f"{row['measured']:.2f}"]
        expected.append(f"| {' | '.join(cells)} |")
    section = README[README.index("<!-- figures: begin") : README.index("<!-- figures: end")]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == expected
