"""The gradients of all ranks become, bucket by bucket, the sums of what this rank owns.

``fast`` leaves the sum to the engine, whose order is its own. ``ordered`` sends each rank what it owns of the others'
gradients as they are, and adds them in the order of the ranks. ``invariant`` adds micro-batches, of which there is
the same power of two whatever the number of ranks, in pairs, pairs of pairs and so on: first those of this rank, then
those of all. As each rank has neighbouring ones, the sums and their roundings are the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fused_adam import _numbers, _storage
from fused_adam._arrays import Array
from fused_adam.distributed._collective import Collective, Work
from fused_adam.distributed._plan import Plan, Space

MODES = ("fast", "ordered", "invariant")
_CHUNK = 2**14  # elements, of which those of several ranks fit in cache


def counts(mode: Any, micro_batches: Any, ranks: int) -> tuple[int, int]:
    """How many gradients are summed, and how many of them are this rank's. Raises TypeError or ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode should be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "invariant":
        if micro_batches is not None:
            raise ValueError(f'micro_batches is for mode="invariant", not {mode!r}; leave it out')
        return ranks, 1
    if micro_batches is None:
        raise ValueError('mode="invariant" needs micro_batches, a power of two')
    n = _numbers.step_number(micro_batches, name="micro_batches")
    if n & (n - 1) or n % ranks:
        fix = f"a power of two and a multiple of the number of ranks, {ranks}"
        raise ValueError(f"micro_batches should be {fix}, got {micro_batches}")
    return n, n // ranks


def in_order(rows: Sequence[Array], out: Array, scratch: Array) -> None:
    total = rows[0]
    for row in rows[1:]:
        total = np.add(total, row, out)


def in_pairs(rows: Sequence[Array], out: Array, scratch: Array) -> None:
    """As a tree; the number of rows is a power of two, from 2 on."""
    level = list(rows)
    while len(level) > 2:
        level = [np.add(level[k], level[k + 1], scratch[k // 2, : out.size]) for k in range(0, len(level), 2)]
    np.add(level[0], level[1], out)


def add(how: Callable[[Sequence[Array], Array, Array], None], rows: Sequence[Array], out: Array) -> None:
    """out becomes the sum of rows, which are of its dtype, or of 16 bits and then added as float32."""
    if len(rows) == 1:
        np.copyto(out, rows[0] if rows[0].dtype == out.dtype else _storage.decoded(rows[0]))
        return
    scratch = np.empty((len(rows) // 2, min(_CHUNK, out.size)), out.dtype)
    with np.errstate(all="ignore"):
        for lo in range(0, out.size, _CHUNK):
            chunk = [row[lo : lo + _CHUNK] for row in rows]
            if rows[0].dtype != out.dtype:
                chunk = [_storage.decoded(row) for row in chunk]
            how(chunk, out[lo : lo + _CHUNK], scratch)


class Sum:
    """A bucket's, under way."""

    def __init__(self, work: Work | None, finish: Callable[[], Array]) -> None:
        self._work, self._finish = work, finish

    def get(self) -> Array:
        """What this rank owns, 1-D, until the next but one bucket is started. Raises ConnectionError."""
        if self._work is not None:
            self._work.wait()
        return self._finish()


class Reduction:
    """Buffers for two buckets at a time, kept from step to step.

    Args:
        dtype: of the sums, float32 or float64.
        fixed: keep the sums of all buckets until the next step, instead of two.
    """

    def __init__(self, mode: str, plan: Plan, collective: Collective, dtype: np.dtype[Any], fixed: bool) -> None:
        self._mode, self._plan, self._collective, self._dtype = mode, plan, collective, dtype
        self._buffers: dict[tuple[str, int], Array] = {}
        self._slots = plan.buckets if fixed else 2

    def _buffer(self, name: str, slot: int, n: int, dtype: np.dtype[Any]) -> Array:
        """n elements of it; the first bucket is the largest."""
        key = name, slot
        if key not in self._buffers or self._buffers[key].size < n or self._buffers[key].dtype != dtype:
            self._buffers[key] = np.empty(n, dtype)
        return self._buffers[key][:n]

    def start(self, k: int, sources: Sequence[Space]) -> Sum:
        """Of bucket k of gradients, one for each micro-batch of this rank."""
        ranks, each = self._collective.size, self._plan.each(k)
        first, last = self._plan.owned(k, self._collective.rank)
        n = ranks * each
        local = [self._local(m, k, n, source) for m, source in enumerate(sources)]
        how = in_pairs if self._mode == "invariant" else in_order
        x = local[0]
        if len(local) > 1 or ((ranks == 1 or self._mode == "fast") and x.dtype != self._dtype):
            x = self._buffer("sum", k % (self._slots if ranks == 1 else 2), n, self._dtype)
            add(how, local, x)
        if ranks == 1:
            return Sum(None, lambda: x)
        out = self._buffer("own", k % self._slots, each, self._dtype)
        if self._mode == "fast":
            return Sum(self._collective.reduce_scatter(out, x), lambda: out[: last - first])
        received = self._buffer("received", k % 2, n, x.dtype)
        work = self._collective.all_to_all(received, x)

        def finish() -> Array:
            add(how, list(received.reshape(ranks, each)), out)
            return out[: last - first]

        return Sum(work, finish)

    def _local(self, m: int, k: int, n: int, source: Space) -> Array:
        """A bucket of this rank's gradients, padded to n, so that it has equal parts: their own memory if possible."""
        start, stop = self._plan.bucket(k)
        if n == stop - start and (seen := source.view(start, stop)) is not None:
            return seen
        x = self._buffer(f"local {m}", k % (self._slots if self._collective.size == 1 else 2), n, source.dtype)
        source.read(start, stop, x)
        return x
