"""The GPU side of the commands: which one there is, and arrays on it. CuPy and Numba are imported only to be used."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fused_adam._cuda_arrays import no_device
from fused_adam.backends import ON_GPU, reason
from fused_adam.cli.exit_codes import CommandError, Exit

DEVICES = ("cpu", "cuda")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def facts() -> dict[str, str]:
    """The driver and each GPU, as the driver itself describes them; empty where there is none."""
    if no_device():
        return {}
    driver = ctypes.CDLL("libcuda.so.1")
    number, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(100)

    def asked(function: str, *arguments: Any) -> int:
        getattr(driver, function)(ctypes.byref(number), *arguments)
        return number.value

    cuda = asked("cuDriverGetVersion")
    version = Path("/sys/module/nvidia/version")  # absent under WSL
    versions = [version.read_text().strip()] if version.is_file() else []
    found = {"driver": ", ".join([*versions, f"for CUDA {cuda // 1000}.{cuda % 1000 // 10}"])}
    for k in range(asked("cuDeviceGetCount")):
        device = asked("cuDeviceGet", k)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        capability = f"{asked('cuDeviceGetAttribute', _MAJOR, device)}.{asked('cuDeviceGetAttribute', _MINOR, device)}"
        found[f"GPU {k}"] = f"{name.value.decode()}, {size.value / 2**30:.1f} GiB, compute capability {capability}"
    return found


def require(backend: str) -> None:
    """Raises CommandError unless the named backend can run."""
    if why := reason(backend):
        raise CommandError(f"backend {backend!r} is not available: {why}", Exit.UNAVAILABLE)


def arrays(device: str, backend: str) -> Any:
    """The module whose arrays a training on the device uses. Raises CommandError where it or the backend cannot run."""
    if backend in ON_GPU:
        require(backend)
    if device == "cpu":
        if backend in ON_GPU:
            raise CommandError(f"backend {backend!r} steps over arrays on a GPU; add --device cuda", Exit.UNAVAILABLE)
        return np
    if why := reason("cupy"):
        raise CommandError(f"--device cuda needs CuPy and a GPU: {why}", Exit.UNAVAILABLE)
    if backend not in ("auto", *ON_GPU):
        fix = f"leave out --device cuda, or name {' or '.join(ON_GPU)}"
        raise CommandError(f"backend {backend!r} steps over arrays in host memory; {fix}", Exit.UNAVAILABLE)
    return import_module("cupy")


def copy_to(backend: str, a: Any) -> Any:
    """A copy of a NumPy array in the memory that the backend steps over."""
    if backend == "cupy":
        return import_module("cupy").asarray(a)
    if backend == "numba-cuda":
        return import_module("numba.cuda").to_device(a)
    return a.copy()


def to_host(backend: str, a: Any) -> Any:
    """What `copy_to` made, as a NumPy array."""
    if backend == "cupy":
        return a.get()
    return a.copy_to_host() if backend == "numba-cuda" else a
