"""Every argument check and every error message: what is wrong, what was given, what to do. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from fused_adam._arrays import BFLOAT16, DTYPES, AnyArray, Array, CudaArray, address, carried, kind_of, order, ravel
from fused_adam._cuda_arrays import LEGACY_STREAM, view


def kind(x: Any) -> str:
    """How a message calls something that is not what it should be."""
    if isinstance(x, np.generic):
        return f"a NumPy scalar of {x.dtype}"
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return f"a NumPy array of {x.dtype}"
    if x is None:
        return "None"
    t = type(x)
    module = "" if t.__module__ in ("builtins", "__main__") else t.__module__.split(".")[0] + "."
    return f"a {module}{t.__name__}"


# --- arrays -----------------------------------------------------------------------------------------------------------


def array(name: str, a: Any, stream: int = LEGACY_STREAM) -> AnyArray:
    """A float32 or float64 array in native byte order, on the host or a GPU. Raises TypeError or ValueError."""
    found: AnyArray | None = view(name, a, stream)
    if found is None:
        if not isinstance(a, np.ndarray) or isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"{name} should be a NumPy array or one on a GPU, got {kind(a)}")
        found = a
    if found.dtype not in DTYPES:
        if found.dtype.newbyteorder() in DTYPES:
            raise ValueError(f"{name} has the byte order of another machine; pass {name}.astype({found.dtype.name!r})")
        raise ValueError(f"{name} has dtype {kind_of(found.dtype) or found.dtype}; expected float32 or float64")
    return found


def kept(name: str, a: Any, declared: str | None = None, stream: int = LEGACY_STREAM) -> tuple[AnyArray, str]:
    """An array of 64, 32 or 16 bits in its carrier, and what its numbers are called. declared: what uint16 holds.

    Raises TypeError or ValueError.
    """
    found: AnyArray | None = view(name, a, stream)
    if found is None and isinstance(a, np.ndarray) and not isinstance(a, np.ma.MaskedArray):
        found = a
    if found is not None:
        kind = kind_of(found.dtype, declared)
        if kind in ("float16", "bfloat16"):
            if found.size and address(found) % 2:
                raise ValueError(f"{name} is not aligned; pass a copy")
            return carried(found, kind), kind
        if found.dtype == np.uint16:
            raise ValueError(f"{name} has dtype uint16; if it holds bfloat16 say so, with dtype='bfloat16'")
    found = array(name, a, stream)
    return found, found.dtype.name


def device(a: AnyArray) -> int | None:
    """The number of the GPU that an array lies on, -1 if it is empty and lies on none; None for host memory."""
    return a.device if isinstance(a, CudaArray) else None


def place(device: int | None) -> str:
    return "host memory" if device is None else f"the memory of GPU {device}" if device >= 0 else "that of a GPU"


def same_place(name: str, x: int | None, other: str, y: int | None) -> None:
    """Both in host memory, or both on the same GPU."""
    if x != y and (x is None or y is None or (x >= 0 and y >= 0)):
        raise ValueError(f"{name} is in {place(x)} but {other} is in {place(y)}; copy one to where the other is")


def together(name: str, a: AnyArray, other: str, b: AnyArray) -> None:
    same_place(name, device(a), other, device(b))


def _contiguous(name: str, a: AnyArray) -> None:
    if not order(a):
        why = "is not contiguous" if isinstance(a, CudaArray) else f"is not contiguous (strides {a.strides})"
        if isinstance(a, CudaArray):
            raise ValueError(f"{name} {why}; pass cupy.ascontiguousarray({name}) or a copy")
        why = "is broadcast (a stride is 0)" if 0 in a.strides else why
        raise ValueError(f"{name} {why}; pass np.ascontiguousarray({name})")


def _writable(name: str, a: AnyArray) -> None:
    if not (a.writable if isinstance(a, CudaArray) else a.flags.writeable):
        raise ValueError(f"{name} is read-only; pass a writable array or a copy")


def parameters(named: list[tuple[str, Any]], declared: str | None = None) -> tuple[list[AnyArray], list[str]]:
    """Every parameter of an optimizer and its kind: type, dtype, stride, writable, in one place, no memory shared.

    declared: what uint16 holds.
    """
    if not named:
        raise ValueError("params is empty; pass at least one array")
    found = [kept(name, p, declared) for name, p in named]
    arrays = [p for p, _ in found]
    for (name, _), p in zip(named, arrays, strict=True):
        if not order(p):
            # unlike a gradient, a parameter cannot be replaced by a copy: it is updated in place
            strides = "" if isinstance(p, CudaArray) else f" (strides {p.strides})"
            raise ValueError(f"{name} is not contiguous{strides}; make it so before it is used")
        _writable(name, p)
    first = next((k for k, p in enumerate(arrays) if p.size), 0)
    for (name, _), p in zip(named, arrays, strict=True):
        together(name, p, named[first][0], arrays[first])
    extents = sorted(
        (address(p), address(p) + p.nbytes, name) for (name, _), p in zip(named, arrays, strict=True) if p.size
    )
    for (_, end, one), (start, _, other) in pairwise(extents):
        if start < end:
            raise ValueError(f"{one} and {other} share memory; pass each parameter once")
    return arrays, [kind for _, kind in found]


def kept_gradient(name: str, g: Any, p: AnyArray, declared: str | None, stream: int = LEGACY_STREAM) -> tuple[Any, str]:
    """A gradient of 32 or 16 bits as a 1-D array in the memory order of p, and its kind.

    stream: that of the step, for gradients on a GPU.
    """
    if g is None:
        raise TypeError(f"{name} is None; pass an array, or leave the parameter out of params to freeze it")
    found, kind = kept(name, g, declared, stream)
    if found.shape != p.shape:
        raise ValueError(f"{name} has shape {found.shape} but the parameter has {p.shape}")
    together(name, found, "the parameter", p)
    _contiguous(name, found)
    if isinstance(found, CudaArray):
        _same_order_on_device(name, found, p)
        return ravel(found), kind
    return ravel(np.ascontiguousarray(found) if order(p) == "C" else np.asfortranarray(found)), kind


def one_kind(name: str, kinds: Iterable[str]) -> str:
    """That of gradients of which the first has this name. Raises ValueError for several."""
    kind, *more = sorted(set(kinds))
    if more:
        raise ValueError(f"gradients from {name} on have the dtypes {', '.join([kind, *more])}; make them alike")
    return kind


def _same_order_on_device(name: str, g: CudaArray, p: AnyArray) -> None:
    if order(g) != order(p) and g.ndim > 1:
        raise ValueError(f"{name} is in {order(g)} order but the parameter is in {order(p)} order; make them alike")


def gradient(name: str, g: Any, p: AnyArray, stream: int = LEGACY_STREAM) -> Any:
    """A gradient as a 1-D array in the memory order of its parameter p (a copy only when the orders differ).

    stream: that of the step, for gradients on a GPU.
    """
    plain = type(g) is np.ndarray and g.shape == p.shape and g.dtype == p.dtype and not isinstance(p, CudaArray)
    if plain and g.flags.c_contiguous and p.flags.c_contiguous:  # type: ignore[union-attr] # quickly
        return g.reshape(-1)
    if isinstance(g, np.generic) and p.ndim == 0:  # what NumPy's reductions return
        g = np.asarray(g)
    if g is None:
        raise TypeError(f"{name} is None; pass an array, or leave the parameter out of params to freeze it")
    g = array(name, g, stream)
    if g.shape != p.shape:
        raise ValueError(f"{name} has shape {g.shape} but the parameter has {p.shape}")
    if g.dtype != p.dtype:
        raise ValueError(f"{name} has dtype {g.dtype} but the parameter has {p.dtype}; pass .astype({p.dtype.name!r})")
    together(name, g, "the parameter", p)
    _contiguous(name, g)
    if isinstance(g, CudaArray):
        _same_order_on_device(name, g, p)
        return ravel(g)
    if order(p) == "C":
        return ravel(g if g.flags.c_contiguous else np.ascontiguousarray(g))
    return ravel(g if g.flags.f_contiguous else np.asfortranarray(g))


def zeroable(given: Sequence[Any]) -> None:
    """Gradients that a step is to zero: writable, in the memory order of their parameters, no two sharing memory.

    given: flat buffers, gradients that were placed (addresses, nbytes), or (names, arrays, parameters, ...) of ones
    that are right in all else.
    """
    extents: list[tuple[int, int, int]] = []  # start, end and the position of its name
    called: list[str] = []
    for some in given:
        if hasattr(some, "runs"):
            _writable("the flat buffer of gradients", view("it", some.data) or some.data)
            nbytes = some.layout.total * some.layout.dtype.itemsize
            extents.append((some.address, some.address + nbytes, len(called)))
            called.append("a flat buffer of gradients")
            continue
        if hasattr(some, "nbytes"):
            for start, n in zip(some.addresses.tolist(), some.nbytes.tolist(), strict=True):
                if n:
                    extents.append((start, start + n, len(called)))
                    called.append("the gradients of two parameters")
            continue
        names, arrays, parameters = some[:3]
        for name, given_g, p in zip(names, arrays, parameters, strict=True):
            g, _ = kept(name, given_g, declared="bfloat16")
            _writable(name, g)
            if not _same_order(g, p):
                orders = f"{order(g)} order but its parameter in {order(p)} order"
                raise ValueError(f"{name} is in {orders}; make them alike for zero_grads")
            if g.size:
                extents.append((address(g), address(g) + g.nbytes, len(called)))
                called.append(name)
    for (_, end, one), (start, _, other) in pairwise(sorted(extents)):
        if start < end:
            names = " and ".join(dict.fromkeys(called[k] for k in sorted((one, other))))
            raise ValueError(f"{names} share memory; zero_grads needs a gradient of its own for each")


class Extents:
    """The memory that a step writes, to ask whether a gradient lies in it."""

    def __init__(self, arrays: Iterable[AnyArray]) -> None:
        extents = sorted((address(a), address(a) + a.nbytes) for a in arrays if a.size)
        self._starts = np.array([e[0] for e in extents], np.int64)
        self._ends = np.array([e[1] for e in extents], np.int64)

    def first_overlap(self, starts: Array, nbytes: Array) -> int:
        """The index of the first [start, start + nbytes) that overlaps, or -1."""
        if not len(self._starts):
            return -1
        k = np.minimum(self._ends.searchsorted(starts, "right"), len(self._ends) - 1)
        hit = (self._starts[k] < starts + nbytes) & (starts < self._ends[k]) & (nbytes > 0)
        return int(hit.argmax()) if hit.any() else -1

    def refuse(self, name: str, a: AnyArray) -> None:
        """Raises ValueError if an array lies in it."""
        if self.first_overlap(np.array([address(a)], np.int64), np.array([a.nbytes], np.int64)) >= 0:
            raise overlap(name)


def overlap(name: str) -> ValueError:
    return ValueError(f"{name} overlaps a parameter or a state that the step writes; pass a copy")


def step_arrays(arrays: dict[str, Any]) -> list[Any]:
    """p, g, m, v (and max_v) of `adam_step`, as 1-D views. Raises TypeError or ValueError."""
    p = array("p", arrays["p"])
    plain = type(p) is np.ndarray and p.flags.carray  # C-contiguous, aligned and writable in one question
    views = []
    for name, a in arrays.items():
        if plain and type(a) is np.ndarray and a.dtype == p.dtype and a.shape == p.shape and a.flags.carray:
            views.append(ravel(a))
            continue
        a = array(name, a)
        if a.shape != p.shape:
            raise ValueError(f"{name} has shape {a.shape} but p has {p.shape}")
        if a.dtype != p.dtype:
            raise ValueError(f"{name} has dtype {a.dtype} but p has {p.dtype}")
        together(name, a, "p", p)
        _contiguous(name, a)
        if not _same_order(a, p):
            raise ValueError(f"{name} is in {order(a)} order but p is in {order(p)} order; make them alike")
        if name != "g":
            _writable(name, a)
        views.append(ravel(a))
    extents = [(address(x), address(x) + x.nbytes) for x in views]
    for (first, x), (second, y) in combinations(zip(arrays, extents, strict=True), 2):
        if x[0] < y[1] and y[0] < x[1] and views[0].size:
            raise ValueError(f"{first} and {second} share memory; pass arrays that do not overlap")
    return views


def _same_order(a: AnyArray, b: AnyArray) -> bool:
    """Both in C or both in Fortran order; vectors are in both."""
    if isinstance(a, CudaArray) or isinstance(b, CudaArray):
        return order(a) == order(b)
    x, y = a.flags, b.flags
    return bool((x.c_contiguous and y.c_contiguous) or (x.f_contiguous and y.f_contiguous))


def flatten(named: list[tuple[str, Any]], dtype: Any) -> tuple[list[tuple[int, ...]], np.dtype[Any]]:
    """The arrays' shapes and the dtype of a flat buffer of them. Raises TypeError or ValueError."""
    if not named:
        raise ValueError("tree is empty; pass at least one array")
    chosen: np.dtype[Any] | None = None
    if dtype is not None:
        try:
            chosen = np.dtype("u2" if isinstance(dtype, str) and dtype == "bfloat16" else dtype)
        except (TypeError, ValueError, SyntaxError) as error:
            raise TypeError(f"dtype should be float32, float64, float16 or bfloat16, got {dtype!r}") from error
        if not kind_of(chosen, dtype if isinstance(dtype, str) else None):
            raise ValueError(f"dtype should be float32, float64, float16 or bfloat16, got {chosen}")
    arrays = [_flattened(name, a) if chosen is None else _convertible(name, a, chosen) for name, a in named]
    for (name, _), a in zip(named, arrays, strict=True):
        if chosen is None and a.dtype != arrays[0].dtype:
            raise ValueError(
                f"{name} has dtype {a.dtype} but {named[0][0]} has {arrays[0].dtype}; pass dtype= to convert"
            )
        together(name, a, named[0][0], arrays[0])
    return [a.shape for a in arrays], chosen or arrays[0].dtype


