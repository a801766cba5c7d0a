"""The same bits everywhere: NumPy, Numba and the CUDA kernel built for the host, all NaNs taken as one.

Every rule behind every prelude that a class uses runs on the three of them, over any values, sizes and places.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
from bits import (
    DTYPES,
    VARIANTS,
    Variant,
    assert_arrays,
    coefficients,
    copies,
    inputs,
    run,
    standard,
    variant_id,
)
from conftest import BACKENDS, require
from host_kernel import HostKernel

from fused_adam import _codegen
from fused_adam._codegen import bind
from fused_adam._rules import RULES
from fused_adam.backends import _cuda_source

# Every tail of any vector width and unrolling; around NumPy's chunk, Numba's chunk and Numba's parallel threshold.
SIZES = (*range(68), 127, 128, 129, 255, 257, 1000, 1025, 4097)
LARGE = (2**15 - 1, 2**15, 2**15 + 1, 2**16 + 1, 2**18 - 1, 2**18, 300_001)


@pytest.fixture(params=(*BACKENDS, "c++"))
def runner(request: pytest.FixtureRequest) -> Any:
    """step(rule, coefficients, arrays): p, g and the states, 1-D, in place."""
    if request.param == "c++":
        return lambda rule, values, arrays: HostKernel(rule, arrays[0].dtype).alone(values, arrays)
    if request.param == "numba":
        require("numba")
    return lambda *arguments: run(request.param, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_any_value(variant: Variant, dtype: Any, runner: Any) -> None:
    rule = bind(*variant)
    given = inputs(rule, dtype, 30_011, share=0.4)
    for k in range(3):
        ours, expected = copies(given), standard(rule, given, k)
        runner(rule, coefficients(rule, k), ours)
        assert_arrays(rule, ours, [expected[0], given[1], *expected[2:]], f"coefficients {k}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_any_size(variant: Variant, dtype: Any, runner: Any) -> None:
    """n elements from any element on become what they become in the whole; their neighbours stay as they are."""
    rule = bind(*variant)
    given = inputs(rule, dtype, max(LARGE), share=0.01)
    whole = standard(rule, given)
    for n in (*SIZES, *LARGE):
        lo = min(n % 19, max(LARGE) - n)
        window = slice(max(lo - 8, 0), lo + n + 8)
        inside = slice(min(lo, 8), min(lo, 8) + n)
        ours, expected = [a[window].copy() for a in given], [a[window].copy() for a in given]
        for a, b in zip(expected, whole, strict=True):
            a[inside] = b[lo : lo + n]
        runner(rule, coefficients(rule), [a[inside] for a in ours])
        assert_arrays(rule, ours, expected, f"n={n}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_any_byte_and_cut(variant: Variant, dtype: Any, backend: str) -> None:
    """Arrays that start on any byte, each on another, and any division of them."""
    rule = bind(*variant)
    n, size = 1031, np.dtype(dtype).itemsize
    given = inputs(rule, dtype, n, share=0.1)
    expected = standard(rule, given)
    rng = np.random.default_rng(1)
    for k in range(1, 8):
        ours = []
        for j, a in enumerate(given):
            shift = (k + j) % size
            ours.append(np.zeros((n + 1) * size, np.uint8)[shift : shift + n * size].view(dtype))
            ours[-1][:] = a
        for lo, hi in pairwise([0, *sorted(rng.integers(0, n + 1, k).tolist()), n]):
            run(backend, rule, coefficients(rule), [a[lo:hi] for a in ours])
        assert_arrays(rule, ours, expected, f"shift {k}")


# --- the rows and the printed text ------------------------------------------------------------------------------------


def test_variants_are_what_the_classes_use() -> None:
    """The rows leave out no rule, and no combination with preludes that a class asks for."""
    used = set()
    for case in exact.CASES:
        optimizer = case.optimizer(np.ones(1), **case.arguments, backend="numpy")
        used |= {optimizer._update(group).rule for group in optimizer.param_groups}
    assert used == {bind(*variant) for variant in VARIANTS}
    assert {name for name, _ in VARIANTS} == set(RULES)


def test_header_is_fresh() -> None:
    text = (_cuda_source.folder() / "rules.cuh").read_text()
    assert text == _codegen.rules_header(), "kernels/rules.cuh is stale: run `make kernels`"
    assert "Generated" in text.splitlines()[0]


@pytest.mark.parametrize(("change", "code"), [(("", ""), 0), (("p - lr", "p + lr"), 1)])
def test_stale_header_is_noticed(
    change: tuple[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What `make check` runs, beside a copy of the header."""
    (tmp_path / "kernels").mkdir()
    text = (_cuda_source.folder() / "rules.cuh").read_text()
    (tmp_path / "kernels" / "rules.cuh").write_text(text.replace(*change))
    monkeypatch.setattr(_codegen, "__file__", str(tmp_path / "fused_adam" / "_codegen.py"))
    assert _codegen.main(["--check"]) == code
    assert ("stale" in capsys.readouterr().err) == bool(code)
