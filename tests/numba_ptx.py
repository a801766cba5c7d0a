"""Prints, as a line of JSON for each rule, what Numba makes of its CUDA kernel of one dtype, without a GPU.

    numba_ptx.py float32          [name, PTX]
    numba_ptx.py float32 link     [name, what the linker says], for the rules with the most arrays
    numba_ptx.py float32 rows     [name, PTX] of the kernels over rows, for some rules
    numba_ptx.py float32 rows link
    numba_ptx.py float32 norm     [name, PTX] of the kernel of the norm
    numba_ptx.py float32 norm link

Exits with 3, and the reason, where a library of the CUDA toolkit is missing, or Numba does not fit NumPy.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from bits import LARGEST
from cuda.bindings import nvjitlink, nvvm
from numba import cuda, types
from numba_cuda_cases import FEWER, GUARDED
from rows_cases import RULES

from fused_adam._codegen import Rule, bind
from fused_adam.backends._numba_cuda_kernels import OPTIONS, kernel
from fused_adam.backends._numba_cuda_norm import norm_kernel
from fused_adam.backends._numba_cuda_rows import options, rows_kernel

LARGE = [bind(*LARGEST), bind("adamw"), bind("rmsprop_centered_momentum", ("maximize", "l2"))]


def compiled(rule: Rule | None, output: str) -> Any:
    """rule: None for the norm."""
    dtype, rows = np.dtype(sys.argv[1]), "rows" in sys.argv
    function = norm_kernel(dtype) if rule is None else (rows_kernel if rows else kernel)(rule, dtype)
    about: dict[str, Any] = {"device": False, "abi": "numba", "cc": (9, 0), "output": output}
    return cuda.compile(function.py_func, (types.int64,), **about, **(options(dtype) if rows else OPTIONS))[0]


def linked(rule: Rule | None, name: str) -> str:
    """As on a device, where Numba finds nvJitLink: it optimizes at that time."""
    code = compiled(rule, "ltoir")
    flags = ["-arch=sm_90", "-lto", "-verbose"]
    linker = nvjitlink.create(len(flags), flags)
    nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), name)
    nvjitlink.complete(linker)
    log = bytearray(nvjitlink.get_info_log_size(linker))
    nvjitlink.get_info_log(linker, log)
    nvjitlink.destroy(linker)
    return log.decode()


if __name__ == "__main__":
    link = "link" in sys.argv
    try:
        (nvjitlink if link else nvvm).version()
        importlib.import_module("numba.cuda.np.arrayobj")  # wants numpy.row_stack, which NumPy 2.5 does not have
    except (RuntimeError, AttributeError) as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    rules: Sequence[Rule | None] = RULES if "rows" in sys.argv else [*FEWER, *GUARDED]
    if link:
        rules = LARGE if "rows" in sys.argv else [*LARGE, *GUARDED[-2:]]
    for rule in [None] if "norm" in sys.argv else rules:
        name = "norm" if rule is None else rule.name
        print(json.dumps([name, linked(rule, name) if link else compiled(rule, "ptx")]))
