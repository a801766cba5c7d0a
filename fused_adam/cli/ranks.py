"""Training on several processes: each computes the gradients of its share of every batch, and steps a part of all.

A batch is cut into as many micro-batches whatever the number of processes, so all of them print the same numbers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fused_adam import FlatBuffer
from fused_adam.cli.exit_codes import CommandError, Exit
from fused_adam.cli.styles import Backward, Note
from fused_adam.cli.tasks import RULES
from fused_adam.distributed import Alone, Collective, Sharded, TorchCollective

MICRO_BATCHES = 8


def join() -> Collective:
    """This process among those that torchrun started; alone without torchrun. Raises CommandError."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if MICRO_BATCHES % size:
        raise CommandError(f"--distributed runs on 1, 2, 4 or {MICRO_BATCHES} processes, got {size}", Exit.USAGE)
    if "RANK" not in os.environ:
        return Alone()
    try:
        import torch.distributed as dist
    except ImportError:
        raise CommandError("torchrun needs PyTorch: pip install 'fused-adam[torch]'", Exit.UNAVAILABLE) from None
    dist.init_process_group("gloo")
    return TorchCollective()


def leave(collective: Collective) -> None:
    if isinstance(collective, TorchCollective):
        import torch.distributed as dist

        dist.destroy_process_group()


class Ranks:
    """A network's parameters, and this rank's part of the steps. Raises TypeError, ValueError, RuntimeError."""

    def __init__(
        self, rule: str, params: FlatBuffer, lr: float, backend: str, samples: int, collective: Collective
    ) -> None:
        made: Any = RULES[rule]
        kind, options = getattr(made, "func", made), getattr(made, "keywords", {})
        self._collective, self._samples = collective, np.arange(samples)
        self._optimizer = Sharded(
            kind,
            params,
            collective,
            mode="invariant",
            micro_batches=MICRO_BATCHES,
            lr=lr,
            backend=backend,
            **options,
        )
        self._optimizer.prepare()
        self.backend = self._optimizer.backend
        self._grads = [params.zeros_like() for _ in range(MICRO_BATCHES // collective.size)]

    def step(self, backward: Backward, rows: Any, lr: float, note: Note) -> Any:
        """As a `styles.Style`; the loss is that of the whole batch."""
        shares = np.array_split(self._samples[rows], MICRO_BATCHES)
        first = self._collective.rank * len(self._grads)
        losses = np.zeros(len(self._grads))
        for k, grads in enumerate(self._grads):
            share = shares[first + k]
            part = len(share) / sum(map(len, shares))
            if len(share):
                losses[k] = float(backward(share, grads)) * part
            grads.data[:] *= part * MICRO_BATCHES  # 1 where all are of one size
        of_all = np.empty(MICRO_BATCHES)
        self._collective.all_gather(of_all, losses).wait()
        loss = of_all.sum()
        note(loss)
        self._optimizer.set_lr(lr)
        self._optimizer.step(self._grads)
        return loss
