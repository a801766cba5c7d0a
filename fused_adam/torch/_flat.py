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
            _tensors.check_parameter(f"parameter {k} of those that require gradients", p)
        self._buffers: list[Tensor] = []  # of gradients
        self._views: dict[Tensor, tuple[Tensor, int]] = {}  # parameter -> its gradient, and where it was put itself
        for _, alike in groupby(sorted(mine, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
            self._move([*alike])

    def _move(self, params: list[Tensor]) -> None:
        """Parameters of one dtype: each starts on a multiple of 128 elements, and keeps its memory order."""
        total = sum(-(-p.numel() // BLOCK) * BLOCK for p in params)
        data, grad = torch.zeros(2, total, dtype=params[0].dtype).unbind()
        self._buffers.append(grad)
        start = 0
        for p in params:
            mine = data.as_strided(p.shape, p.stride(), start)
            view = grad.as_strided(p.shape, p.stride(), total + start)
            mine.copy_(p.detach())
            if p.grad is not None:
                view.copy_(p.grad)
            p.grad = None  # for p.data takes another place
            p.data = mine
            p.grad = view
            self._views[p] = view, mine.data_ptr()
            start += -(-p.numel() // BLOCK) * BLOCK

    def gradients(self, params: list[Tensor]) -> list[Tensor] | None:
        """Those of the buffer; None if a parameter is not in it."""
        if not all(p in self._views for p in params):
            return None
        return [self._views[p][0] for p in params]

    def zero(self, params: Iterable[Tensor]) -> None:
        """Zero all gradients. They are the buffer's again, but for parameters that have been moved out of theirs."""
        for buffer in self._buffers:
            buffer.zero_()
        for p in params:
            view, place = self._views.get(p, (None, 0))
            if view is None or p.data_ptr() != place:
                p.grad = None
            elif p.grad is not view:
                p.grad = view
