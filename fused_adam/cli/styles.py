"""flat: one flat buffer and any rule; tf: TensorFlow 1's AdamOptimizer.minimize over the network's arrays"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fused_adam import FlatBuffer
from fused_adam.cli.tasks import RULES
from fused_adam.tf import AdamOptimizer

# Writes the gradients of some samples, by their rows, into a flat buffer; returns the loss.
Backward = Callable[[Any, Any], Any]
Note = Callable[[Any], object]


class Style(Protocol):
    """A way to step a network's parameters. backend: the name of the one that runs it."""

    backend: str

    def step(self, backward: Backward, rows: Any, lr: float, note: Note) -> Any:
        """Returns the loss of before the step, of which it makes a note before that."""


class Flat:
    def __init__(self, rule: str, params: FlatBuffer, lr: float, backend: str) -> None:
        self._grads = params.zeros_like()
        self._optimizer = RULES[rule](params, lr=lr, backend=backend)
        self._optimizer.prepare()
        self.backend: str = self._optimizer.backend

    def step(self, backward: Backward, rows: Any, lr: float, note: Note) -> Any:
        loss = backward(rows, self._grads)
        note(loss)
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

    def step(self, backward: Backward, rows: Any, lr: float, note: Note) -> Any:
        def loss_and_gradients() -> tuple[Any, list[Any]]:
            loss = backward(rows, self._grads)
            note(loss)
            return loss, list(self._grads.tree.values())

        self._optimizer.learning_rate = lr
        return self._optimizer.minimize(loss_and_gradients, self._variables)


STYLES: dict[str, Callable[[str, FlatBuffer, float, str], Style]] = {"flat": Flat, "tf": TensorFlow}
