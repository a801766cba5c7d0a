"""How long the first step takes in a new process, with nothing in the caches of compiled kernels and with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

from .arrays import usable
from .worker import Case

BACKENDS = ("cupy", "numba-cuda")
RUNS = 3
_TIMEOUT_S = 25.0

# A file of its own, so that what it imports is timed by itself: the package is loaded after CuPy and the context.
_PROGRAM = """
import json, sys, time
import numpy as np
times, backend = [time.perf_counter()], sys.argv[1]
if backend == "cupy":
    import cupy
    put, wait = cupy.asarray, cupy.cuda.Device().synchronize
else:
    vars(np).setdefault("row_stack", np.vstack)
    from numba import cuda
    put, wait = cuda.to_device, cuda.synchronize
x = np.ones(2**20, np.float32)
p, g = put(x), put(x)
wait()
times.append(time.perf_counter())
import fused_adam
times.append(time.perf_counter())
opt = fused_adam.AdamW(p, backend=backend)
for _ in range(2):
    opt.step(g)
    wait()
    times.append(time.perf_counter())
names = ("library and context", "import fused_adam", "first step", "second step")
print(json.dumps({name: b - a for name, a, b in zip(names, times, times[1:])}))
"""


def first_step(backend: str, command: Sequence[str] = (sys.executable, "-c", _PROGRAM)) -> dict[str, Any]:
    """Seconds of each part, in a process that starts with empty caches and in one that finds them as that left them."""
    bridged = usable(backend)
    starts = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = dict.fromkeys(("CUPY_CACHE_DIR", "NUMBA_CACHE_DIR", "CUDA_CACHE_PATH"), folder)
        for cache in ("empty", "full"):
            run = subprocess.run(
                [*command, backend],
                env={**os.environ, **caches},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            if run.returncode:
                raise RuntimeError(run.stderr[-1500:])
            starts[cache] = json.loads(run.stdout.splitlines()[-1])
    return {"backend": backend, "starts": starts, "bridge": bridged}


def cases() -> list[Case]:
    return [Case(f"{name}, run {k + 1}", partial(first_step, name)) for k in range(RUNS) for name in BACKENDS]
