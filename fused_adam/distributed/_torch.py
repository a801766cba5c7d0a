"""Ranks of torch.distributed. PyTorch is imported when one is made."""

from __future__ import annotations

import os
import sys
from typing import Any

from fused_adam._arrays import Array
from fused_adam.distributed._collective import Alone, Collective, Work


class TorchCollective:
    """The ranks of a process group, by default of all processes.

    Arrays are NumPy's, in host memory, so the group needs an engine for that: gloo. Its time-out, which
    ``init_process_group(timeout=...)`` sets, is how long a rank waits for one that hangs.

    Args:
        group: a process group of torch.distributed that has this process.

    Raises:
        RuntimeError: PyTorch is not installed, torch.distributed has not been initialized, this process is not in the
            group, or the group has no engine for host memory.
    """

    def __init__(self, group: Any = None) -> None:
        try:
            import torch
            import torch.distributed as dist
        except ImportError as error:
            raise RuntimeError("ranks of torch.distributed need PyTorch: pip install 'fused-adam[torch]'") from error
        if not dist.is_available() or not dist.is_initialized():
            fix = "call torch.distributed.init_process_group('gloo') first, in a process that torchrun started"
            raise RuntimeError(f"torch.distributed is not initialized; {fix}")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("this process is not in the group")
        engine = dist.get_backend_config(group)
        if "cpu:" not in engine:
            fix = "make one for them with torch.distributed.new_group(backend='gloo')"
            raise RuntimeError(f"the group's engine, {engine}, does not take arrays in host memory; {fix}")
        self._group = group
        self._torch, self._dist = torch, dist
        # The names of torch 2.13, and those that it deprecates.
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def _tensor(self, x: Array) -> Any:
        """The same memory; a copy of what is read-only, of which torch makes no tensor."""
        return self._torch.from_numpy(x if x.flags.writeable else x.copy())

    def _bytes(self, x: Array) -> Any:
        """What is only moved: torch does not know every dtype of NumPy's."""
        return self._tensor(x.view("u1"))

    def _start(self, name: str, function: Any, *tensors: Any) -> Work:
        try:
            return _Pending(name, function(*tensors, group=self._group, async_op=True), tensors)
        except RuntimeError as error:
            raise _failed(name, error) from error

    def all_to_all(self, out: Array, x: Array) -> Work:
        return self._start("all_to_all", self._all_to_all, self._bytes(out), self._bytes(x))

    def _all_to_all(self, out: Any, x: Any, group: Any, async_op: bool) -> Any:
        return self._dist.all_to_all_single(out, x, None, None, group, async_op)

    def reduce_scatter(self, out: Array, x: Array) -> Work:
        return self._start("reduce_scatter", self._reduce_scatter, self._tensor(out), self._tensor(x))

    def all_gather(self, out: Array, x: Array) -> Work:
        return self._start("all_gather", self._all_gather, self._bytes(out), self._bytes(x))

    def all_reduce(self, x: Array) -> Work:
        return self._start("all_reduce", self._dist.all_reduce, self._tensor(x))


class _Pending:
    def __init__(self, name: str, work: Any, tensors: Any) -> None:
        self._name, self._work, self._tensors = name, work, tensors

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _failed(self._name, error) from error
        self._tensors = ()


def _failed(name: str, error: Exception) -> ConnectionError:
    reason = str(error).splitlines()[0]
    return ConnectionError(f"{name} failed, for a rank has died, hangs or was left behind: {reason}")


def default() -> Collective:
    """This rank of torch.distributed where it is initialized, else this process alone.

    Raises RuntimeError where there seem to be others.
    """
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    if dist is not None and dist.is_available() and dist.is_initialized():
        return TorchCollective()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = "call torch.distributed.init_process_group('gloo') first, or pass collective=Alone()"
        raise RuntimeError(f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), but no rank yet; {fix}")
    return Alone()
