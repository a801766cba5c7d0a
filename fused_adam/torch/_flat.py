"""The flat layout: parameters and their gradients as views of one buffer each, for each dtype."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from fused_adam._arrays import BLOCK
from fused_adam.torch import _tensors


class Flat:
    """Moves parameters that require gradients into buffers, and gives them gradients there.

    Raises:
        TypeError, ValueError, RuntimeError: one cannot be moved; none is then.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        mine = [*dict.fromkeys(p for p in params if p.requires_grad)]
        for k, p in enumerate(mine):
            name = f"parameter {k} of those that require gradients"
            if _tensors.is_spread(p):
                raise TypeError(f"{name} is a DTensor, which has no place in a buffer; leave flat=True out")
            _tensors.check_parameter(name, p)
            if p.grad is not None:
                _tensors.gradient(f"the gradient of {name}", p.grad, p)
        self._buffers: list[Tensor] = []  # of gradients
        # parameter -> its gradient, another tensor of the same memory, and where it was put itself
        self._views: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        # the number of its buffer, where it starts there, and the elements of the buffer
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        self._states: dict[str, dict[Tensor, Tensor]] = {}
        for _, alike in groupby(sorted(mine, key=_kind), key=_kind):
            self._move([*alike])

    def _move(self, params: list[Tensor]) -> None:
        """Parameters of one dtype: each starts on a multiple of 128 elements, and keeps its memory order."""
        total = sum(-(-p.numel() // BLOCK) * BLOCK for p in params)
        data, grad = torch.zeros(2, total, dtype=params[0].dtype, device=params[0].device).unbind()
        self._buffers.append(grad)
        start = 0
        for p in params:
            mine, view = _part(data, start, p), _part(grad, start, p)
            mine.copy_(p.detach())
            if p.grad is not None:
                view.copy_(p.grad.detach())
            p.grad = None  # for p.data takes another place
            p.data = mine
            p.grad = view
            self._views[p] = view, view.detach(), mine.data_ptr()
            self._places[p] = len(self._buffers), start, total
            start += -(-p.numel() // BLOCK) * BLOCK

    def __contains__(self, p: Tensor) -> bool:
        return p in self._views

    def gradients(self, params: list[Tensor]) -> list[Tensor | None]:
        """Those of the buffer, None for parameters that have none there."""
        return [self._views[p][0] if p in self._views else None for p in params]

    def states(self, called: str, wanted: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """A state of parameters, each at the place of its parameter in a buffer of the state's own.

        Args:
            wanted: (parameter, its state). States that are where they should be stay; if one is not, all are copied to
                a new buffer.
        """
        known = self._states.get(called, {})
        if all(known.get(p) is s for p, s in wanted):
            return [s for _, s in wanted]
        buffers: dict[tuple[int, str, str], Tensor] = {}
        made = {}
        for p, s in wanted:
            number, start, total = self._places[p]
            kind = (number, *_kind(s))
            if kind not in buffers:
                buffers[kind] = torch.zeros(total, dtype=s.dtype, device=s.device)
            made[p] = buffers[kind].as_strided(p.shape, p.stride(), start).copy_(s)
        self._states[called] = made
        return [*made.values()]

    def zero(self, params: Iterable[Tensor]) -> None:
        """Zero all gradients. They are the buffer's again, but for parameters that have been moved out of theirs."""
        for buffer in self._buffers:
            buffer.zero_()
        for p in params:
            view, there, place = self._views.get(p, (None, None, 0))
            if view is None or there is None or p.data_ptr() != place:
                p.grad = None
                continue
            if view.data_ptr() != there.data_ptr():  # p.grad.data was assigned to
                view.data = there
            if p.grad is not view:
                p.grad = view


def _kind(p: Tensor) -> tuple[str, str]:
    return str(p.dtype), str(p.device)


def _part(buffer: Tensor, start: int, p: Tensor) -> Tensor:
    """The elements from `start` on, in the shape and memory order of p, with a storage of their own over this memory.

    For tensors of one storage are one tensor to Accelerate, which saves the first of them alone, and to torch.save each
    is as long as the buffer.
    """
    return torch.from_dlpack(buffer[start : start + p.numel()]).as_strided(p.shape, p.stride())  # type: ignore[attr-defined]
