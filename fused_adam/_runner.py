"""One step of fixed parameters: what their gradients pass first, what a guard decides, and one call of a stepper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fused_adam import _numbers
from fused_adam._codegen import Rule, behind
from fused_adam._guard import Guard, Settings, Stats
from fused_adam._update import Update
from fused_adam.backends import ON_GPU, DeferredInterrupt, Gradients, Placed


def is_scale(x: Any) -> bool:
    """Whether gradients have to be divided by it, or it has to be looked at by then."""
    return type(x) is not float or x != 1.0


class Runner:
    """Runs a backend's stepper.

    Args:
        stepper: of parts of these dtypes.
        backend: its name.
        settings: what happens to gradients on their way.
        on_device: whether t may be kept on a GPU.

    Attributes:
        on_device: whether t and all that follows from it is kept on a GPU.
        guarded: whether the settings ask for anything.

    Raises:
        ValueError: the settings ask for what the backend cannot do.
    """

    def __init__(
        self, stepper: Any, dtypes: Sequence[np.dtype[Any]], backend: str, settings: Settings, on_device: bool = True
    ) -> None:
        self.stepper = stepper
        self.settings = settings
        self._dtypes = dtypes
        self.guarded = settings.any
        self._skipped = 0
        self._last: Guard | None = None
        self.on_device = on_device and backend == "cupy" and settings.on_device
        if backend in ON_GPU and not self.on_device and (settings.device_scalars or settings.counts):
            name = "device_scalars" if settings.device_scalars else "count_unmoved"
            raise ValueError(f"{name} needs the cupy backend, got {backend!r}; leave it out")
        if self.on_device:
            stepper.keep(settings)

    def rules(self, updates: Sequence[Update], grad_scale: Any = 1.0, clips: bool = False) -> list[Rule]:
        """Each part's, behind what its gradients pass first; on the device always the same, for replays."""
        preludes = self.settings.preludes(self.on_device or is_scale(grad_scale), clips)
        return [behind(u.rule, preludes, self.settings.zeroes, self.settings.counts) for u in updates]

    def prepare(self, updates: Sequence[Update], by_row: bool = False) -> None:
        """Compile and allocate what a step needs. by_row: one over rows."""
        self.stepper.prepare(self.rules(updates), by_row, self.settings.wants_norm)
        if self.on_device:
            self.upload(updates, wait=True)

    def upload(self, updates: Sequence[Update], stream: Any = None, wait: bool = False) -> None:
        """Bring the hyperparameters to the device that keeps them."""
        self.stepper.upload(updates, self.rules(updates), stream, wait)

    def step_on_device(
        self, updates: Sequence[Update], gradients: Sequence[Any], grad_scale: Any, found_inf: Any, stream: Any = None
    ) -> None:
        """The next step, or none: the device knows."""
        self.stepper.step_on_device(updates, self.rules(updates, grad_scale), gradients, grad_scale, found_inf, stream)

    def step(
        self,
        t: int,
        updates: Sequence[Update],
        values: Sequence[Sequence[float]],
        gradients: Sequence[Gradients | Placed],
        grad_scale: Any = 1.0,
        found_inf: Any = None,
        options: tuple[Any, ...] = (),
        clipping: float | None = None,
    ) -> bool:
        """Step number t, with the updates' coefficients. options: the stream, on a GPU. False if it is skipped.

        clipping: what the gradients are multiplied by besides, if somebody else has decided on that.
        """
        if not self.guarded and found_inf is None and clipping is None and not is_scale(grad_scale):
            self.stepper.step(t, [u.rule for u in updates], values, gradients, *options)
            return True
        rules = self.rules(updates, grad_scale, clipping is not None)

        def coefficients(inverse: Mapping[Any, float], clipping: float) -> list[list[float]]:
            found = []
            for dtype, u, xs, rule in zip(self._dtypes, updates, values, rules, strict=True):
                known = {"unscaling": inverse[dtype], "clipping": clipping}
                known.update(zip(u.rule.coefficients, xs, strict=True))
                found.append([known[name] for name in rule.coefficients])
            return found

        scale, found = _numbers.grad_scale(grad_scale), _numbers.found_inf(found_inf)
        guard = Guard(self.settings, scale, found, {*self._dtypes}, coefficients, clipping)
        skipped = self._skipped + 1  # here, for once the step is done nothing may fail
        with DeferredInterrupt():  # one that came with the step would keep what it met from being known
            self.stepper.step_guarded(t, rules, gradients, guard, *options)
            if guard.skips:
                self._skipped = skipped
            self._last = guard
        return not guard.skips

    def last_stats(self) -> Stats:
        """What the last step met. Where scalars are kept on a GPU it waits for the device."""
        if self.on_device and self.stepper.ran:
            return self.settings.stats(self.stepper.control())
        if (last := self._last) is None:
            return Stats(None, None, self._skipped, None)
        return Stats(last.norm, last.factor, self._skipped, last.count() if self.settings.counts else None)