def _flattened(name: str, a: Any) -> Any:
    """An array of a dtype that a flat buffer can have."""
    found = view(name, a)
    if found is not None and found.dtype == BFLOAT16:
        raise ValueError(f"{name} holds bfloat16, of which NumPy has no dtype of its own; pass dtype='bfloat16'")
    held: Any = a if found is None and isinstance(a, np.ndarray) else found
    return held if held is not None and kind_of(held.dtype) in ("float16", "bfloat16") else array(name, a)


def _convertible(name: str, a: Any, chosen: np.dtype[Any]) -> Any:
    """Any array of numbers, as it is."""
    found: Any = view(name, a)
    if found is None:
        if not isinstance(a, np.ndarray | np.generic) or isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"{name} should be a NumPy array or one on a GPU, got {kind(a)}")
        found = a
    if found.dtype.kind not in "fiub" and kind_of(found.dtype) != "bfloat16":
        raise ValueError(f"{name} has dtype {found.dtype}, which does not convert to {chosen}")
    return found


# --- state dicts ------------------------------------------------------------------------------------------------------


def same_keys(name: str, given: Any, expected: Iterable[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} should be a dict, got {kind(given)}")
    expected = list(expected)
    if set(given) != set(expected):
        raise ValueError(f"{name} should have the keys {expected}, got {list(given)}")


def state(name: str, a: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    found = array(name, a)
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{name} has shape {found.shape} and dtype {found.dtype}; expected {shape} and {dtype}")
