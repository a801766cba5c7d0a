"""The CUDA kernels around a step with its scalars in memory, under the sanitizers of g++: see test_cuda_sanitizers.

Their threads work together: ThreadSanitizer knows those of a block apart, and sees what no barrier orders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_cuda_sanitizers import MEMORY, PROGRAM, RACES, report

from fused_adam._codegen import behind, bind
from fused_adam.backends._cuda_source import norm_source, prologue_source, source

NORM, PROLOGUE = (Path(__file__).with_name(f"host_sanitized_{name}.cpp") for name in ("norm", "prologue"))
FLOAT = np.dtype(np.float32)
STEP = behind(bind("adamw"), ("unscale", "clip"), zeroes=True, counts=True)
# Texts of kernels and the programs that run them.
KERNELS = {
    "norm": (norm_source(FLOAT).text, NORM),
    "wide norm": (norm_source(np.dtype(np.float64)).text, NORM),
    "prologue": (prologue_source().text, PROLOGUE),
    "step": (source(STEP, FLOAT, on_device=True).text, PROGRAM),
    "wide step": (source(STEP, np.dtype(np.float64), on_device=True).text, PROGRAM),
}


@pytest.mark.parametrize("sanitizer", [MEMORY, RACES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sound(kernel: str, sanitizer: str) -> None:
    text, program = KERNELS[kernel]
    assert report(sanitizer, text, program) == ""


ASAN, RACE = "ERROR: AddressSanitizer", "data race"
SYNC = "\n    __syncthreads();\n"
MISTAKES = {
    "tail": ("norm", MEMORY, "i + k < n ?", "i + k <= n ?", ASAN),
    "vector": ("norm", MEMORY, "aligned && i + 4 <= n", "aligned && i < n", ASAN),
    "alignment": ("norm", MEMORY, "if (aligned && ", "if (", "misaligned address"),
    "flags": ("norm", MEMORY, "mine + LIMBS, flags", "mine + COPIES * SET, flags", ASAN),
    "digit": ("norm", MEMORY, "< LIMBS; k += 32", "< LIMBS + 1; k += 32", "out of bounds"),
    "no barrier": ("norm", RACES, SYNC, "\n", RACE),
    "no barrier of a warp": ("norm", RACES, "    __syncwarp();\n", "", RACE),
    "no atomic sum": ("norm", RACES, "atomicAdd(mine + threadIdx.x, sum)", "mine[threadIdx.x] += sum", RACE),
    "no atomic flags": ("norm", RACES, "atomicOr(mine + LIMBS, flags)", "mine[LIMBS] |= flags", RACE),
    "every lane": ("norm", RACES, "if (lane == 0) add", "add", RACE),
    "set": ("prologue", MEMORY, "threadIdx.x < SET", "threadIdx.x <= SET", ASAN),
    "groups": ("prologue", MEMORY, "k < a.count", "k <= a.count", ASAN),
    "coefficients": ("prologue", MEMORY, "k < g.count", "k <= g.count", ASAN),
    "no barrier before": ("prologue", RACES, SYNC + "    if (threadIdx.x == 0)", "\n    if (threadIdx.x == 0)", RACE),
    "no barrier behind": ("prologue", RACES, SYNC + "    for (", "\n    for (", RACE),
    "wiped": ("step", MEMORY, "wipe<Number>(g, middle, hi)", "wipe<Number>(g, middle, hi + 1)", ASAN),
    "wiped too wide": ("step", MEMORY, "wipe<Access>(g, lo, middle)", "wipe<Access>(g, lo, hi)", ASAN),
    "coefficients of a step": ("step", MEMORY, "__ldg(mine + k)", "__ldg(mine + k + 1)", ASAN),
    "no atomic count": (
        "step",
        RACES,
        "atomicAdd(&a.control->unmoved, static_cast<unsigned long long>(unmoved))",
        "a.control->unmoved += unmoved",
        RACE,
    ),
}


@pytest.mark.parametrize(("kernel", "sanitizer", "right", "wrong", "report_of"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(kernel: str, sanitizer: str, right: str, wrong: str, report_of: str) -> None:
    text, program = KERNELS[kernel]
    assert text.count(right) == 1
    assert report_of in report(sanitizer, text.replace(right, wrong), program)


def test_a_barrier_that_not_all_threads_reach_is_found() -> None:
    """Which on a device may hang, or pass."""
    text, program = KERNELS["prologue"]
    right = "decision = decide("
    assert text.count(right) == 1
    assert "not all threads reach" in report(MEMORY, text.replace(right, "__syncthreads(), " + right), program)
