"""kernels/stored.cu on the CPU under the sanitizers of g++: see test_cuda_sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_cases import SMALLEST, bound
from test_cuda_sanitizers import MEMORY, RACES, report

from fused_adam._storage import Format
from fused_adam.backends._cuda_source import stored_source

PROGRAM = Path(__file__).with_name("host_sanitized_stored.cpp")
RANDOM = Format("bfloat16", "bfloat16", "bfloat16", "split16", stochastic_rounding=True)
WIDE = Format("float16", "float16", "float32", "float32")


@pytest.mark.parametrize(
    ("rule", "form", "sanitizer"),
    [("adamw", SMALLEST, MEMORY), ("adamw", SMALLEST, RACES), ("lion", RANDOM, MEMORY), ("momentum", WIDE, MEMORY)],
)
def test_sound(rule: str, form: Format, sanitizer: str) -> None:
    assert report(sanitizer, stored_source(bound(rule), form).text, PROGRAM) == ""


MISTAKES = {
    "tail": (MEMORY, "lo + a.chunk < s.n ? lo + a.chunk : s.n", "lo + a.chunk", "ERROR: AddressSanitizer"),
    "scales": (MEMORY, "if (STATE == INT8 && left > 0)", "if (STATE == INT8)", "ERROR: AddressSanitizer"),
    "alignment": (MEMORY, "bits % 16 == 0", "true", "misaligned address"),
    "overlap": (
        RACES,
        "lo = (blockIdx.x - s.first) * a.chunk",
        "lo = (blockIdx.x - s.first) * (a.chunk - 64)",
        "data race",
    ),
}


@pytest.mark.parametrize(("sanitizer", "right", "wrong", "found"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(sanitizer: str, right: str, wrong: str, found: str) -> None:
    text = stored_source(bound("adamw"), SMALLEST).text
    assert text.count(right) == 1
    assert found in report(sanitizer, text.replace(right, wrong), PROGRAM)
