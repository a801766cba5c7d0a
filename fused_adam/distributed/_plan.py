"""Who owns what: canonical space in buckets, each sharded over all ranks, so that a rank owns a list of intervals.

Canonical space has the parameters in order, each from a multiple of 128 on. The buckets have one size, and only what a
rank owns of them depends on the number of ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fused_adam._arrays import BLOCK, Array


class Piece(NamedTuple):
    """Elements [start, stop) of parameter `number`, which begins in canonical space at `first`."""

    number: int
    start: int
    stop: int
    first: int


class Plan:
    """Of parameters with these numbers of elements.

    Attributes:
        total: the size of canonical space. buckets: how many there are. firsts: where each parameter begins.
    """

    def __init__(self, sizes: Sequence[int], bucket_elements: int, ranks: int) -> None:
        self.sizes = list(sizes)
        self.firsts: list[int] = []
        self.total = 0
        for size in sizes:
            self.firsts.append(self.total)
            self.total += -(-size // BLOCK) * BLOCK
        self._bucket, self._ranks = bucket_elements, ranks
        self.buckets = -(-self.total // bucket_elements)

    def bucket(self, k: int) -> tuple[int, int]:
        """[start, stop) of a bucket."""
        return k * self._bucket, min((k + 1) * self._bucket, self.total)

    def each(self, k: int) -> int:
        """How many elements of a bucket a rank owns; the last ranks may own fewer, or none."""
        start, stop = self.bucket(k)
        return -(-(stop - start) // BLOCK // self._ranks) * BLOCK

    def owned(self, k: int, rank: int) -> tuple[int, int]:
        """[start, stop) of what a rank owns of a bucket."""
        start, stop = self.bucket(k)
        each = self.each(k)
        return min(start + rank * each, stop), min(start + (rank + 1) * each, stop)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The parameters, or parts of them, in an interval: all but the padding."""
        for number in range(max(bisect_right(self.firsts, start) - 1, 0), len(self.firsts)):
            first = self.firsts[number]
            if first >= stop:
                break
            lo, hi = max(start - first, 0), min(stop - first, self.sizes[number])
            if lo < hi:
                yield Piece(number, lo, hi, first)


class Space:
    """Arrays that lie in canonical space: (where each begins, the array, 1-D) in order, all of one dtype."""

    def __init__(self, arrays: Sequence[tuple[int, Array]]) -> None:
        self.dtype = arrays[0][1].dtype
        self._arrays = [(first, a) for first, a in arrays if a.size]
        self._firsts = [first for first, _ in self._arrays]

    def view(self, start: int, stop: int) -> Array | None:
        """The elements of an interval, if they lie in one array."""
        k = bisect_right(self._firsts, start) - 1
        if k < 0:
            return None
        first, a = self._arrays[k]
        return a[start - first : stop - first] if stop <= first + a.size else None

    def _parts(self, start: int, stop: int, x: Array) -> Iterator[tuple[Array, Array]]:
        """Of each array in the interval the part that is in it, and that part of x."""
        for k in range(max(bisect_right(self._firsts, start) - 1, 0), len(self._arrays)):
            first, a = self._arrays[k]
            if first >= stop:
                break
            lo, hi = max(start, first), min(stop, first + a.size)
            if lo < hi:
                yield a[lo - first : hi - first], x[lo - start : hi - start]

    def read(self, start: int, stop: int, x: Array) -> None:
        """x, of the interval's size or larger, becomes its elements, and 0 where there is none."""
        x[:] = 0
        for part, y in self._parts(start, stop, x):
            y[:] = part

    def write(self, start: int, stop: int, x: Array) -> None:
        """The other way."""
        for part, y in self._parts(start, stop, x):
            part[:] = y
