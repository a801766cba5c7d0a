"""Parameters <-> one flat buffer: segments on multiples of 128 elements, and views in the parameters' structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from fused_adam import _checks, _memory, _storage
from fused_adam._arrays import BLOCK, address
from fused_adam._cuda_arrays import view


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, array) for each array of nested dicts, lists and tuples, in order."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from leaves(child, f"{path}[{_quoted(key)}]")
    elif isinstance(tree, list | tuple):
        for k, child in enumerate(tree):
            yield from leaves(child, f"{path}[{k}]")
    elif isinstance(tree, FlatBuffer):
        yield from leaves(tree.tree, path)
    else:
        yield path, tree


def match(tree: Any, like: Any, path: str) -> Iterator[Any]:
    """The arrays of `tree` in the order of `like`'s. Raises ValueError where their structures differ."""
    if isinstance(tree, FlatBuffer):
        tree = tree.tree
    if isinstance(like, FlatBuffer):
        like = like.tree
    if isinstance(like, Mapping):
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path} should be a dict like the parameters, got {_checks.kind(tree)}")
        for key in tree:
            if key not in like:
                raise ValueError(f"{path}[{_quoted(key)}] has no parameter; the parameters are {_keys(like)}")
        for key, child in like.items():
            if key not in tree:
                raise ValueError(f"{path}[{_quoted(key)}] is missing; {path} has {_keys(tree)}")
            yield from match(tree[key], child, f"{path}[{_quoted(key)}]")
    elif isinstance(like, list | tuple):
        if not isinstance(tree, list | tuple):
            raise ValueError(f"{path} should be a list like the parameters, got {_checks.kind(tree)}")
        if len(tree) != len(like):
            raise ValueError(f"{path} has {len(tree)} entries but there are {len(like)} parameters")
        for k, child in enumerate(like):
            kind = type(tree[k])
            if kind is type(child) and kind not in (dict, tuple):  # an array like the parameter, quickly
                yield tree[k]
            else:
                yield from match(tree[k], child, f"{path}[{k}]")
    elif isinstance(tree, Mapping | list | tuple):
        raise ValueError(f"{path} should be one array like the parameter, got {_checks.kind(tree)}")
    else:
        yield tree


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def _keys(d: Mapping[Any, Any]) -> str:
    return ", ".join(map(_quoted, d)) or "empty"


