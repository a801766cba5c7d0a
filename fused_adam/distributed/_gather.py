"""The parameters that ranks have stepped, on their way to all of them."""

from __future__ import annotations

import numpy as np

from fused_adam._arrays import Array
from fused_adam.distributed._collective import Collective, Work
from fused_adam.distributed._plan import Plan, Space


class Gathers:
    """Those under way, a bucket each. Where a bucket lies in one array they arrive in place, else by a copy."""

    def __init__(self, plan: Plan, collective: Collective, space: Space) -> None:
        self._plan, self._collective, self._space = plan, collective, space
        self._pending: list[tuple[Work, int, Array | None]] = []
        self._copies = [np.empty(0, space.dtype)] * 2

    def start(self, k: int) -> None:
        """Let all ranks have what each owns of bucket k. Raises ConnectionError."""
        if self._collective.size == 1:
            return
        rank, each = self._collective.rank, self._plan.each(k)
        start, stop = self._plan.bucket(k)
        n = each * self._collective.size
        x = self._space.view(start, stop) if n == stop - start else None
        copy = None
        if x is None:
            while len(self._pending) > 1:  # the last but one has the same copy
                self._finish()
            if self._copies[k % 2].size < n:
                self._copies[k % 2] = np.empty(n, self._space.dtype)
            x = copy = self._copies[k % 2][:n]
            self._space.read(*self._plan.owned(k, rank), x[rank * each : (rank + 1) * each])
        self._pending.append((self._collective.all_gather(x, x[rank * each : (rank + 1) * each]), k, copy))

    def _finish(self) -> None:
        work, k, copy = self._pending.pop(0)
        work.wait()
        if copy is not None:
            self._space.write(*self._plan.bucket(k), copy)

    def wait(self) -> None:
        """Until all have arrived. Raises ConnectionError."""
        while self._pending:
            self._finish()
