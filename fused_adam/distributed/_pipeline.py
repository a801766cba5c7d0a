"""A step over all buckets, of which several are under way at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fused_adam._arrays import Array
from fused_adam._norm import Total, clipping, unscaling
from fused_adam.distributed import _total
from fused_adam.distributed._collective import Collective
from fused_adam.distributed._gather import Gathers
from fused_adam.distributed._model import Model
from fused_adam.distributed._plan import Plan, Space
from fused_adam.distributed._reduce import Reduction, Sum
from fused_adam.distributed._shard import Shard


class Pipeline:
    """Reduces, measures, steps and gathers.

    divisor: of sums, by which they become means.

    Attributes:
        shards: what this rank owns, by bucket; a bucket of which that is nothing is left out. gathers: of parameters
            under way. norm, factor: of the last step, None where they are not asked for.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        collective: Collective,
        mode: str,
        divisor: float,
        max_norm: float | None,
        skips: bool,
    ) -> None:
        self._model, self._plan, self._collective = model, plan, collective
        self._divisor, self._max_norm, self._skips = divisor, max_norm, skips
        self._reduction = Reduction(mode, plan, collective, model.dtype, self._measures)
        self.shards: Mapping[int, Shard] = model.shards(plan, collective.rank)
        self.gathers = Gathers(plan, collective, model.space)
        self.norm: float | None = None
        self.factor: float | None = None

    @property
    def _measures(self) -> bool:
        return self._max_norm is not None or self._skips

    def prepare(self) -> None:
        """Compile what a step needs whose gradients have no scale of their own."""
        for shard in self.shards.values():
            shard.prepare(1.0 if shard.narrow else self._divisor, self._max_norm is not None)

    def run(self, t: int, sources: Sequence[Space], scale: float, found: bool) -> bool:
        """Step number t; whether it was skipped. Raises ConnectionError.

        Args:
            scale: what gradients are divided by, beside the divisor of their sum.
            found: whether to skip it in any case.
        """
        sums: dict[int, Array] = {}
        if not self._measures:
            if not found:
                self._reduced(sources, lambda k, g: self._step(k, t, g, self._scale(k, scale)))
            return found
        total = Total()
        dtype = self._model.dtype

        def measure(k: int, g: Array) -> None:
            nonlocal total
            if k in self.shards:
                inverse = unscaling(self._scale(k, scale), dtype)
                total = total.plus(_total.local(self.shards[k].parts(g), inverse, dtype, self._model.backend))
            sums[k] = g

        self._reduced(sources, measure)
        total = _total.of_all(self._collective, total)
        self.norm = total.norm()
        self.factor = None if self._max_norm is None else clipping(self.norm, self._max_norm)
        if found or (self._skips and not total.finite):
            return True
        for k, g in sums.items():
            self._step(k, t, g, self._scale(k, scale))
        return False

    def _scale(self, k: int, scale: float) -> float:
        """What is left to divide by of bucket k."""
        return scale if k not in self.shards or self.shards[k].narrow else scale * self._divisor

    def _reduced(self, sources: Sequence[Space], use: Callable[[int, Array], None]) -> None:
        """Calls use(bucket, sums of what this rank owns of it), with the next bucket under way.

        Those of shards that take 16 bits are divided and rounded, before anybody looks at them.
        """
        following: Sum | None = None
        for k in range(self._plan.buckets):
            current = following or self._reduction.start(k, sources)
            following = self._reduction.start(k + 1, sources) if k + 1 < self._plan.buckets else None
            g = current.get()
            use(k, self.shards[k].rounded(g, self._divisor) if k in self.shards and self.shards[k].narrow else g)

    def _step(self, k: int, t: int, g: Array, scale: float) -> None:
        if k in self.shards:
            self.shards[k].step(t, g, scale, self.factor)
        self.gathers.start(k)
