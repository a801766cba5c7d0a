"""ZeRO-1: every rank has the parameters, and steps a part of them with states of that part only."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fused_adam import _numbers
from fused_adam._base import Optimizer
from fused_adam._guard import Stats
from fused_adam._norm import unscaling
from fused_adam.backends import DeferredInterrupt
from fused_adam.distributed import _state
from fused_adam.distributed._agree import agree
from fused_adam.distributed._collective import Collective
from fused_adam.distributed._model import Model
from fused_adam.distributed._pipeline import Pipeline
from fused_adam.distributed._plan import Plan, Space
from fused_adam.distributed._reduce import counts
from fused_adam.distributed._torch import default

_LARGEST_BUCKET = 2**31


class Sharded:
    """An optimizer whose states are sharded over ranks, and whose gradients are the sum of all ranks'.

    For example, in each process that torchrun starts, over the same parameters::

        torch.distributed.init_process_group("gloo")
        opt = fused_adam.distributed.Sharded(fused_adam.AdamW, params, lr=1e-3, max_grad_norm=1.0)
        opt.step(grads)    # those of this rank's samples; afterwards params are the same on every rank

    Gradients are averaged over the ranks, in buckets: while one is stepped, the gradients of the next and the
    parameters of the last are under way. All methods but `last_stats` are called by all ranks together. What one rank
    refuses, all refuse, and nothing is changed then; but a rank that dies or hangs in mid-step leaves the others with
    half a step, and they say so, and go no further.

    Args:
        optimizer: a class of `fused_adam`, or what `fused_adam.rule` made.
        params: as for that class, in host memory, in C order and of one dtype, the same on each rank. A FlatBuffer
            saves copies. CPU tensors of PyTorch that do not require gradients (``p.detach()``) are taken as well.
        collective: this rank. By default that of torch.distributed where it is initialized, else this process `Alone`.
        mode: how gradients are summed. "ordered": in the order of the ranks, the same bits with each engine. "fast":
            by the engine, those of 16 bits as float32. "invariant": over `micro_batches`, the same bits on any number
            of ranks.
        micro_batches: for "invariant", into how many each batch is cut: a power of two, and a multiple of the number of
            ranks. Rank r computes the gradients of the r-th of `size` equal shares of them.
        average: divide the sum by the number of ranks, or of micro-batches.
        bucket_elements: how many elements a bucket has, a multiple of 128. The bits do not depend on it.
        max_grad_norm, skip_nonfinite: as for the class, of the summed gradients of all ranks, and with every format.
        options: the class's own, such as lr. zero_grads, count_unmoved, device_scalars and per_row_step are refused.

    Attributes:
        collective, mode: as given.

    Raises:
        TypeError, ValueError: an argument is wrong, or differs between ranks. ConnectionError: a rank does not answer.
    """

    def __init__(
        self,
        optimizer: type[Optimizer],
        params: Any,
        collective: Collective | None = None,
        *,
        mode: str = "ordered",
        micro_batches: int | None = None,
        average: bool = True,
        bucket_elements: int = 2**22,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        **options: Any,
    ) -> None:
        self.collective = default() if collective is None else collective
        self.mode = mode
        self._broken = ""
        self._skipped = 0
        error: Exception | None = None
        lines: list[str] = []
        try:
            self._count, self._mine = counts(mode, micro_batches, self.collective.size)
            self._divisor = float(self._count) if _numbers.flag("average", average) else 1.0
            bucket_elements = _numbers.step_number(bucket_elements, name="bucket_elements")
            if bucket_elements % 128 or bucket_elements > _LARGEST_BUCKET:
                raise ValueError(f"bucket_elements should be a multiple of 128 up to 2**31, got {bucket_elements}")
            max_norm = _numbers.max_norm("max_grad_norm", max_grad_norm)
            skips = _numbers.flag("skip_nonfinite", skip_nonfinite)
            self._model = model = Model(optimizer, params, options)
            self._plan = Plan(model.sizes, bucket_elements, self.collective.size)
            self._pipeline = Pipeline(model, self._plan, self.collective, mode, self._divisor, max_norm, skips)
            numbers = (mode, self._count, average, bucket_elements, max_norm, skips)
            names = ("mode", "number of summands", "average", "bucket_elements", "max_grad_norm", "skip_nonfinite")
            if self.collective.size > 1:
                lines = [f"{name} = {x}" for name, x in zip(names, numbers, strict=True)] + model.described()
        except Exception as found:
            error = found
        agree(self.collective, "made an optimizer", lines, error)

    # --- what an optimizer has --------------------------------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The parameters as they were given, once this rank has all of the last step."""
        self.wait()
        return self._model.params

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The hyperparameters, to be changed between steps, alike on all ranks. "params" are empty stand-ins."""
        return self._model.prototype.param_groups

    def set_lr(self, lr: float, group: int | None = None) -> None:
        """Change the learning rate of a group, or of all. Raises TypeError, ValueError, IndexError."""
        self._model.prototype.set_lr(lr, group)

    @property
    def t(self) -> int:
        """The number of steps done."""
        return self._model.prototype.t

    @property
    def backend(self) -> str:
        return self._model.backend

    def last_stats(self) -> Stats:
        """What the last step met; the norm is that of all ranks' gradients."""
        return Stats(self._pipeline.norm, self._pipeline.factor, self._skipped, None)

    def __repr__(self) -> str:
        ranks = f"rank {self.collective.rank} of {self.collective.size}"
        return f"Sharded({self._model.prototype!r}, {self.mode!r}, {ranks})"

    def __reduce__(self) -> Any:
        raise TypeError("a Sharded is neither pickled nor copied, for it talks to other ranks; use save or state_dict")

    # --- the step ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compile now what the first step would, while no other rank waits."""
        self._pipeline.prepare()

    def step(self, gradients: Any, *, grad_scale: float = 1.0, found_inf: Any = None, wait: bool = True) -> None:
        """Update the parameters on all ranks, in place.

        Args:
            gradients: this rank's, in the structure of the parameters; with "invariant" a list of such, one for each of
                its micro-batches. Of the parameters' dtype; for those of 16 bits float32 too. Sums are float32, or
                float64 for float64. Never written.
            grad_scale: what the loss was multiplied by, a number > 0.
            found_inf: if it is not 0 on any rank, the step is skipped. A number, or an array of one.
            wait: whether to return only once this rank has all parameters. If not, they are on their way until `wait`,
                `params` or the next step.

        Raises:
            TypeError, ValueError: something is wrong on some rank, or differs. Nothing is changed then, on any.
            ConnectionError: a rank died or hangs. The message says whether there may be half a step.
        """
        self.wait()
        with DeferredInterrupt():  # t, and what other ranks wait for, stay together
            self._step(gradients, grad_scale, found_inf)
        if wait:
            self.wait()

    def _step(self, gradients: Any, grad_scale: float, found_inf: Any) -> None:
        t = self.t
        found, scale = False, 1.0
        sources: list[Space] = []
        lines: list[str] = []
        error: Exception | None = None
        try:
            scale, found = _numbers.grad_scale(grad_scale), _numbers.found_inf(found_inf)
            if np.isnan(unscaling(scale * self._divisor, self._model.dtype)):
                raise ValueError(f"grad_scale is {grad_scale}, of which {self._model.dtype} has no inverse")
            sources, kind = self._sources(gradients)
            self._model.advance()  # which looks at the hyperparameters
            lines = [f"t = {t}", f"gradients of {kind}", f"grad_scale = {scale}", *self._model.hyperparameters()]
        except Exception as wrong:
            error = wrong
        try:
            found = self._talk(lambda: agree(self.collective, "stepped", lines, error, found), "nothing was changed")
        except BaseException:
            self._model.set_t(t)
            raise
        try:
            skipped = self._pipeline.run(t + 1, sources, scale, found)
        except BaseException as cut:
            self._broken = f"step {t + 1} was cut short, so parameters and states may be half stepped"
            if isinstance(cut, ConnectionError):
                raise self._lost(cut) from cut
            raise
        if skipped:
            self._model.set_t(t)
            self._skipped += 1

    def _sources(self, gradients: Any) -> tuple[list[Space], str]:
        """This rank's gradients and their kind."""
        given, names = [gradients], ["grads"]
        if self.mode == "invariant":
            if not isinstance(gradients, list | tuple) or len(gradients) != self._mine:
                got = f"{len(gradients)} of them" if isinstance(gradients, list | tuple) else repr(type(gradients))
                raise ValueError(f"gradients should be a list of one for each of {self._mine} micro-batches, got {got}")
            given, names = list(gradients), [f"gradients[{k}]" for k in range(self._mine)]
        found = [self._model.gradients(g, name) for g, name in zip(given, names, strict=True)]
        kinds = sorted({kind for _, kind in found})
        if len(kinds) > 1:
            raise ValueError(f"gradients have the dtypes {', '.join(kinds)}; make them alike")
        return [space for space, _ in found], kinds[0]

    def wait(self) -> None:
        """Until this rank has all parameters of the last step. Raises ConnectionError, RuntimeError."""
        if self._broken:
            raise RuntimeError(f"{self._broken}; end this process and go on from the last checkpoint")
        self._talk(self._pipeline.gathers.wait, "parameters of the last step are missing")

    def _talk(self, call: Callable[[], Any], otherwise: str) -> Any:
        """What a call returns that needs the other ranks. otherwise: what is so if one does not answer.

        Ctrl-C comes after it, for the others would wait in vain.
        """
        try:
            with DeferredInterrupt():
                return call()
        except ConnectionError as error:
            self._broken = f"another rank does not answer, and {otherwise}"
            raise self._lost(error) from error

    def _lost(self, error: ConnectionError) -> ConnectionError:
        who = f"rank {self.collective.rank} of {self.collective.size}, at t = {self.t}"
        return ConnectionError(f"{who}: {error}. {self._broken}; end this process and go on from the last checkpoint")

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the same optimizer without ranks, on every rank: all states are copied here. See `save`."""
        self.wait()
        found: dict[str, Any] = self._talk(lambda: _state.gathered(self), "no state dict was made")
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, of any number of ranks. Raises ValueError, TypeError; nothing is changed then.

        Each rank takes what it owns.
        """
        self.wait()
        self._talk(lambda: _state.load(self, state_dict), "states may be of before or after")

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        params: bool = True,
        extra: Mapping[str, Any] | None = None,
        keep_last: int | None = 1,
        progress: Callable[[int, int], object] | None = None,
    ) -> Path:
        """As `fused_adam.checkpoint.save`, into a folder that all ranks see: each writes a shard of what it owns.

        Any number of ranks loads it, and so does `fused_adam.checkpoint.load`. extra: that of rank 0 is saved.
        progress: for this rank's bytes.

        Raises as that, on all ranks if it fails on one, when what was saved before is untouched; ConnectionError.
        """
        from fused_adam.distributed import _checkpoint

        self.wait()
        arguments = (self, path, params, extra, keep_last, progress)
        found: Path = self._talk(lambda: _checkpoint.save(*arguments), "nothing was saved")
        return found

    def load(
        self, path: str | os.PathLike[str], *, progress: Callable[[int, int], object] | None = None
    ) -> dict[str, Any]:
        """As `fused_adam.checkpoint.load`: each rank reads, and checks, what it owns. Parameters reach all ranks.

        Raises as that, on all ranks if it fails on one, when nothing is changed; ConnectionError.
        """
        from fused_adam.distributed import _checkpoint

        self.wait()
        arguments = (self, path, progress)
        found: dict[str, Any] = self._talk(lambda: _checkpoint.load(*arguments), "this rank may have half of it")
        return found
