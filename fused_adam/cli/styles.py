"""flat: one flat buffer and any rule; tf: TensorFlow 1's AdamOptimizer.minimize over the network's arrays"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fused_adam import FlatBuffer
from fused_adam.cli.tasks import RULES
from fused_adam.tf import AdamOptimizer

# Writes the gradients of one batch into a flat buffer; returns the loss.
Backward = Callable[[Any], Any]


class Style(Protocol):
    """A way to step a network's parameters. backend: the name of the one that runs it."""

    backend: str

    def __init__(self, rule: str, params: FlatBuffer, lr: float, backend: str) -> None: ...

    def step(self, backward: Backward, lr: float) -> Any:
        """Returns the loss of before the step."""


class Flat:
    def __init__(self, rule: str, params: FlatBuffer, lr: float, backend: str) -> None:
        self._grads = params.zeros_like()
        self._optimizer = RULES[rule](params, lr=lr, backend=backend)
        self._optimizer.prepare()
        self.backend: str = self._optimizer.backend

    def step(self, backward: Backward, lr: float) -> Any:
        loss = backward(self._grads)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step(self._grads)
        return loss


class TensorFlow:
    """For the rule adam."""

    def __init__(self, rule: str, params: FlatBuffer, lr: float, backend: str) -> None:
        self._grads = params.zeros_like()
        self._variables = list(params.tree.values())
        self._optimizer = AdamOptimizer(lr, backend=backend)
        self._optimizer.prepare(self._variables)
        self.backend = self._optimizer.backend

    def step(self, backward: Backward, lr: float) -> Any:
        self._optimizer.learning_rate = lr
        return self._optimizer.minimize(
            lambda: (backward(self._grads), list(self._grads.tree.values())), self._variables
        )


STYLES: dict[str, type[Style]] = {"flat": Flat, "tf": TensorFlow}
