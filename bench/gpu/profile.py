"""Nsight Compute on one large step: the bytes that it moved, and at what part of the memory's peak."""

from __future__ import annotations

import csv
import re
import sys
from typing import Any

from . import subject
from .sanitizer import run_tool, unusable
from .worker import Case

_METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "gpu__time_duration.sum": "seconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent of peak",
}
_UNITS = {"": 1.0, "%": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9} | {
    unit + end: scale
    for unit, scale in (("n", 1e-9), ("u", 1e-6), ("m", 1e-3), ("", 1.0))
    for end in ("s", "sec", "second")
}


def parsed(output: str) -> dict[str, float]:
    """The metrics of the first kernel in ncu's CSV, which begins with its header amid other lines, in base units."""
    lines = output.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values: dict[str, float] = {}
    for row in csv.DictReader(lines[start:]):
        name, unit = _METRICS.get(row.get("Metric Name") or ""), _UNITS.get(row.get("Metric Unit") or "")
        number = (row.get("Metric Value") or "").replace(",", "")
        if name and unit is not None and name not in values and re.fullmatch(r"[\d.]+", number):
            values[name] = float(number) * unit
    return values


def profile() -> dict[str, Any]:
    """The rates, and the bytes for each of the 28 that a step must move."""
    options = ["--clock-control", "none", "--csv", "--print-units", "base", "--metrics", ",".join(_METRICS)]
    options += ["--kernel-name", "regex:adamw", "--launch-skip", "3", "--launch-count", "1"]
    program = [sys.executable, "-m", subject.__spec__.name, "large"]
    status, output = run_tool(["ncu", *options, *program], timeout=40.0)
    values = parsed(output)
    if set(values) != set(_METRICS.values()):
        raise unusable("ncu", status, output)
    moved = values["read"] + values["written"]
    rates = {"bytes a second": moved / values["seconds"], "of 28 bytes an element": moved / (28 * subject.LARGE)}
    return {"note": {**values, **rates, "elements": subject.LARGE}}


def cases() -> list[Case]:
    return [Case("one large step", profile)]
