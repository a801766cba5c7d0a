"""What NVRTC makes of kernels/stored.cu, without a GPU: every kernel that is offered, down to the instructions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from stored_cases import ALL, SMALLEST, bound, kernel_id
from test_cuda_compile import ARCHITECTURES, OPTIONS, compiled, memory_opcodes, resources, tool
from test_cuda_stored import FEW
from test_storage_compile import assert_floats

from fused_adam._arrays import carrier
from fused_adam._codegen import Rule
from fused_adam._storage import Format
from fused_adam.backends._cuda_source import stored_source

# All are compiled for one architecture, with random bits one rule of them; these for every one, and with the scalars on
# the device for two.
COMPILED = [(rule, form) for rule, form in ALL if rule == "adamw" or not form.stochastic_rounding]
ELSEWHERE = [(kernel, a, False) for kernel in FEW for a in ARCHITECTURES]
ELSEWHERE += [(kernel, a, True) for kernel in FEW for a in (75, 90)]


def widths(rule: Rule, form: Format) -> tuple[Counter[int], Counter[int]]:
    """Bytes of the accesses by which a thread loads and stores 8 elements at once, and how many of each there are."""
    kinds = [form.p, *([form.master] if form.master else []), *[form.states] * len(rule.states)]
    reads = [form.g, *kinds[form.master == "float32" :]]

    def each(some: list[str]) -> Counter[int]:
        sizes = [8 * carrier(kind).itemsize for kind in some]
        return Counter([min(n, 16) for n in sizes for _ in range(-(-n // 16))])

    return each(reads), each(kinds)


def assert_sass(rule: Rule, form: Format, sass: str) -> None:
    """16 bytes an access, or 8 for what has 8 bits an element; nothing goes through local memory."""
    found = memory_opcodes(sass)
    assert not {"LDL", "STL", "ST"} & {k.split(".")[0] for k in found}  # LD may read the arguments
    for opcode, expected in zip(("LDG", "STG"), widths(rule, form), strict=True):
        wide: Counter[int] = Counter()
        for name, n in found.items():
            # The pointers of a segment have 8 bytes too; only what is read once, and so evicted first, has as data.
            if name.startswith(opcode) and name.endswith((".128", ".EF.64")):
                wide[16 if name.endswith(".128") else 8] += n
        assert wide == expected, f"{opcode}: {wide} instead of {expected}"


@pytest.mark.parametrize("kernel", COMPILED, ids=kernel_id)
def test_every_kernel(kernel: tuple[str, Format], tmp_path: Path) -> None:
    rule, form = bound(kernel[0]), kernel[1]
    made = stored_source(rule, form)
    assert "#include" not in made.text
    ptx, cubin = compiled(made.text, 90)
    assert_floats(ptx, "setp.neu", "ld.global.nc")
    path = tmp_path / "cubin"
    path.write_bytes(cubin)
    used = resources(made.name, path)
    assert used.pop("REG") <= (80 if form.stochastic_rounding else 64)  # for three and four blocks of 256 threads
    assert used == {"STACK": 0, "SHARED": 0, "LOCAL": 0}
    assert_sass(rule, form, tool("nvdisasm", path, "-c", "-ndf"))


@pytest.mark.parametrize(("kernel", "architecture", "on_device"), ELSEWHERE, ids=str)
def test_elsewhere(kernel: tuple[str, Format], architecture: int, on_device: bool, tmp_path: Path) -> None:
    made = stored_source(bound(kernel[0]), kernel[1], on_device)
    ptx, cubin = compiled(made.text, architecture)
    assert_floats(ptx, "setp.neu", "ld.global.nc")
    path = tmp_path / "cubin"
    path.write_bytes(cubin)
    used = resources(made.name, path)
    assert {name: used[name] for name in ("STACK", "SHARED", "LOCAL")} == {"STACK": 0, "SHARED": 0, "LOCAL": 0}


@pytest.mark.parametrize("architecture", [90, 100])  # NVRTC 13.0 optimizes differently from sm_100 on
def test_no_option_changes_a_byte(architecture: int) -> None:
    text = stored_source(bound("adamw"), SMALLEST._replace(stochastic_rounding=True)).text
    first, *rest = [compiled(text, architecture, options) for options in OPTIONS]
    assert all(result == first for result in rest)


def test_the_structs_are_those_of_the_host() -> None:
    made = stored_source(bound("adamw"), SMALLEST)
    for right, wrong in (("int64 seed;", "int64 seed, more;"), ("char *p, *master, *scales;", "char *p, *master;")):
        assert made.text.count(right) == 1
        with pytest.raises(ValueError, match=r"the host lays the arguments out differently|scales"):
            compiled(made.text.replace(right, wrong), 90)
    assert np.dtype(made.arguments).itemsize <= 4096
