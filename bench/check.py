"""Whether a candidate computes what it says, before it is timed: two steps against the float64 oracle."""

from __future__ import annotations

import numpy as np

from fused_adam.cli import oracle

from .problem import Candidate, Problem

MOST = 2**18  # elements; enough to run in parallel
STEPS = 2  # the second reads what the first has stored
_ULPS_OF_P = 4.0
_OF_UPDATE = 1e4  # ulps: what 1 - beta2 loses in the peers' order of operations


def wrong(candidate: Candidate, x: Problem) -> str:
    """How far it is off, or "" if it is right."""
    call = candidate.build(x)
    start = {name: x.host(name) for name in ("p", "g", *x.states)}  # a builder may have set the states
    for _ in range(STEPS):
        call()
    worst, off, total = 0.0, 0, 0
    for k, got in enumerate(x.result()):
        first = p = start["p"][k].astype(np.float64)
        states = {name: start[name][k] for name in x.states}
        for t in range(1, STEPS + 1):
            p, states = oracle.step(x.rule, p, start["g"][k], states, t, **x.hyper)
        size = np.abs(p - first)
        tolerance = _OF_UPDATE * np.finfo(x.dtype).eps * (size + size.mean()) + _ULPS_OF_P * np.spacing(np.abs(got))
        error = np.abs(got - p)
        off += int(np.count_nonzero(~(error <= tolerance)))  # NaN too
        total += got.size
        worst = max(worst, float(np.max(error / (size + size.mean()), initial=0.0)))
    return f"{off:,} of {total:,} elements are off, by up to {100 * worst:.3g} % of the update" if off else ""
