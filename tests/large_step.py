"""Two steps of 2**31 + 5 parameters in 5.1 bytes each, and their gradients: python tests/large_step.py

Not among the tests, for it takes 16 GB of memory; where less is free it says so and stops. Both ends, and what lies
about 2**30 and 2**31, are compared with NumPy's steps over these elements alone, by their canonical indices.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np

import fused_adam

N = 2**31 + 5
GRADIENT, OTHERS = 2, 2 + 1 + 2 + 4 / 64  # bytes: p, the bits beside it, codes, and scales
SLICES = [(0, 4096), (2**30 - 4096, 2**30 + 4096), (2**31 - 4096, N)]
HOW: dict[str, Any] = {"dtype": "bfloat16", "master": "split8", "state_dtype": "int8", "lr": 0.01}


def available() -> int:
    """Bytes of memory that a new process can have."""
    with open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])


def fill(a: Any, seed: int) -> None:
    """bfloat16 numbers of one magnitude, the same for every 2**24 + 77 elements."""
    rng = np.random.default_rng(seed)
    some = (rng.normal(size=2**24 + 77).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for start in range(0, a.size, some.size):
        piece = a[start : start + some.size]
        piece[:] = some[: piece.size]


def main() -> int:
    needed = int((GRADIENT + OTHERS) * N)
    if (free := available()) < needed + 2**29:
        print(f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    p, g = np.empty(N, np.uint16), np.empty(N, np.uint16)
    fill(p, 0)
    fill(g, 1)
    slices = [p[start:stop].copy() for start, stop in SLICES]
    opt = fused_adam.AdamW([p], backend="numba", **HOW)
    opt.prepare()
    for _ in range(2):
        begun = time.perf_counter()
        opt.step([g])
        print(f"a step: {time.perf_counter() - begun:.2f} s")
    found = [b.views[0] for b in (opt._parts[0].master, *opt._parts[0].states.values()) if b is not None]
    scales = opt._parts[0].scales
    assert scales is not None
    for q, (start, stop) in zip(slices, SLICES, strict=True):
        alone = fused_adam.AdamW([q], backend="numpy", **HOW)
        part = alone._parts[0]
        part.first[0] = start
        for _ in range(2):
            alone.step([g[start:stop].copy()])
        ours = [part.master, *part.states.values()]
        right = np.array_equal(p[start:stop], q)
        right &= all(np.array_equal(a[start:stop], b.views[0]) for a, b in zip(found, ours, strict=True) if b)
        right &= part.scales is not None and np.array_equal(
            scales.views[0][start // 32 :][: len(part.scales.views[0])], part.scales.views[0]
        )
        print(f"elements {start:,} to {stop:,}: {'as NumPy has them' if right else 'WRONG'}")
        if not right:
            return 1
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{N:,} parameters, {peak / 1e9:.2f} GB at most, {peak / N:.2f} bytes a parameter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
