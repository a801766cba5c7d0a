"""Medians of interleaved samples, taken while nobody else was using the processor."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Call = Callable[[], object]

# OpenMP workers spin for some milliseconds after a parallel region before they sleep. A pool that still
# spins takes the core that the next candidate's pool wants, so each sample waits for it to fall asleep.
SETTLE_S = 0.008
# The share of a sample that its threads may have spent runnable but waiting for a core.
BUSY = 0.02
# After this many samples refused for each one wanted, the machine will not get any quieter.
PATIENCE = 4
# A call of so many times the length of a sample needs no warming up: another sample tells more.
LONG = 10


@dataclass
class Timing:
    """The samples of one candidate: seconds per call, one entry a round."""

    samples: list[float] = field(default_factory=list)
    batch: int = 1
    """calls between two looks at the clock"""
    refused: int = 0
    """samples thrown away because the machine was busy"""
    disturbed: int = 0
    """samples that count although it was, patience having run out"""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def waited() -> float | None:
    """Seconds that this process's live threads were runnable without running, so far; None if unknown.

    Linux counts them in the second field of each thread's schedstat. Another process that shares our
    cores shows up here even when the load average has not moved yet.
    """
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread ended while we were reading
    except (OSError, IndexError):
        return None
    return total * 1e-9


def _timed(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _batch(call: Call, seconds: float) -> int:
    """How many calls fill about `seconds`, once the first one has compiled and faulted its pages in."""
    call()
    calls = 1
    while (elapsed := _timed(call, calls)) < seconds / 4:
        calls *= 2
    return max(1, round(calls * seconds / elapsed))


def _sample(call: Call, batch: int, seconds: float, flush: Call | None, warm: bool) -> tuple[float, bool]:
    """Seconds per call over about `seconds`, and whether our threads had to wait for a core meanwhile."""
    time.sleep(SETTLE_S)
    if flush is not None:
        flush()
    elif warm:
        _timed(call, math.ceil(batch / 2))  # brings the candidate's data and threads back
    before = waited()
    elapsed, calls = 0.0, 0
    while elapsed < seconds:
        elapsed += _timed(call, batch)
        calls += batch
        if flush is not None:
            break  # the next call would find in the cache what this one has left there
    after = waited()
    disturbed = before is not None and after is not None and after - before > BUSY * elapsed
    return elapsed / calls, disturbed


def measure(
    candidates: Mapping[str, Call],
    *elsewhere: Mapping[str, Call],
    rounds: int = 15,
    sample_s: float = 0.002,
    budget_s: float = math.inf,
    quiet: bool = True,
    seed: int = 0,
    flush: Call | None = None,
    timings: dict[str, Timing] | None = None,
    after_round: Callable[[int], object] = lambda done: None,
) -> dict[str, Timing]:
    """Time every candidate `rounds` times, each round in a new random order.

    elsewhere: the same candidates on other memory, for the rounds to take in turn. Which pages a process happens to get
    changes what a cache keeps of them, and a step within the caches by a quarter.

    A sample is the mean of as many calls as fill `sample_s`. With `quiet`, a sample during which our threads had to
    wait for a core is thrown away and taken again; on a machine that never gets quiet the samples count all the same
    after a while, and `Timing.disturbed` says how many did. Once `budget_s` is spent no sample is taken again, and
    the measurement ends with its third round or the one that is under way.

    flush: empties the caches before each sample, which then is a single call. timings: an empty dict that is filled as
    the measurement goes, so that what there is outlives an interruption. after_round: is told how many are done.
    """
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    deadline = time.perf_counter() + budget_s
    timings = {} if timings is None else timings
    for name, call in candidates.items():
        timings[name] = Timing(batch=_batch(call, 0.0 if flush else sample_s / 4))
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        shuffle(order)
        here = (candidates, *elsewhere)[done % (1 + len(elsewhere))]
        for name in order:
            timing = timings[name]
            warm = not timing.samples or timing.samples[-1] < LONG * sample_s
            sample, disturbed = _sample(here[name], timing.batch, sample_s, flush, warm)
            while quiet and disturbed and timing.refused < PATIENCE * rounds and time.perf_counter() < deadline:
                timing.refused += 1
                sample, disturbed = _sample(here[name], timing.batch, sample_s, flush, warm)
            timing.samples.append(sample)
            timing.disturbed += disturbed
        after_round(done + 1)
    return timings


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median over rounds of their ratio.

    Pairing the two samples of a round cancels what drifts slowly: clock, temperature, neighbours.
    """
    return statistics.median(s / f for s, f in zip(slow.samples, fast.samples, strict=True))
