"""All candidates of one case on a GPU, by the clock of `make gpu`. Everything here needs CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .gpu import peers
from .gpu.clock import Gpu, device_times, host_times, wall_times
from .problem import Candidate, Problem
from .race import RESIDENT, Case, Method, blank, enter
from .results import Row
from .timing import Call


def race(clock: Gpu, case: Case, candidates: Sequence[Candidate], method: Method, rows: list[Row]) -> None:
    """Append a row for each candidate."""
    import cupy

    # Stepped in turn, they are too much for the cache, whoever was there before.
    problems = [Problem(case.size, case.tensors, case.dtype, case.rule, cupy) for _ in range(case.sets)]
    turns: dict[str, list[Call]] = {}
    found = []
    for candidate in candidates:
        calls, status = enter(case, candidate, problems, method.check)
        if calls and case.mode == "graph":
            capture = peers.torch_graph if candidate.kind == "peer" else peers.our_graph
            try:
                calls = [capture(calls)]
            except Exception as error:  # it says so itself when it cannot be captured
                calls, status = [], f"skipped: {type(error).__name__}: {error}"[:300]
        found.append(replace(blank(case, candidate), status=status))
        if calls:
            turns[candidate.name] = calls
    in_turn = {name: peers.in_turn(calls) for name, calls in turns.items()}
    samples: dict[str, list[float]] = {}
    host: dict[str, list[float]] = {}
    if case.mode == "e2e":
        samples = wall_times(clock, in_turn, method.rounds)
        host = host_times(clock, in_turn, method.rounds)
    elif case.mode == "cold":
        alone = {name: calls[0] for name, calls in turns.items()}
        samples = device_times(clock, alone, method.rounds, cold=case.moved < RESIDENT)
    else:
        replayed = device_times(clock, in_turn, method.rounds, cold=False)
        samples = {name: [t / case.sets for t in times] for name, times in replayed.items()}
    method.after_round(method.rounds)
    rows += [replace(row, samples=samples.get(row.candidate, []), host=host.get(row.candidate, [])) for row in found]


def rates(clock: Gpu, elements: int) -> dict[str, float]:
    """The copy's, measured, and the memory's by what the driver says of its clock and width."""
    import cupy

    runtime: Any = cupy.cuda.runtime
    times = device_times(clock, {"copy": peers.copy(peers.Tensors(1, elements))}, 7, cold=False)["copy"]
    found = {"copy": 2 * peers.copy_bytes(elements) / sorted(times)[3]}
    kilohertz, bits = (runtime.deviceGetAttribute(a, 0) for a in (36, 37))  # memory clock rate, bus width
    if kilohertz and bits:
        found["peak"] = 2 * 1e3 * kilohertz * bits / 8  # twice a clock
    return found


def name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
