"""What a sharded step asks of the ranks it runs on, and the one rank of a process that is alone."""

from __future__ import annotations

from typing import Protocol

from fused_adam._arrays import Array


class Work(Protocol):
    """A communication under way. Its arrays stay, and stay as they are, until `wait` returns."""

    def wait(self) -> None:
        """Raises ConnectionError if another rank failed, or did not come within the engine's time."""


class Collective(Protocol):
    """N ranks that call the same methods in the same order.

    Arrays are 1-D, C-contiguous and in host memory, of the same size and dtype on all ranks. `out` and what is sent do
    not overlap, but for `all_gather`, where x may be the part of out that it becomes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, out: Array, x: Array) -> Work:
        """Of `size` equal parts of x, part k goes to rank k; part k of out comes from rank k. Any dtype."""

    def reduce_scatter(self, out: Array, x: Array) -> Work:
        """out becomes part `rank` of the sum of all x, in whatever order the engine has. float32 or float64."""

    def all_gather(self, out: Array, x: Array) -> Work:
        """Part k of out becomes x of rank k. Any dtype."""

    def all_reduce(self, x: Array) -> Work:
        """x becomes the sum of all x. int64."""


class Done:
    """Work that was done at once."""

    def wait(self) -> None:
        pass


DONE = Done()


class Alone:
    """The only rank: parts of one are copied."""

    rank, size = 0, 1

    def all_to_all(self, out: Array, x: Array) -> Work:
        out[:] = x
        return DONE

    reduce_scatter = all_gather = all_to_all

    def all_reduce(self, x: Array) -> Work:
        return DONE
