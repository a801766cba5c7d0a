"""The parameters that all ranks have, and an optimizer over none of their elements that knows all but the arrays."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fused_adam import _checks, _formats, _gradients
from fused_adam._arrays import Array, carried, kind_of, order, ravel
from fused_adam._base import Optimizer, _is_groups
from fused_adam._layout import FlatBuffer, leaves, match, rebuild
from fused_adam.backends import choose
from fused_adam.distributed._plan import Plan, Space
from fused_adam.distributed._shard import Shard

_REFUSED = ("zero_grads", "count_unmoved", "device_scalars", "per_row_step")


class Model:
    """Parameters, and the class and options of their optimizer.

    Attributes:
        params: as given. names, shapes, sizes: of each parameter. stored: the dtype of all; dtype: the one that is
            computed in. space: where parameters lie. prototype: an optimizer over arrays of no elements in the
            structure of the parameters, with their hyperparameters and t. backend: of the shards.

    Raises:
        TypeError, ValueError: an argument is wrong, or cannot be sharded.
    """

    def __init__(self, optimizer: type[Optimizer], params: Any, options: Mapping[str, Any]) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
            raise TypeError(f"optimizer should be a class of fused_adam, such as AdamW, got {optimizer!r}")
        for name in _REFUSED:
            if options.get(name):
                raise ValueError(f"{name} is not offered with sharded states; leave it out")
        self.params = params
        self._declared = options.get("dtype")
        groups = [g["params"] for g in params] if _is_groups(params) else [params]
        named = []
        self.groups: list[int] = []
        for k, group in enumerate(groups):
            path = f'params[{k}]["params"]' if _is_groups(params) else "params"
            named += [(name, host(p)) for name, p in leaves(group, path)]
            self.groups += [k] * (len(named) - len(self.groups))
        arrays, kinds = _checks.parameters(named, self._declared)
        self.names = [name for name, _ in named]
        for name, p, kind in zip(self.names, arrays, kinds, strict=True):
            if not isinstance(p, np.ndarray):
                raise ValueError(f"{name} is on a GPU; sharded parameters are in host memory")
            if order(p) != "C":
                raise ValueError(f"{name} is in Fortran order; sharded parameters are in C order")
            if kind != kinds[0]:
                raise ValueError(f"{name} is {kind} but {self.names[0]} is {kinds[0]}; make them alike")
        self.kind = kinds[0]
        self.arrays: list[Array] = [ravel(p) for p in arrays]
        self.shapes = [p.shape for p in arrays]
        self.sizes = [p.size for p in arrays]
        self.stored = self.arrays[0].dtype
        self.flat = params if isinstance(params, FlatBuffer) else None

        def empty(tree: Any) -> Any:
            return rebuild(tree, lambda p: np.empty(0, host(p).dtype))

        bare = [{**g, "params": empty(g["params"])} for g in params] if _is_groups(params) else empty(params)
        self._options = {**options, "backend": choose(options.get("backend", "auto"), sum(self.sizes))}
        if self.kind == "bfloat16":
            self._options["dtype"] = "bfloat16"  # which shards are given as uint16
        self.prototype = optimizer(bare, **{**options, "backend": "numpy"})
        self._nothing = [rebuild(g["params"], lambda p: p.copy()) for g in self.prototype.param_groups]
        self.dtype = self.prototype._parts[0].dtype
        self.backend = str(self._options["backend"])
        self.gradient = self._gradient()

    def _gradient(self) -> str:
        """The kind of gradients that shards take: float32 where that is offered, to round once less."""
        form = self.prototype.storage.format(self.kind)
        if form is None:
            return str(self.dtype.name)
        try:
            _formats.refuse_gradient(form._replace(g="float32"), "")
        except ValueError:
            return self.kind
        return "float32"

    def described(self) -> list[str]:
        """What has to be the same on all ranks, one thing a line, for messages."""
        lines = [f"the optimizer {type(self.prototype).__name__}", *self.hyperparameters()]
        lines += [f"{name}={value!r}" for name, value in self.prototype.storage._asdict().items()]
        each = zip(self.names, self.shapes, self.arrays, strict=True)
        return lines + [
            f"{name} of {self.kind}, shape {shape}, and CRC-32 {zlib.crc32(a.view(np.uint8).data):08x} of its numbers"
            for name, shape, a in each
        ]

    def hyperparameters(self) -> list[str]:
        names, groups = self.prototype._names, self.prototype.param_groups
        return [f"hyperparameters { ({name: group.get(name) for name in names}) }" for group in groups]

    # --- what it takes part in --------------------------------------------------------------------------------------

    def placed(self, arrays: Iterable[Array]) -> Space:
        return Space(list(zip(self.firsts, arrays, strict=True)))

    def shards(self, plan: Plan, rank: int) -> dict[int, Shard]:
        """What a rank owns, by bucket; a bucket of which that is nothing is left out."""
        self.firsts = plan.firsts
        flat = self.flat
        self.space = self.placed(self.arrays) if flat is None else Space([(0, carried(flat.data, self.kind))])
        found = {}
        for k in range(plan.buckets):
            begin, end = plan.owned(k, rank)
            if pieces := list(plan.pieces(begin, end)):
                found[k] = Shard(pieces, begin, self.prototype, self.groups, self.arrays, self.gradient, self._options)
        self._writes = _checks.Extents(self.arrays)
        return found

    def gradients(self, given: Any, path: str) -> tuple[Space, str]:
        """Gradients, checked, and their kind. Raises TypeError or ValueError."""
        if self.flat is not None and isinstance(given, FlatBuffer) and given.memory.device is None:
            kind = _kind(given.layout.dtype, self.kind, self._declared)
            if kind and given.layout.segments == self.flat.layout.segments:
                self._writes.refuse(path, given.data)
                return Space([(0, carried(given.data, kind))]), kind
        found: list[Array] = []
        kinds = set()
        opt = self.prototype
        groups = _gradients._by_group(opt, given)
        matched = [g for k, tree in enumerate(groups) for g in match(tree, opt._trees[k], path)]
        names = [path + name.removeprefix("params") for name in self.names]
        for name, g, p, shape in zip(names, map(host, matched), self.arrays, self.shapes, strict=True):
            if self.kind in ("float64", "float32"):
                x, kind = _checks.gradient(name, g, p.reshape(shape)), self.kind
            else:
                x, kind = _checks.kept_gradient(name, g, p.reshape(shape), self._declared)
            if kind not in (self.kind, self.dtype.name):
                raise ValueError(f"{name} is {kind}; pass {self.kind} or {self.dtype.name}")
            if not isinstance(x, np.ndarray):
                raise ValueError(f"{name} is on a GPU; sharded parameters and their gradients are in host memory")
            self._writes.refuse(name, x)
            found.append(x)
            kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"gradients have the dtypes {', '.join(sorted(kinds))}; make them alike")
        return self.placed(found), kinds.pop()

    def advance(self) -> None:
        """t grows by 1. Raises TypeError or ValueError for hyperparameters that are wrong."""
        self.prototype.step(self._nothing[0] if self.prototype._one_group else self._nothing)

    def set_t(self, t: int) -> None:
        self.prototype._t[0] = t


def _kind(dtype: np.dtype[Any], parameter: str, declared: Any) -> str:
    """What gradients of a flat buffer are called, "" if they are not right."""
    kind = kind_of(dtype, declared)
    return kind if kind == parameter or (kind == "float32" and parameter in ("float16", "bfloat16")) else ""


def host(p: Any) -> Any:
    """A CPU tensor as NumPy's array of the same memory, bfloat16 as uint16; what is no tensor as it is."""
    if isinstance(p, np.ndarray) or not hasattr(p, "__dlpack_device__") or p.__dlpack_device__()[0] != 1:
        return p
    if str(p.dtype) == "torch.bfloat16":
        p = p.view(sys.modules["torch"].uint16)
    return np.from_dlpack(p)
