"""What all tests share: the backends, what may be skipped, and when two arrays hold the same bits."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

# Before Numba and fused_adam are imported: more threads than this machine may have cores, and no backend forced.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
os.environ.pop("FUSED_ADAM_BACKEND", None)

import hypothesis
import numpy as np
import pytest

CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
BACKENDS = ("numpy", "numba")

# What needs frameworks, or data of other packages, has an environment of its own: `make test-torch` names the folders.
collect_ignore = ["torch_frameworks", "torch_trainings"]

hypothesis.settings.register_profile("fused_adam", deadline=None, derandomize=CI, print_blob=True)
hypothesis.settings.load_profile("fused_adam")


def missing(reason: str) -> None:
    """Skip, with the reason; in CI, where nothing may be missing, fail."""
    if CI:
        pytest.fail(f"{reason}; CI skips nothing", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require(module: str) -> Any:
    """Import a module that only tests need; without it the test (or the test file) is skipped, or fails in CI."""
    if importlib.util.find_spec(module) is None:
        missing(f"{module} is not installed")
    return importlib.import_module(module)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    if request.param == "numba":
        require("numba")
    return request.param


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays have the same shape, dtype and bytes, all NaNs taken as one: their payloads may differ."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    equal = np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))


def assert_same_bits(names: Iterable[str], ours: Iterable[Any], theirs: Iterable[Any], what: str = "") -> None:
    """`same_bits` for several arrays; says which differs, where first, and by what."""
    for name, a, b in zip(names, ours, theirs, strict=True):
        if same_bits(a, b):
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what} {name}: {a.dtype}{a.shape} {b.dtype}{b.shape}"
        wrong = [i for i, (x, y) in enumerate(zip(a.ravel(), b.ravel(), strict=True)) if not same_bits(x, y)]
        i = wrong[0]
        raise AssertionError(f"{what} {name}: {len(wrong)} of {a.size} differ, first [{i}] {a.flat[i]!r} {b.flat[i]!r}")
