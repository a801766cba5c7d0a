"""Ranks as threads of one process, for tests and notebooks: no launcher, no ports, and everything can be looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fused_adam._arrays import Array
from fused_adam.distributed._collective import DONE, Work

R = TypeVar("R")


class _Meeting:
    """Where n threads wait for each other. It ends for all when one of them leaves."""

    def __init__(self, n: int, timeout: float) -> None:
        self.slots: list[Any] = [None] * n
        self._n, self._timeout = n, timeout
        self._condition = threading.Condition()
        self._arrived = self._generation = 0
        self._gone = ""

    def meet(self, rank: int) -> None:
        """Raises ConnectionError if one has left, or has not come in time."""
        with self._condition:
            mine = self._generation
            self._arrived += 1
            if self._arrived == self._n:
                self._arrived = 0
                self._generation += 1
                self._condition.notify_all()
                return
            self._condition.wait_for(lambda: self._generation != mine or bool(self._gone), self._timeout)
            if self._generation != mine:
                return
            late = f"not all of {self._n} ranks came within {self._timeout:g} s"
            self._gone = self._gone or late
            self._condition.notify_all()
            raise ConnectionError(f"rank {rank} of {self._n} waits in vain: {self._gone}")

    def leave(self, why: str) -> None:
        with self._condition:
            self._gone = self._gone or why
            self._condition.notify_all()


class Threads:
    """A rank of `Threads.run`. Its work is done when a method returns, so nothing overlaps."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size = rank, size
        self._meeting = meeting

    @staticmethod
    def run(n: int, function: Callable[[Threads], R], *, timeout: float = 60.0) -> list[R]:
        """Call function(collective) in n threads, one for each rank; returns what they return, by rank.

        Args:
            timeout: seconds that a rank waits for the others.

        Raises:
            ValueError: n < 1. Whatever a rank raises, and first: the others are released by a ConnectionError.
        """
        if n < 1:
            raise ValueError(f"n should be at least 1, got {n}")
        meeting = _Meeting(n, timeout)
        results: list[Any] = [None] * n
        failures: list[tuple[int, BaseException]] = []

        def rank(k: int) -> None:
            try:
                results[k] = function(Threads(k, n, meeting))
                meeting.leave(f"rank {k} has returned")
            except BaseException as error:
                failures.append((k, error))
                meeting.leave(f"rank {k} raised {type(error).__name__}: {error}")

        threads = [threading.Thread(target=rank, args=(k,), name=f"rank {k}") for k in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            k, error = failures[0]
            error.add_note(f"raised by rank {k} of {n}")
            raise error
        return results

    def _exchange(self, method: str, x: Array, use: Callable[[list[Array]], None]) -> Work:
        """Show x to all, and use what all show."""
        shown = self._meeting.slots
        shown[self.rank] = method, x
        self._meeting.meet(self.rank)
        called = [m for m, _ in shown]
        if len({*called}) == 1:
            use([y for _, y in shown])
        self._meeting.meet(self.rank)
        if len({*called}) > 1:
            raise ConnectionError(f"ranks do not call the same: {', '.join(called)}; they should run the same program")
        return DONE

    def all_to_all(self, out: Array, x: Array) -> Work:
        def use(shown: list[Array]) -> None:
            for part, y in zip(out.reshape(self.size, -1), shown, strict=True):
                part[:] = y.reshape(self.size, -1)[self.rank]

        return self._exchange("all_to_all", x, use)

    def reduce_scatter(self, out: Array, x: Array) -> Work:
        def use(shown: list[Array]) -> None:
            with np.errstate(all="ignore"):
                out[:] = shown[self.rank].reshape(self.size, -1)[self.rank]
                for k in range(1, self.size):  # each rank in another order, as engines do
                    out[:] += shown[(self.rank + k) % self.size].reshape(self.size, -1)[self.rank]

        return self._exchange("reduce_scatter", x, use)

    def all_gather(self, out: Array, x: Array) -> Work:
        def use(shown: list[Array]) -> None:
            for k, (part, y) in enumerate(zip(out.reshape(self.size, -1), shown, strict=True)):
                if k != self.rank or not np.shares_memory(part, y):
                    part[:] = y

        return self._exchange("all_gather", x, use)

    def all_reduce(self, x: Array) -> Work:
        total = np.empty_like(x)
        self._exchange("all_reduce", x, lambda shown: np.copyto(total, np.add.reduce(shown)))
        x[:] = total
        return DONE
