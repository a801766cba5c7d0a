"""The README keeps its word: its programs run, and its figures are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_programs_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    program = tmp_path / "readme.py"  # one program, in a file: a rule's source is read from there
    program.write_text("\n".join(blocks) + "\nprint(abs(error).mean())\n")
    out = subprocess.run([sys.executable, "-W", "error", program], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 0.4


def test_its_figures_are_the_measured_ones():
    measured = json.loads((ROOT / "bench" / "results" / "amd-epyc-2-cores.json").read_text())["ratios"]
    expected = []
    for row in measured:
        target = row["target"]
        cells = [target["ours"], target["peer"], row["where"], f"{target['least']:.2f}", f"{row['measured']:.2f}"]
        expected.append(f"| {' | '.join(cells)} |")
    section = README[README.index("<!-- figures: begin") : README.index("<!-- figures: end")]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == expected
