"""The CUDA kernel on the CPU: the very text that NVRTC compiles, behind host_shim.h, built by g++."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from bits import LARGEST, Variant
from conftest import missing

from fused_adam._codegen import Rule
from fused_adam.backends._cuda_source import COEFFICIENT_BYTES, CONTROL, MAX_GROUPS, THREADS, source

SHIM = Path(__file__).with_name("host_shim.h")
BUILDS = Path(__file__).parents[1] / "build" / "host"  # kept, and shared by all processes; `make clean` removes it
# Nothing is contracted to an FMA: what the PTX operators of step.cuh see to on a device.
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fPIC", "-include", str(SHIM))
# `#pragma unroll` is NVIDIA's, and a rule may leave a name unused.
FLAGS += ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-unused-parameter")

# Rules with no state, one, two, and the most arrays and coefficients.
FEW: list[Variant] = [("sgd", ()), ("adamw", ()), ("lion", ("maximize", "l2")), LARGEST]

Launch = Callable[[int | range, Any], None]


def compiled(text: str, *flags: str) -> Path:
    """The file that g++ makes of a source; made once, whichever processes ask for it and when."""
    compiler = shutil.which("g++")
    if compiler is None:
        missing("g++ is not installed")
    command = [str(compiler), *FLAGS, *flags]
    key = hashlib.sha256("\0".join([*command, SHIM.read_text(), text]).encode()).hexdigest()[:32]
    BUILDS.mkdir(parents=True, exist_ok=True)
    result, unit, partial = (BUILDS / f"{key}{suffix}" for suffix in (".out", ".cpp", ".partial"))
    with open(unit, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            unit.write_text(text)
            subprocess.run([*command, "-o", str(partial), str(unit)], check=True)
            partial.rename(result)
    return result


def launcher(text: str) -> str:
    """The macro of the shim that runs a kernel: threads take turns only where they may have to wait."""
    return "HOST_LAUNCH_FIBERS" if "__sync" in text or "__shfl" in text else "HOST_LAUNCH"


@cache
def build(text: str, name: str) -> Launch:
    """A kernel from a source text, as launch(blocks, arguments): how many blocks or which of them, and the struct."""
    library = ctypes.CDLL(str(compiled(f"{text}\n{launcher(text)}({name})\n", "-O2", "-shared")))

    def launch(blocks: int | range, arguments: Any) -> None:
        blocks = range(blocks) if isinstance(blocks, int) else blocks
        struct = np.ascontiguousarray(arguments)
        library.launch(
            *(ctypes.c_uint(n) for n in (blocks.start, blocks.stop, THREADS)), ctypes.c_void_p(struct.ctypes.data)
        )

    return launch


class HostKernel:
    """A rule's kernel. Arrays are p, g and the states, 1-D; coefficients are one list, or one for each group.

    control: with on_device, what prologue.cu would have left.
    """

    control: Any = None

    def __init__(self, rule: Rule, dtype: Any, on_device: bool = False) -> None:
        self.source = source(rule, np.dtype(dtype), on_device)
        self.launch = build(self.source.text, self.source.name)
        self.control = np.zeros((), CONTROL) if on_device else None
        self._room = np.zeros((MAX_GROUPS, COEFFICIENT_BYTES // np.dtype(dtype).itemsize), dtype)

    def alone(
        self, coefficients: list[float], arrays: list[Any], chunk: int = 2048, blocks: int | range | None = None
    ) -> None:
        """One segment, in the arguments themselves; by default all of its blocks."""
        arguments = self.arguments([coefficients], chunk)
        arguments["segment"] = self.segment(0, 0, arrays)
        arguments["gradient"] = arrays[1].ctypes.data
        self.launch(-(-arrays[0].size // chunk) if blocks is None else blocks, arguments)

    def table(
        self, groups: Sequence[list[float]], segments: Sequence[tuple[int, list[Any]]], chunk: int = 2048
    ) -> None:
        """Segments, each with its group, in tables."""
        chunks = [-(-arrays[0].size // chunk) for _, arrays in segments]
        firsts = np.cumsum([0, *chunks]).tolist()
        rows = [self.segment(first, *segment) for first, segment in zip(firsts, segments, strict=False)]
        tables = [
            np.array(rows, self.source.segment),
            np.array([arrays[1].ctypes.data for _, arrays in segments], np.int64),
            np.repeat(np.arange(len(segments), dtype=np.int32), chunks),
        ]
        arguments = self.arguments(groups, chunk)
        for name, table in zip(("segments", "gradients", "segment_of_chunk"), tables, strict=True):
            arguments[name] = table.ctypes.data
        self.launch(firsts[-1], arguments)

    def arguments(self, groups: Sequence[list[float]], chunk: int) -> Any:
        arguments = np.zeros((), self.source.arguments)
        arguments["chunk"] = chunk
        where = arguments["coefficients"] if self.control is None else self._room
        where[: len(groups), : len(groups[0])] = groups
        if self.control is not None:
            arguments["control"], arguments["coefficients"] = self.control.ctypes.data, self._room.ctypes.data
        return arguments

    def segment(self, first: int, group: int, arrays: list[Any]) -> tuple[Any, ...]:
        p, _, *states = (a.ctypes.data for a in arrays)
        return arrays[0].size, first, group, p, (*states, 0)[: max(1, len(states))]
