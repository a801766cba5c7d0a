"""Show the environment: backends, versions, GPUs, threads, caches and variables."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import fused_adam
from fused_adam.cli import console, gpu
from fused_adam.cli.exit_codes import Exit

BACKENDS = ("auto", "cupy", "numba-cuda", "numba", "numpy")
_PACKAGES = ("numpy", "numba", "llvmlite", "numba-cuda", "torch", "scikit-learn", "matplotlib", "plotext", "rich")
_CUPY = ("cupy", "cupy-cuda12x", "cupy-cuda13x")  # the same module under three names
_VARIABLES = (
    "FUSED_ADAM_", "NUMBA_", "OMP_", "GOMP_", "KMP_", "TBB_", "OPENBLAS_", "MKL_", "CUPY_", "CUDA_", "NO_COLOR",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    report = collect()
    if args.json:
        console.emit_json(report)
        return Exit.OK
    rows = [
        [b["name"], "yes" if b["available"] else "no", "; fix: ".join(filter(None, (b["reason"], b["fix"])))]
        for b in report["backends"]
    ]
    console.table("backends", ["name", "available", "reason"], rows)
    for section in ("versions", "machine", "gpu", "threads", "caches", "environment"):
        values = {k: "not installed" if v is None else str(v) for k, v in report[section].items()}
        console.table(section, ["", ""], [[k, v] for k, v in values.items()] or [["(none)", ""]])
    return Exit.OK


def collect() -> dict[str, Any]:
    """Everything that can change which backend runs or how fast. Imports CuPy only beside a GPU, and never PyTorch."""
    backends = []
    for name, available, why in fused_adam.backends():
        reason, _, fix = why.partition("; ")  # messages say what is wrong, then what to do
        backends.append({"name": name, "available": available, "reason": reason, "fix": fix})
    numba_works = any(b["name"] == "numba" and b["available"] for b in backends)
    found = versions()
    caches = {"numba kernels": _numba_cache()} if numba_works else {}
    if found["cupy"]:
        caches["cupy kernels"] = _cupy_cache()
    return {
        "backends": backends,
        "versions": found,
        "machine": {
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "cpu": _cpu_name(),
            "cpu count": os.cpu_count(),
            "cpus this process may use": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        },
        "gpu": gpu.facts(),
        "threads": _numba_threads() if numba_works else {},
        "caches": caches,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages, from their metadata: importing them would take seconds."""
    found: dict[str, str | None] = {"fused_adam": fused_adam.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = _version(name)
    found["cupy"] = next(filter(None, map(_version, _CUPY)), None)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """From Linux, which names the model; elsewhere what Python knows."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _numba_threads() -> dict[str, Any]:
    """Asked after a step large enough to start the threads, because Numba chooses their layer then."""
    numba: Any = import_module("numba")
    p, g = np.zeros((2, 2**18), np.float32)
    fused_adam.SGD(p, backend="numba").step(g)
    return {"numba threads": numba.get_num_threads(), "numba threading layer": numba.threading_layer()}


def _numba_cache() -> str:
    """Where Numba keeps compiled kernels: NUMBA_CACHE_DIR, else beside the source, else a folder of the user's."""
    numba: Any = import_module("numba")
    package = Path(fused_adam.__file__).parent
    if numba.config.CACHE_DIR:
        folder, why = Path(numba.config.CACHE_DIR), " (NUMBA_CACHE_DIR)"
    elif os.access(package, os.W_OK):
        folder, why = package, ""
    else:
        return "in Numba's folder for this user, since the package's own is read-only"
    return _contents(folder, "*.nbc") + why


def _cupy_cache() -> str:
    """Where CuPy keeps compiled kernels, read as it reads it: importing it would take a second."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return "in memory only, compiled anew in each process (CUPY_CACHE_IN_MEMORY)"
    named = os.environ.get("CUPY_CACHE_DIR")
    folder = Path(named) if named is not None else Path.home() / ".cupy" / "kernel_cache"
    return _contents(folder, "*.cubin") + (" (CUPY_CACHE_DIR)" if named is not None else "")


def _contents(folder: Path, pattern: str) -> str:
    files = list(folder.rglob(pattern))
    size = sum(f.stat().st_size for f in files)
    return f"{len(files)} compiled functions, {size / 1e6:.1f} MB, under {folder}"
