"""What a guarded step must equal: unscale, check, measure, clip, step and zero, one pass after the other, in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from conftest import assert_same_bits, same_bits

from fused_adam._guard import Stats

Groups = list[list[Any]]  # of each group its arrays


def block_sums(x: Any) -> list[float]:
    """Of the squares of each 128 elements, in the order that DESIGN.md asks for: section 6."""
    padded = np.zeros(-(-x.size // 128) * 128)
    padded[: x.size] = x
    with np.errstate(all="ignore"):
        square = (padded * padded).reshape(-1, 32, 4)
        lane = ((square[..., 0] + square[..., 1]) + square[..., 2]) + square[..., 3]
        for stride in (16, 8, 4, 2, 1):
            lane = lane[:, :stride] + lane[:, stride : 2 * stride]
    return lane[:, 0].tolist()


def root_of_sum(sums: list[float]) -> float:
    """The root of the exact sum, rounded to float64 before it."""
    if not all(map(math.isfinite, sums)):
        return math.nan if any(map(math.isnan, sums)) else math.inf
    units = 0
    for numerator, denominator in map(float.as_integer_ratio, sums):
        units += numerator * ((1 << 1074) // denominator)
    try:
        return math.sqrt(units / (1 << 1074))
    except OverflowError:
        return math.inf


def in_order_of(p: Any, g: Any) -> Any:
    """g's elements as they follow each other in p."""
    return g.ravel(order="C" if p.flags.c_contiguous else "F")


class Unfused:
    """An ordinary optimizer behind passes of its own over the gradients; same arguments, same `Stats`."""

    def __init__(self, make: Any, groups: Groups, hyper: list[dict[str, Any]], **options: Any) -> None:
        self.params = [[np.array(p, order="K") for p in ps] for ps in groups]
        self.optimizer = make([{"params": ps, **h} for ps, h in zip(self.params, hyper, strict=True)], backend="numpy")
        self.options = options
        self.skipped = 0

    def step(self, groups: Groups, grad_scale: Any = None, found_inf: Any = None) -> Stats:
        scale = None if grad_scale is None else float(np.asarray(grad_scale).item())
        most, skips = self.options.get("max_grad_norm"), bool(found_inf is not None and np.any(found_inf))
        gs = [[np.array(g, order="K") for g in mine] for mine in groups]
        raw = [g.copy(order="K") for mine in gs for g in mine]
        ps = [p for mine in self.params for p in mine]
        with np.errstate(all="ignore"):
            if scale is not None:
                valid = 0 < scale < math.inf
                inverse = {g.dtype: g.dtype.type(1 / scale if valid else math.nan) for g in raw}
                inverse = {dtype: i if 0 < i < math.inf else dtype.type(math.nan) for dtype, i in inverse.items()}
                skips = skips or any(map(math.isnan, inverse.values()))
                gs = [[inverse[g.dtype] * g for g in mine] for mine in gs]
            norm = factor = unmoved = None
            if self.options.get("skip_nonfinite") or most is not None:
                pairs = zip(ps, (g for mine in gs for g in mine), strict=True)
                norm = root_of_sum([s for p, g in pairs for s in block_sums(in_order_of(p, g))])
            if self.options.get("skip_nonfinite"):
                skips = skips or not all(np.isfinite(g).all() for mine in gs for g in mine)
            if most is not None:
                factor = 1.0 if norm <= most else most / norm
                gs = [[g.dtype.type(factor) * g for g in mine] for mine in gs]
        before = [p.copy(order="K") for p in ps]
        if not skips:
            self.optimizer.step([[np.asarray(g) for g in mine] for mine in gs])
        self.skipped += skips
        if self.options.get("count_unmoved"):
            stays = [(p == b) & (g != 0) for p, b, g in zip(ps, before, raw, strict=True)]
            unmoved = 0 if skips else int(sum(map(np.sum, stays)))
        return Stats(norm, factor, self.skipped, unmoved)

    def assert_equals(self, optimizer: Any, groups: Any, what: str) -> None:
        """p, t and every state of another optimizer, whose parameters are given in the same order."""
        ours, theirs = optimizer.state_dict(), self.optimizer.state_dict()
        assert ours["t"] == theirs["t"], f"{what}: t"
        for k, (mine, ps) in enumerate(zip(groups, self.params, strict=True)):
            assert_same_bits(map(str, range(len(ps))), mine, ps, f"{what} group {k} p")
        for mine, other in zip(ours["state"], theirs["state"], strict=True):
            assert_same_bits(other, mine.values(), other.values(), what)


def assert_same_stats(ours: Stats, expected: Stats, what: str) -> None:
    for name, a, b in zip(Stats._fields, ours, expected, strict=True):
        assert type(a) is type(b) and (a is None or same_bits(a, b)), f"{what}: {name} is {a}, expected {b}"


def gradients(rng: np.random.Generator, groups: Groups, bad: bool = False, zeros: float = 0.05) -> Groups:
    """Like the parameters, in their memory order and over some orders of magnitude; one element of all may be bad."""
    made = [[np.array(p, order="K", copy=True) for p in ps] for ps in groups]
    for g in (g for mine in made for g in mine):
        g[...] = rng.standard_normal(g.shape) * 10 ** rng.uniform(-6, 2, g.shape) * (rng.random(g.shape) >= zeros)
    some = [g for mine in made for g in mine if g.size]
    if bad and some:
        g = some[rng.integers(len(some))]
        index = tuple(int(rng.integers(n)) for n in g.shape)
        g[index] = rng.choice([np.inf, -np.inf, np.nan])
    return made
