"""The CUDA kernel on the CPU under the sanitizers of g++: nothing out of bounds or undefined, no byte in two blocks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES, Variant, variant_id
from conftest import missing
from host_kernel import FEW, compiled

from fused_adam._codegen import bind
from fused_adam.backends._cuda_source import source

PROGRAM = Path(__file__).with_name("host_sanitized.cpp")
LAUNCHES = Path(__file__).with_name("host_launches.h")
MEMORY, RACES = "address,undefined", "thread"
FLAGS = ("-O1", "-g", "-pthread", "-fno-sanitize-recover=all", "-D_GLIBCXX_SANITIZE_VECTOR")


def report(sanitizer: str, text: str, program: Path = PROGRAM) -> str:
    """What the sanitizer says about the steps of a kernel: nothing, if they are sound."""
    built = compiled(f"{text}\n{LAUNCHES.read_text()}\n{program.read_text()}", f"-fsanitize={sanitizer}", *FLAGS)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run([str(built)], env=environment, capture_output=True, text=True, timeout=100, check=False)
    if "unexpected memory mapping" in result.stderr:
        missing("ThreadSanitizer of this g++ cannot run here: try sysctl vm.mmap_rnd_bits=28")
    # AddressSanitizer warns of every program with fibers.
    said = "".join(line for line in result.stderr.splitlines(keepends=True) if "makecontext/swapcontext" not in line)
    assert (result.returncode == 0) == (said == ""), f"exit {result.returncode}\n{said}"
    return said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sanitizer", [MEMORY, RACES])
@pytest.mark.parametrize("variant", FEW, ids=variant_id)
def test_sound(variant: Variant, sanitizer: str, dtype: Any) -> None:
    assert report(sanitizer, source(bind(*variant), np.dtype(dtype)).text) == ""


MISTAKES = {
    "tail": (MEMORY, "lo + a.chunk < s.n ? lo + a.chunk : s.n", "lo + a.chunk", "ERROR: AddressSanitizer"),
    "table": (MEMORY, "segment_of_chunk[blockIdx.x]", "segment_of_chunk[blockIdx.x + 1]", "ERROR: AddressSanitizer"),
    "alignment": (MEMORY, "bits % sizeof(Access) == 0", "true", "misaligned address"),
    "overlap": (
        RACES,
        "lo = (blockIdx.x - s.first) * a.chunk",
        "lo = (blockIdx.x - s.first) * (a.chunk - 4)",
        "data race",
    ),
}


@pytest.mark.parametrize(("sanitizer", "right", "wrong", "found"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(sanitizer: str, right: str, wrong: str, found: str) -> None:
    text = source(bind("adamw"), np.dtype(np.float32)).text
    assert text.count(right) == 1
    assert found in report(sanitizer, text.replace(right, wrong))
