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
from fused_adam.bench import readme
from fused_adam.bench.results import Report, Row, save

from fused_adam.backends import reason

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WITHOUT_GPU = [block for block in BLOCKS if "import cupy" not in block]


def program(folder, blocks):
    """One program, in a file: a rule's source is read from there."""
    path = folder / f"readme_{len(blocks)}.py"
    path.write_text("\n".join([*blocks, "print(abs(error).mean())\n"]))
    return path


def run(path):
    command = [sys.executable, "-W", "error", path]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 0.4


def test_its_programs_run(tmp_path):
    assert len(WITHOUT_GPU) >= 2
    run(program(tmp_path, WITHOUT_GPU))


def test_its_program_for_a_gpu_runs_on_one_that_is_not_there(tmp_path, monkeypatch):
    """And gives the parameters that the one for the CPU gives: the arithmetic around the step is NumPy's too."""
    assert len(BLOCKS) > len(WITHOUT_GPU)
    monkeypatch.chdir(tmp_path)
    host = runpy.run_path(str(program(tmp_path, WITHOUT_GPU)))
    with fake_cupy.installed(monkeypatch), monkeypatch.context() as patch:
        fake_cupy.allow_arithmetic(patch)
        on_gpu = runpy.run_path(str(program(tmp_path, BLOCKS)))
        assert [name for name, *_ in fake_cupy.launches] == ["adamw_f32"] * 200
        assert all(same_bits(host["flat"][name], on_gpu["flat"][name].get()) for name in "Wb")


@pytest.mark.skipif(reason("cupy") != "", reason="needs CuPy and a GPU")
def test_its_program_for_a_gpu_runs(tmp_path):
    run(program(tmp_path, BLOCKS))


def test_its_figures_are_those_of_the_results():
    """`make figures` writes them."""
    assert readme.replaced(README, readme.section(RESULTS)) == README
    measured = json.loads((RESULTS / "amd-epyc-2-cores.json").read_text())["ratios"]
    rows = [
        line for line in README[README.index(readme.BEGIN) : README.index(readme.END)].splitlines() if "2^25" in line
    ]
    assert [line.split(" | ")[-1] for line in rows] == [
        f"{r['measured']:.2f} |" for r in measured if r["where"] == "2^25"
    ]


def test_figures_that_are_not_those_of_the_results_differ(tmp_path):
    document = json.loads((RESULTS / "amd-epyc-2-cores.json").read_text())
    document["ratios"][0]["measured"] += 0.01
    (tmp_path / "amd-epyc-2-cores.json").write_text(json.dumps(document))
    assert readme.replaced(README, readme.section(tmp_path)) != README


def test_figures_of_a_gpu(tmp_path):
    """From what `make gpu` writes, beside those of a CPU."""
    times = {"cupy": {"median_s": 2e-6}, "torch fused": {"median_s": 3e-6}}
    ratios = {"cupy of the roof": 0.985, "cupy over torch fused, end to end": 1.5}
    cases = {
        "2^20": {"elements": 2**20, "tensors": 1, "device": times, "ratios": ratios},
        "2^10": {"elements": 2**10, "tensors": 1, "device": times, "ratios": {}},
        "host time": {"host": {}, "ratios": {}},
    }
    record = {"device": {"name": "NVIDIA H200"}, "date": "2026-11-21T11:00+00:00", "speed": {"cases": cases}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(record))
    lines = readme.section(tmp_path).splitlines()
    assert lines[0].startswith("AdamW in float32 on NVIDIA H200 (2026-11-21): ")
    assert lines[-2:] == ["| 2^10 | 2.0 |  | 3.0 |  |  |  |  |", "| 2^20 | 2.0 |  | 3.0 | 0.98 |  | 1.50 |  |"]


def test_figures_of_a_benchmark(tmp_path):
    rows = [
        Row(name, kind, None, "adamw", "float32", "e2e", size, 1, 28, samples=[seconds] * 3)
        for size in (2**10, 2**20)
        for name, kind, seconds in (("ours", "ours", 28e-9 * size), ("roof", "roof", 14e-9 * size))
    ]
    save(tmp_path / "cpu.json", Report("EPYC", "cpu", "2026-11-21", "", [], {}, {}, rows))
    lines = readme.section(tmp_path).splitlines()
    assert lines[-4:] == [
        "| adamw, float32, e2e | 2^10 | 2^20 |",
        "|---|---|---|",
        "| ours | 1.0 (50 %) | 1.0 (50 %) |",
        "| roof | 2.0 | 2.0 |",
    ]


def test_a_file_that_nobody_writes_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"other\.json: none of"):
        readme.section(tmp_path)
    with pytest.raises(SystemExit, match="should hold"):
        readme.replaced("no marks", "")
