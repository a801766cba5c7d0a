"""Processes that form a torch.distributed group on the CPU, kept for all tests: to start them takes the longest."""

from __future__ import annotations

import atexit
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from conftest import CI  # noqa: F401 # which sets the number of Numba's threads, in these processes too

LIMIT = 60.0  # seconds that a call, or a collective within it, may take
START = 180.0  # seconds in which all processes have imported torch, on a busy machine too


class Ranks:
    """One process for each rank of a gloo group."""

    def __init__(self, world: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = Path(self._folder.name, "store").as_uri()
        self._processes, self._pipes = [], []
        for rank in range(world):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, meeting_point, rank, world), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        atexit.register(self.end)
        self.run(_hello, limit=START)

    def run(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Call a function of a module in every process; what it returned, by rank.

        Raises AssertionError with the traceback of the first that raised, or that did not return in time. The processes
        are ended then, for one may be left waiting for another.
        """
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((function, args)))
            return self._answers(function.__name__, limit)
        except BaseException:
            self.end()
            raise

    def _answers(self, name: str, limit: float) -> list[Any]:
        end = time.monotonic() + limit
        pending, results = dict(enumerate(self._pipes)), {}
        while pending:
            ready = multiprocessing.connection.wait([*pending.values()], max(0.0, end - time.monotonic()))
            assert ready, f"{name}: ranks {[*pending]} did not return within {limit:.0f} s"
            for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
                try:
                    failure, results[rank] = pickle.loads(pending.pop(rank).recv_bytes())
                except (EOFError, OSError):
                    failure = "the process has ended"
                assert not failure, f"{name}, rank {rank} of {len(self._pipes)}: {failure}"
        return [results[rank] for rank in sorted(results)]

    def end(self) -> None:
        atexit.unregister(self.end)
        _kept.pop(len(self._processes), None)
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._folder.cleanup()


_kept: dict[int, Ranks] = {}


def ranks(world: int) -> Ranks:
    """The processes of a group of that size, which end with this one."""
    if world not in _kept:
        _kept[world] = Ranks(world)
    return _kept[world]


def _hello() -> None:
    """What the first call waits for."""


def _serve(pipe: Any, meeting_point: str, rank: int, world: int) -> None:
    # As torchrun sets them, which Accelerate looks for; the address is not used, for there is a file to meet at.
    ranks_here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(number) for name, number in ranks_here.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.optim

    warnings.simplefilter("error")
    torch.distributed.init_process_group(
        "gloo", init_method=meeting_point, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            answer = "", function(*args)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))
