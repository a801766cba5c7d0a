"""All candidates of one case, timed together, as rows of the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from . import check
from .cases import THREADS
from .problem import Candidate, Problem, Skipped, bytes_per_parameter
from .results import Row
from .timing import Call, Timing, measure

_FLUSH_BYTES = 2**28  # more than a processor's caches
RESIDENT = 2**28  # bytes from which on a working set leaves no trace in a GPU's cache
_MOST_SETS = 8
_PLACES_BYTES = 2**29
_MOST_PLACES = 24


@dataclass(frozen=True)
class Case:
    rule: str
    dtype: str
    mode: str
    size: int
    tensors: int

    @property
    def moved(self) -> int:
        """Bytes that a step has to move."""
        return self.size * bytes_per_parameter(self.rule, self.dtype)

    @property
    def needed(self) -> int:
        """Bytes, about: the problem, each backend's own states, the temporaries of a peer and another's copies."""
        return 3 * self.moved

    @property
    def sets(self) -> int:
        """On a GPU: how many problems, stepped in turn, are too much for its cache."""
        return min(_MOST_SETS, max(1, RESIDENT // self.moved))

    @property
    def places(self) -> int:
        """On a CPU: how many problems the rounds take in turn, so that no lucky place in memory decides."""
        return min(_MOST_PLACES, max(1, _PLACES_BYTES // self.moved))


@dataclass(frozen=True)
class Method:
    """rounds: samples of each candidate. budget_s: seconds a case, and `deadline` the time that ends everything."""

    rounds: int
    budget_s: float
    deadline: float = math.inf
    check: bool = False
    after_round: Callable[[int], object] = lambda done: None

    @property
    def seconds(self) -> float:
        return max(0.0, min(self.budget_s, self.deadline - time.perf_counter()))


def blank(case: Case, candidate: Candidate) -> Row:
    each = bytes_per_parameter(case.rule, case.dtype)
    about = (candidate.name, candidate.kind, candidate.backend, case.rule, case.dtype, case.mode, case.size)
    return Row(*about, case.tensors, each, launches=candidate.launches)


def enter(case: Case, candidate: Candidate, problems: Sequence[Problem], checked: bool) -> tuple[list[Call], str]:
    """Its calls, one for each problem, or the status that says why there are none."""
    if candidate.missing:
        return [], f"skipped: {' and '.join(candidate.missing)} not installed"
    build = candidate.graph if case.mode == "graph" else candidate.build
    if build is None:
        return [], "skipped: its steps cannot be captured"
    try:
        if checked and candidate.kind != "roof":
            n = max(case.tensors, min(case.size, check.MOST))
            if why := check.wrong(candidate, Problem(n, case.tensors, case.dtype, case.rule, problems[0].xp)):
                return [], f"wrong: {why}"
        calls = [build(x) for x in problems]
        calls[0]()
    except Skipped as why:
        return [], f"skipped: {why}"
    except Exception as error:  # somebody else's library: its failure is its result
        return [], f"skipped: {type(error).__name__}: {error}"[:300]
    return calls, "ok"


def on_cpu(case: Case, candidates: Sequence[Candidate], method: Method, rows: list[Row]) -> None:
    """Append a row for each candidate, also when it is interrupted: then with the rounds that were complete."""
    problems = [Problem(case.size, case.tensors, case.dtype, case.rule) for _ in range(min(case.places, method.rounds))]
    calls: list[dict[str, Call]] = [{} for _ in problems]
    found = []
    for candidate in candidates:
        entered, status = enter(case, candidate, problems, method.check)
        found.append(replace(blank(case, candidate), status=status))
        for place, call in zip(calls, entered, strict=False):
            place[candidate.name] = call
    timings: dict[str, Timing] = {}
    space = np.zeros(_FLUSH_BYTES if case.mode == "cold" else 0, np.uint8)
    flush = partial(np.add, space, 1, out=space) if case.mode == "cold" else None
    try:
        measure(
            *calls,
            rounds=method.rounds,
            budget_s=method.seconds,
            flush=flush,
            timings=timings,
            after_round=method.after_round,
        )
    finally:
        complete = min((len(t.samples) for t in timings.values()), default=0) if len(timings) == len(calls[0]) else 0
        for row in found:
            if row.status != "ok":
                rows.append(row)
            elif complete:
                t = timings[row.candidate]
                rows.append(
                    replace(row, samples=t.samples[:complete], refused=t.refused, disturbed=min(t.disturbed, complete))
                )


def copy_rate(n_bytes: int) -> float:
    """Bytes a second, read and written, of NumPy's copy, a thread on each core."""
    source, destination = (np.array_split(a, THREADS) for a in np.ones((2, n_bytes // 2 + 1), np.uint8))
    with ThreadPoolExecutor(THREADS) as pool:
        timing = measure({"copy": lambda: list(pool.map(np.copyto, destination, source))}, rounds=5, budget_s=2.0)
    return n_bytes / timing["copy"].median
