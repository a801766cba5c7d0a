"""Prints, as a line of JSON for each rule, what Numba makes of its CUDA kernel of one dtype, without a GPU.

    numba_ptx.py float32          [name, PTX]
    numba_ptx.py float32 link     [name, what the linker says], for the rules with the most arrays
    numba_ptx.py float32 rows     [name, PTX] of the kernels over rows, for some rules
    numba_ptx.py float32 rows link

Exits with 3, and the reason, where a library of the CUDA toolkit is missing, or Numba does not fit NumPy.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
from bits import LARGEST
from cuda.bindings import nvjitlink, nvvm
from numba import cuda, types
from numba_cuda_cases import FEWER
from rows_cases import RULES

from fused_adam._codegen import Rule, bind
from fused_adam.backends._numba_cuda_kernels import OPTIONS, kernel
from fused_adam.backends._numba_cuda_rows import options, rows_kernel

LARGE = [LARGEST, ("adamw", ()), ("rmsprop_centered_momentum", ("maximize", "l2"))]


def compiled(rule: Rule, output: str) -> Any:
    dtype, rows = np.dtype(sys.argv[1]), "rows" in sys.argv
    function = (rows_kernel if rows else kernel)(rule, dtype).py_func
    about: dict[str, Any] = {"device": False, "abi": "numba", "cc": (9, 0), "output": output}
    return cuda.compile(function, (types.int64,), **about, **(options(dtype) if rows else OPTIONS))[0]


def linked(rule: Rule) -> str:
    """As on a device, where Numba finds nvJitLink: it optimizes at that time."""
    code = compiled(rule, "ltoir")
    flags = ["-arch=sm_90", "-lto", "-verbose"]
    linker = nvjitlink.create(len(flags), flags)
    nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), rule.name)
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
    for rule in [bind(*variant) for variant in LARGE] if link else RULES if "rows" in sys.argv else FEWER:
        print(json.dumps([rule.name, linked(rule) if link else compiled(rule, "ptx")]))