def rebuild(tree: Any, make: Callable[[Any], Any]) -> Any:
    """The same structure as dicts and tuples, with make(leaf) for each leaf, in order."""
    if isinstance(tree, FlatBuffer):
        tree = tree.tree
    if isinstance(tree, Mapping):
        return {key: rebuild(child, make) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return tuple(rebuild(child, make) for child in tree)
    return make(tree)


def _read_only(tree: Any) -> Any:
    """Replacing a view in the tree would be ignored by the next step, so the tree refuses it."""
    if isinstance(tree, dict):
        return MappingProxyType({key: _read_only(child) for key, child in tree.items()})
    return tuple(map(_read_only, tree)) if isinstance(tree, tuple) else tree


@dataclass(frozen=True)
class Segment:
    """One parameter: elements offset .. offset + size of the buffer."""

    path: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies. structure: the parameters' tree with the number of a segment for each array."""

    dtype: np.dtype[Any]
    segments: tuple[Segment, ...]
    structure: Any
    total: int

    @staticmethod
    def of(tree: Any, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> Layout:
        """shapes: of the tree's arrays, in order."""
        segments = []
        offset = 0
        for (path, _), shape in zip(leaves(tree, ""), shapes, strict=True):
            segments.append(Segment(path, shape, offset, prod(shape)))
            offset += -(-segments[-1].size // BLOCK) * BLOCK
        numbers = iter(range(len(segments)))
        return Layout(dtype, tuple(segments), rebuild(tree, lambda _: next(numbers)), offset)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """[start, end) of each stretch without padding. A step never sees padding: eps = 0 would make it NaN."""
        runs: list[tuple[int, int]] = []
        for s in self.segments:
            if s.size and runs and runs[-1][1] == s.offset:
                runs[-1] = (runs[-1][0], s.offset + s.size)
            elif s.size:
                runs.append((s.offset, s.offset + s.size))
        return tuple(runs)


class FlatBuffer:
    """Arrays packed into one aligned buffer, each starting on a multiple of 128 elements.

    Attributes:
        data: the buffer, 1-D, of the arrays' dtype, with zeros between the arrays: a NumPy array, or a CuPy or Numba
            array on the GPU where the arrays that were flattened are.
        tree: views of it in the structure of the arrays that were flattened, dicts read-only and lists as tuples;
            ``flat[key]`` is ``flat.tree[key]`` and ``flat[key] = a`` copies a into it.
    """

    __slots__ = ("_data", "_tree", "address", "addresses", "layout", "memory", "runs", "views")

    def __init__(self, layout: Layout, memory: _memory.Memory = _memory.HOST) -> None:
        self.layout = layout
        self.memory = memory
        self._data = data = memory.zeros(layout.total, layout.dtype)
        # What the backends step over: each array as a 1-D view, and the stretches between padding.
        self.views = [data[s.offset : s.offset + s.size] for s in layout.segments]
        self.runs = [data[start:end] for start, end in layout.runs]
        self.address = address(view("data", data) or data)
        self.addresses = self.address + np.array([s.offset for s in layout.segments], np.int64) * layout.dtype.itemsize
        self._tree = _read_only(rebuild(layout.structure, lambda k: self.views[k].reshape(layout.segments[k].shape)))

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        if value is not self._data:  # it is for ``flat.data *= 2``
            raise AttributeError("data cannot be replaced, for the views would not follow; assign to data[...]")

    @property
    def tree(self) -> Any:
        return self._tree

    def __contains__(self, key: Any) -> bool:
        return isinstance(self._tree, Mapping) and key in self._tree

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def __getitem__(self, key: Any) -> Any:
        return self._tree[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Copy `value` into the view at `key`."""
        self._tree[key][...] = value

    def zeros_like(self) -> FlatBuffer:
        """Another buffer of the same layout, filled with zeros: for gradients."""
        return FlatBuffer(self.layout, self.memory)

    def __repr__(self) -> str:
        return f"FlatBuffer({len(self.layout.segments)} arrays, {self.layout.total} elements, {self.layout.dtype})"

    def __reduce__(self) -> Any:
        return _unpickle, (self.layout, self.memory.to_host(self.data), self.memory.library, self.memory.device)


def _unpickle(layout: Layout, data: Any, library: str = "numpy", device: int | None = None) -> FlatBuffer:
    flat = FlatBuffer(layout, _memory.of_library(library, device))
    flat.memory.assign(flat.data, data)
    return flat


def flatten(tree: Any, dtype: Any = None) -> FlatBuffer:
    """Copy arrays into one flat buffer and return it with views in the same structure.

    Args:
        tree: an array, or dicts, lists and tuples of arrays, nested as they like. Any shape, order and stride. All are
            NumPy arrays, or all lie on one GPU: CuPy or Numba arrays, or any that have ``__cuda_array_interface__`` or
            DLPack.
        dtype: float32, float64, float16, ml_dtypes' bfloat16, or "bfloat16" for that as uint16, which optimizers take
            with ``dtype="bfloat16"``. By default the arrays' own, which then must be one of these and the same for all.

    Raises:
        TypeError: a leaf is not an array. ValueError: there is none, or their dtypes differ or are not supported.

    >>> import numpy as np, fused_adam
    >>> flat = fused_adam.flatten({"W": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)})
    >>> flat["W"].shape, flat.data.shape
    ((2, 3), (256,))
    """
    arrays = list(leaves(tree, "tree"))
    shapes, chosen = _checks.flatten(arrays, dtype)
    flat = FlatBuffer(Layout.of(tree, shapes, chosen), _memory.like(arrays[0][1]))
    for (_, source), part, shape in zip(arrays, flat.views, shapes, strict=True):
        if chosen == np.uint16:
            host = np.asarray(_memory.on_host(source), np.float32)
            source = _storage.encoded(host.reshape(-1), chosen).reshape(shape)
        flat.memory.assign(part.reshape(shape), source)
    return flat
