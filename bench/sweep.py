"""One AdamW step of every candidate over a range of sizes."""

from __future__ import annotations

from typing import Any

from .cases import SINGLE, THREADS, Problem
from .report import disturbed, figures, power, progress, table
from .timing import Timing, measure

SIZES = (2**10, 2**16, 2**20, 2**22, 2**24, 2**25)
QUICK = (2**10, 2**16, 2**20, 2**22)


def sweep(*, quick: bool = False) -> dict[str, Any]:
    """Time the candidates that are installed, print ns per parameter and us per step, return all figures."""
    sizes = QUICK if quick else SIZES
    timings: dict[int, dict[str, Timing]] = {}
    with progress() as show:
        for n in sizes:
            show(power(n))
            problem = Problem(n)
            calls = {c.name: c.build(problem) for c in SINGLE if not c.missing}
            timings[n] = measure(calls, rounds=7 if quick else 15, budget_s=1.2 if quick else 60.0)

    header = ["AdamW, float32", *map(power, sizes)]
    _table(f"ns per parameter, median ({THREADS} threads)", header, timings, per_parameter=True)
    _table("us per step, median", header, timings, per_parameter=False)
    for c in SINGLE:
        if c.missing:
            print(f"{c.name}: skipped: {', '.join(c.missing)} not installed")
    print(disturbed(t for row in timings.values() for t in row.values()), end="")
    return {"sizes": {str(n): figures(row) for n, row in timings.items()}}


def _table(title: str, header: list[str], timings: dict[int, dict[str, Timing]], *, per_parameter: bool) -> None:
    def cell(n: int, timing: Timing) -> str:
        if per_parameter:
            return f"{timing.median * 1e9 / n:.2f}"
        return f"{timing.median * 1e6:,.{1 if timing.median < 1e-3 else 0}f}"

    present = [c.name for c in SINGLE if not c.missing]
    table(title, header, [[name, *(cell(n, row[name]) for n, row in timings.items())] for name in present])
