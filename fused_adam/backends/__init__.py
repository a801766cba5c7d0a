"""Which backend runs a step: chosen here, by name or by what is installed and worth its start-up time."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from itertools import compress
from operator import is_
from types import FrameType, ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from fused_adam._arrays import AnyArray, Array, carrier
from fused_adam._cuda_arrays import no_device
from fused_adam._layout import FlatBuffer
from fused_adam._storage import Format

NAMES = ("cupy", "numba-cuda", "numba", "numpy")
_MODULES = {
    "cupy": "fused_adam.backends.cupy_cuda",
    "numba-cuda": "fused_adam.backends.numba_cuda",
    "numba": "fused_adam.backends.numba_cpu",
    "numpy": "fused_adam.backends.numpy_cpu",
}
ON_GPU = NAMES[:2]
# Whose memory a backend keeps its states in.
LIBRARY = {"cupy": "cupy", "numba-cuda": "numba", "numba": "numpy", "numpy": "numpy"}
# From this many elements on, importing Numba pays for itself within a training run.
_WORTH_NUMBA = 2**15
# What "auto" means instead of choosing; read once, so that a step need not ask the environment.
OVERRIDE = os.environ.get("FUSED_ADAM_BACKEND", "")
# The process that imported this: a backend that is loaded in another one was loaded after a fork.
PID = os.getpid()


def reason(name: str) -> str:
    """Why a backend cannot run here, and what to do; "" when it can."""
    if name in ON_GPU:
        package, extra = ("cupy", "cuda13") if name == "cupy" else ("numba_cuda", "numba-cu13")
        if importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed; pip install 'fused-adam[{extra}]'"
        if why := no_device():
            return why
    elif name == "numba" and importlib.util.find_spec("numba") is None:
        return "Numba is not installed; pip install 'fused-adam[cpu]'"
    try:
        unusable: str = getattr(load(name), "unusable", str)()
    except Exception as error:  # versions of Numba, NumPy, Python or CUDA that do not fit, a broken llvmlite, ...
        return f"{name} cannot be imported: {error}; install versions that fit each other"
    return unusable


def backends() -> list[tuple[str, bool, str]]:
    """(name, available, reason) for each backend, fastest first; reason is "" for an available one."""
    return [(name, not why, why) for name in NAMES for why in [reason(name)]]


def check_name(name: object, source: str = "backend") -> str:
    """Raises TypeError or ValueError unless it names a backend or is "auto"."""
    if not isinstance(name, str):
        raise TypeError(f"{source} should be a string, got {name!r}")
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source} should be 'auto' or one of {', '.join(NAMES)}, got {name!r}")
    return name


def choose(name: str, size: int, device: int | None = None) -> str:
    """The backend for a step over `size` elements of host memory, or of that of a GPU.

    "auto" takes FUSED_ADAM_BACKEND if set; else CuPy, then Numba, on a GPU; else, on the host, Numba where it is
    installed and worth it or already loaded; else NumPy. The bits do not depend on the choice. Raises RuntimeError,
    with the fix, for a named backend that cannot run, or not on these arrays.
    """
    chosen = check_name(name)
    source = "backend"
    if chosen == "auto":
        chosen = check_name(OVERRIDE or "auto", source := "FUSED_ADAM_BACKEND")
    if chosen == "auto":
        if device is None:
            worth_it = size >= _WORTH_NUMBA or _MODULES["numba"] in sys.modules
            return "numba" if worth_it and not reason("numba") else "numpy"
        reasons = []
        for candidate in ON_GPU:
            if not (why := reason(candidate)):
                return candidate
            reasons.append(f"{candidate}: {why}")
        raise RuntimeError(f"the arrays are on a GPU and no backend for it is available: {'; '.join(reasons)}")
    why = reason(chosen)
    if why:
        raise RuntimeError(f"{source} {chosen!r} is not available: {why}")
    if (chosen in ON_GPU) != (device is not None):
        where = "host memory" if device is None else "the memory of a GPU"
        fix = "copy them there" if chosen in ON_GPU else "copy them to the host"
        raise RuntimeError(f"{source} {chosen!r} does not step over arrays in {where}; {fix}, or use backend='auto'")
    return chosen


def load(name: str) -> ModuleType:
    """The module of a backend: one loop shell each, with a `Stepper` class."""
    return module(_MODULES[name].rpartition(".")[2])


_importing = threading.RLock()
# What a fork waits for, in this order: in the child, what another thread was importing or compiling would be locked for
# ever. Numba's compiler adds its lock.
HELD_AT_FORK: list[Any] = [_importing]


def module(name: str) -> ModuleType:
    """One of this folder that is imported, and compiled, only where it is needed."""
    with _importing:
        return importlib.import_module(f"fused_adam.backends.{name}")


def _before_fork() -> None:
    for lock in HELD_AT_FORK:
        lock.acquire()


def _after_fork() -> None:
    for lock in reversed(HELD_AT_FORK):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


class Kept(NamedTuple):
    """How numbers are kept that have fewer bits than they are computed with, and what random bits depend on.

    form: the gradient's kind is that of the step under way. declared: what gradients of uint16 hold.
    """

    form: Format
    seed: int
    declared: str | None
    t: int = 0


class Rows(NamedTuple):
    """Parameters and states of one dtype that take the same rule and coefficients.

    dtype: what is computed in. shapes: of each parameter; None where it is in Fortran order. rows: (p, *states) for
    each, all 1-D; behind p its master if it has one. runs: the same memory in as few pieces as a flat buffer's padding
    leaves; empty unless the parameters are one. kept: None where all are of `dtype` themselves. first, run_first: the
    canonical index of the first element of each row and run.
    """

    dtype: np.dtype[Any]
    shapes: list[tuple[int, ...] | None]
    rows: list[tuple[Any, ...]]
    runs: list[tuple[Any, ...]]
    kept: Kept | None = None
    first: Sequence[int] = ()
    run_first: Sequence[int] = ()

    def only(self, keep: Sequence[bool]) -> Rows:
        """Some of the parameters."""
        return Rows(self.dtype, list(compress(self.shapes, keep)), list(compress(self.rows, keep)), [])


class Loose(NamedTuple):
    """Gradients as the caller gave them, to be checked by the backend, each with its name and its parameter.

    given: a copy of the caller's list, if the same objects mean the same memory the next time.
    """

    names: list[str]
    arrays: list[Any]
    parameters: list[AnyArray]
    given: Sequence[Any] = ()

    def only(self, keep: Sequence[bool]) -> Loose:
        """Some of them."""
        return Loose(*(list(compress(x, keep)) for x in (self.names, self.arrays, self.parameters)))

    def is_of(self, grads: list[Any]) -> bool:
        return len(grads) == len(self.given) and all(map(is_, grads, self.given))


Gradients = FlatBuffer | Loose


class Placed(NamedTuple):
    """Gradients that the caller has checked, each in the memory order of its parameter, and keeps during the step.

    Where parameters are kept in fewer bits, they are of the kind that the part's form says.

    addresses, nbytes: of each, int64.
    """

    addresses: Array
    nbytes: Array

    def arrays(self, part: Rows) -> list[Array]:
        """Those in host memory, 1-D."""
        each = zip(self.addresses.tolist(), self.nbytes.tolist(), strict=True)
        dtype = part.dtype if part.kept is None else carrier(part.kept.form.g)
        return [np.frombuffer((ctypes.c_byte * n).from_address(a), dtype) if n else _NOTHING for a, n in each]


_NOTHING = np.empty(0)


class DeferredInterrupt:
    """Ctrl-C while the block runs is delivered after it. Only the main thread is ever interrupted.

    With the C functions behind the signal module: its own make enums, which could fail for want of memory at the end.
    """

    def __enter__(self) -> None:
        self._pending: FrameType | None = None
        self._hit = False
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread() and callable(_signal.getsignal(_signal.SIGINT)):
            self._previous = _signal.signal(_signal.SIGINT, self._defer)

    def _defer(self, number: int, frame: FrameType | None) -> None:
        self._hit, self._pending = True, frame

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._previous is not None:
            _signal.signal(_signal.SIGINT, self._previous)
            if self._hit:
                self._previous(_signal.SIGINT, self._pending)
