"""kernels/rows.cu on the CPU under the sanitizers of g++: see test_cuda_sanitizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import LARGEST, Variant
from test_cuda_sanitizers import MEMORY, RACES, report

from fused_adam._codegen import bind
from fused_adam.backends._cuda_source import rows_source

PROGRAM = Path(__file__).with_name("host_sanitized_rows.cpp")
SGD: Variant = ("sgd", ())
ADAMW: Variant = ("adamw", ())


@pytest.mark.parametrize(
    ("variant", "sanitizer", "dtype"),
    [(SGD, MEMORY, np.float64), (LARGEST, MEMORY, np.float32), (ADAMW, RACES, np.float32)],
)
def test_sound(variant: Variant, sanitizer: str, dtype: Any) -> None:
    assert report(sanitizer, rows_source(bind(*variant), np.dtype(dtype)).text, PROGRAM) == ""


MISTAKES = {
    "tail": (MEMORY, "s.count - first < s.each ? s.count - first : s.each", "s.each", "ERROR: AddressSanitizer"),
    "sum": (MEMORY, "while (++j < end)", "while (++j <= end)", "ERROR: AddressSanitizer"),
    "overlap": (RACES, "left = block % pieces * a.chunk", "left = block % pieces * (a.chunk - 1)", "data race"),
}


@pytest.mark.parametrize(("sanitizer", "right", "wrong", "found"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(sanitizer: str, right: str, wrong: str, found: str) -> None:
    text = rows_source(bind(*SGD), np.dtype(np.float32)).text
    assert text.count(right) == 1
    assert found in report(sanitizer, text.replace(right, wrong), PROGRAM)
