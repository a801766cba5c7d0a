"""What happens to gradients on their way into a step: unscaled, checked, clipped, and zeroed behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypedDict

import numpy as np

from fused_adam import _norm, _numbers


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer class; see `SGD`.

    canonical: for parameters that are parts of others, as in `fused_adam.distributed`, the canonical index of each.
    """

    backend: str
    per_row_step: bool
    skip_nonfinite: bool
    max_grad_norm: float | None
    zero_grads: bool
    count_unmoved: bool
    device_scalars: bool
    master: str | None
    state_dtype: str | None
    stochastic_rounding: bool
    seed: int
    dtype: str | None
    canonical: Sequence[int]


class Stats(NamedTuple):
    """What the last step met.

    Attributes:
        grad_norm: the global norm of the unscaled gradients; None unless max_grad_norm or skip_nonfinite asks for it,
            and before the first step.
        clip_factor: what they were multiplied by so as not to exceed max_grad_norm, and would have been in a step that
            was skipped; None without it.
        skipped: steps that were skipped since this optimizer was made, unpickled or copied.
        unmoved: elements of p that kept their value in the last step although their gradient was not 0, because the
            update was too small for p's precision (or 0, as with lr = 0); None without count_unmoved.
    """

    grad_norm: float | None
    clip_factor: float | None
    skipped: int
    unmoved: int | None


class Settings(NamedTuple):
    """What the optimizer was made with."""

    skip_nonfinite: bool = False
    max_grad_norm: float | None = None
    zeroes: bool = False
    counts: bool = False
    device_scalars: bool = False

    @classmethod
    def checked(
        cls,
        skip_nonfinite: bool = False,
        max_grad_norm: float | None = None,
        zero_grads: bool = False,
        count_unmoved: bool = False,
        device_scalars: bool = False,
    ) -> Settings:
        """From arguments. Raises TypeError or ValueError."""
        return cls(
            _numbers.flag("skip_nonfinite", skip_nonfinite),
            _numbers.max_norm("max_grad_norm", max_grad_norm),
            _numbers.flag("zero_grads", zero_grads),
            _numbers.flag("count_unmoved", count_unmoved),
            _numbers.flag("device_scalars", device_scalars),
        )

    @property
    def names(self) -> str:
        """The arguments that ask for anything."""
        asked = (self.skip_nonfinite, self.max_grad_norm is not None, self.zeroes, self.counts, self.device_scalars)
        names = ("skip_nonfinite", "max_grad_norm", "zero_grads", "count_unmoved", "device_scalars")
        return ", ".join(compress(names, asked))

    @property
    def wants_norm(self) -> bool:
        return self.skip_nonfinite or self.max_grad_norm is not None

    @property
    def any(self) -> bool:
        return self.wants_norm or self.zeroes or self.counts or self.device_scalars

    @property
    def on_device(self) -> bool:
        """Whether a step on a GPU needs what only the device knows, so that t is to be kept there."""
        return self.wants_norm or self.counts or self.device_scalars

    def stats(self, control: Any) -> Stats:
        """From a `Control` of kernels/control.cuh."""
        return Stats(
            float(control["norm"]) if self.wants_norm else None,
            float(control["factor"]) if self.max_grad_norm is not None else None,
            int(control["skipped"]),
            int(control["unmoved"]) if self.counts else None,
        )

    def preludes(self, unscales: bool, clips: bool = False) -> tuple[str, ...]:
        return ("unscale",) * unscales + ("clip",) * (clips or self.max_grad_norm is not None)


class Guard:
    """One step's decisions, on a backend that lets the host take them.

    Args:
        settings: the optimizer's.
        scale: by which gradients are to be divided.
        found: whether somebody else has found that they are not finite.
        dtypes: of the gradients.
        coefficients: (1 / scale in each dtype, clip factor) -> those of each part.
        factor: the clip factor, where it is known before the gradients' norm.
    """

    def __init__(
        self,
        settings: Settings,
        scale: float,
        found: bool,
        dtypes: set[np.dtype[Any]],
        coefficients: Callable[[Mapping[np.dtype[Any], float], float], list[list[float]]],
        factor: float | None = None,
    ) -> None:
        self.settings = settings
        self.scale = scale
        self.unscaling = {dtype: _norm.unscaling(scale, dtype) for dtype in dtypes}
        self.skips = found or any(map(math.isnan, self.unscaling.values()))
        self.norm: float | None = None
        self.factor = factor
        self.count: Callable[[], int] = int  # of what did not move, to be asked for after the step; 0 if it is skipped
        self._coefficients = coefficients

    def decide(self, total: _norm.Total | None) -> Sequence[Sequence[float]] | None:
        """The coefficients of each part, or None for a step that is to be skipped. total: of the gradients' squares."""
        if total is not None:
            self.norm = total.norm()
            self.skips = self.skips or (self.settings.skip_nonfinite and not total.finite)
        if self.settings.max_grad_norm is not None and self.norm is not None:
            self.factor = _norm.clipping(self.norm, self.settings.max_grad_norm)
        return None if self.skips else self._coefficients(self.unscaling, 1.0 if self.factor is None else self.factor)
