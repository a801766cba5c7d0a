"""Steps over some rows of a parameter, or over rows that each have their own t: what the backends are told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks, _numbers, _row_checks
from fused_adam._arrays import AnyArray, Array
from fused_adam._cuda_arrays import LEGACY_STREAM
from fused_adam._layout import leaves, match


@dataclass(frozen=True, eq=False, slots=True)
class SparseGrad:
    """The gradient of some rows of a parameter, to be given to `step` or `apply_gradients` in place of an array.

    Args:
        indices: k rows along the parameter's first axis, 1-D, of any integer dtype, in any order. Rows that come more
            than once have their values summed, in the order given, before anything is squared.
        values: their gradients, of shape ``(k, *p.shape[1:])`` and the parameter's dtype, where the parameter is.
        lazy: False: the step is that of a dense gradient with zeros in all other rows: all moments decay and all rows
            move, as in TensorFlow's ``_apply_sparse``. True: only the given rows and their states are touched, as in
            PyTorch's SparseAdam; decay too then only reaches these.

    The parameter is in C order. What is wrong with them is said by the step, which then changes nothing.

    >>> import numpy as np, fused_adam
    >>> table = np.ones((5, 2), np.float32)
    >>> opt = fused_adam.Adam(table, lr=0.1)
    >>> opt.step(fused_adam.SparseGrad([3, 0], np.ones((2, 2), np.float32), lazy=True))
    >>> table[:, 0].round(3).tolist()
    [0.9, 1.0, 1.0, 0.9, 1.0]
    """

    indices: Any
    values: Any
    lazy: bool = False


_FEW = 16  # rows with duplicates left to add up: then it is quicker one row after the other


class Mask(NamedTuple):
    """Which of `size` rows are to move."""

    name: str
    size: int
    rows: Array


class Gather(NamedTuple):
    """The rows of one parameter that move, and where each finds its gradient.

    given: what the caller passed, called `name` in messages: rows of gradients, `width` elements each. rows: int64,
    ascending, each once; rows[k] takes the sum of those numbered order[starts[k]:starts[k + 1]] in `given`, in that
    order; without starts the one numbered order[k], without order the k-th. every: the other rows of p move too, with
    a gradient of 0. coefficients: of each variant of the step. variant: int64, which one each moving row takes; None if
    all take the first. row_steps, steps: int64, the t of all rows and the new one of each that moves, if each has its
    own: to be written with the step.
    """

    name: str
    given: Any
    p: AnyArray
    width: int
    rows: Array
    starts: Array | None
    order: Array | None
    every: bool
    coefficients: list[Sequence[float]]
    variant: Array | None
    row_steps: Array | None
    steps: Array | None

    @property
    def moving(self) -> int:
        """How many rows move."""
        return len(self.rows) if not self.every else self.p.shape[0] if self.p.shape else 1

    def values(self, stream: int = LEGACY_STREAM) -> Any:
        """The rows of gradients in one 1-D array, checked. stream: that of the step, on a GPU."""
        if isinstance(self.given, SparseGrad):
            k = len(self.rows) if self.order is None else len(self.order)
            return _row_checks.row_values(f"{self.name}.values", self.given.values, k, self.p, stream)
        return _checks.gradient(self.name, self.given, self.p, stream)

    def summed(self, values: Array) -> tuple[Array, Array]:
        """On the host: (rows of gradients, 1-D; the number of each row's), with the sums of duplicates made."""
        if self.starts is None:
            return values, np.arange(len(self.rows)) if self.order is None else self.order
        assert self.order is not None
        table = values.reshape(len(self.order), self.width)
        counts = np.diff(self.starts)
        sums = table[self.order[self.starts[:-1]]]
        left = np.flatnonzero(counts > 1)
        done = 1
        with np.errstate(all="ignore"):
            while len(left) > _FEW:
                sums[left] += table[self.order[self.starts[left] + done]]
                done += 1
                left = left[counts[left] > done]
            for k in left:
                rest = table[self.order[self.starts[k] + done : self.starts[k + 1]]]
                sums[k] = np.add.accumulate(np.concatenate([sums[k : k + 1], rest]))[-1]  # from left to right
        return sums.reshape(-1), np.arange(len(self.rows))

    def commit(self) -> tuple[Callable[..., Any], list[Any]]:
        """A call that writes the rows' steps, and cannot fail."""
        if self.row_steps is None:
            return _nothing, []
        if self.every:
            return np.copyto, [self.row_steps, self.steps]
        return self.row_steps.put, [self.rows, self.steps, "clip"]

    def by_variant(self, moving: Array) -> Iterator[tuple[Sequence[float], Array]]:
        """Coefficients, and those of the moving rows that take them."""
        if self.variant is None:
            yield self.coefficients[0], moving
        else:
            order = np.argsort(self.variant, kind="stable")
            bounds = np.cumsum(np.bincount(self.variant, minlength=len(self.coefficients)))[:-1]
            yield from zip(self.coefficients, np.split(moving[order], bounds), strict=True)


def _nothing() -> None:
    pass


def gather(
    name: str,
    g: Any,
    mask: Mask | None,
    p: AnyArray,
    t: int,
    row_steps: Array | None,
    coefficients: Callable[[int], Sequence[float]],
) -> Gather | None:
    """How a parameter moves with a gradient called `name`; None if it is an ordinary step.

    Args:
        t: of this step. row_steps: int64, how many steps each row has done, if each has its own t. coefficients: those
            of a step number.

    Raises:
        TypeError, ValueError: indices, a mask or a parameter that has no rows; gradients are checked by the backends.
    """
    sparse = isinstance(g, SparseGrad)
    if not sparse and mask is None and row_steps is None:
        return None
    n, width = _row_checks.rows(name, p, needed=sparse or mask is not None)
    starts = order = None
    every = False
    if sparse:
        if mask is not None:
            raise ValueError(f"{name} is a SparseGrad and {mask.name} is given too; pass one of them")
        rows, starts, order = _sorted(_row_checks.indices(f"{name}.indices", g.indices, n))
        every = not _numbers.flag(f"{name}.lazy", g.lazy)
    elif mask is not None:
        _row_checks.mask_fits(mask.name, mask.size, name, n)
        rows = order = mask.rows
    else:
        rows = np.arange(n)
    steps, numbers, variant = None, [t], None
    if row_steps is not None:
        steps = (row_steps if every else row_steps[rows]) + 1
        distinct, found = np.unique(steps, return_inverse=True)
        numbers, variant = distinct.tolist(), found.astype(np.int64)
    values = [coefficients(number) for number in numbers]
    return Gather(name, g, p, width, rows, starts, order, every, values, variant, row_steps, steps)


def row_masks(mask: Any, trees: Sequence[Any], one_group: bool) -> list[list[Mask | None]]:
    """A mask for each array of each group's tree: one for all, or in their structure. Raises as `gather`."""
    # Many parameters often share one. It is kept, for another object could get its id.
    known: dict[int, tuple[Any, Mask]] = {}

    def checked(name: str, given: Any) -> Mask | None:
        if given is not None and id(given) not in known:
            a = _row_checks.row_mask(name, given)
            known[id(given)] = given, Mask(name, a.size, np.flatnonzero(a))
        return None if given is None else known[id(given)][1]

    def is_one(x: Any) -> bool:
        return not isinstance(x, Mapping | list | tuple)

    if not one_group and not is_one(mask) and (isinstance(mask, Mapping) or len(mask) != len(trees)):
        raise ValueError(f"mask should be an array, or a list of one entry for each of the {len(trees)} groups")
    masks = []
    for k, tree in enumerate(trees):
        path, given = ("mask", mask) if one_group or is_one(mask) else (f"mask[{k}]", mask[k])
        names = [name for name, _ in leaves(tree, path)]
        if is_one(given):
            masks.append([checked(path, given)] * len(names))
        else:
            masks.append([checked(*x) for x in zip(names, match(given, tree, path), strict=True)])
    return masks


def _sorted(indices: Array) -> tuple[Array, Array | None, Array | None]:
    """rows, starts and order of a `Gather`."""
    if np.all(indices[1:] > indices[:-1]):
        return indices, None, None
    order = np.argsort(indices, kind="stable")
    ascending = indices[order]
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    if len(first) == len(indices):
        return ascending, None, order
    return ascending[first], np.append(first, len(indices)), order
