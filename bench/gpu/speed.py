"""The speed cases: AdamW in float32 over one parameter and over many, against what bounds it and against PyTorch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import fused_adam

from . import peers, speed_stored
from .arrays import bridge
from .clock import Call, Clock, Gpu, Samples, device_times, host_times, wall_times
from .peers import HYPER, Tensors
from .worker import Case, Skipped

SIZES = tuple(2**k for k in (28, 26, 24, 22, 20, 10, 12, 30, 16, 18, 14))  # the most telling first
MANY = ((200, 2**20), (1000, 2**16))
CUPY, LIST, NUMBA, FUSED, FOREACH = "cupy", "cupy list", "numba-cuda", "torch fused", "torch foreach"
ROOF, COPY = "roof", "copy"
_RESIDENT = 2**28  # bytes from which on a working set leaves no trace in the cache
_MOST_SETS = 8


@dataclass(frozen=True)
class Candidates:
    """steps: builders of steps. bounds: of what is only timed on the device. graphs: (builder, how to capture)."""

    steps: Mapping[str, peers.Builder]
    bounds: Mapping[str, peers.Builder]
    graphs: Mapping[str, tuple[peers.Builder, Callable[[Sequence[Call]], Call]]]


ONE = Candidates(
    steps={
        CUPY: peers.ours_flat("cupy"),
        NUMBA: peers.ours_flat("numba-cuda"),
        FUSED: peers.torch_adamw(fused=True),
        FOREACH: peers.torch_adamw(fused=False),
    },
    bounds={ROOF: peers.roof, COPY: peers.copy},
    graphs={
        CUPY: (peers.ours_flat("cupy"), peers.our_graph),
        FUSED: (peers.torch_adamw(fused=True, capturable=True), peers.torch_graph),
    },
)
SEVERAL = Candidates({**ONE.steps, LIST: peers.ours_list("cupy")}, ONE.bounds, ONE.graphs)
GROUPS = Candidates(SEVERAL.steps, {}, {})


class Field:
    """Who takes part, and who cannot and why."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.absent: dict[str, str] = {}

    def enter(self, name: str, build: Callable[[], Call]) -> list[Call]:
        """The call that it builds, made once for a start; none if that fails."""
        try:
            call = build()
            call()
            self._clock.synchronize()
        except Exception as error:
            self.absent[name] = f"{type(error).__name__}: {error}"[:500]
            return []
        return [call]


def race(clock: Clock, x: Tensors, candidates: Candidates, free: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Every candidate in each of the ways to time it."""
    nbytes = 16 * x.elements
    sets = min(_MOST_SETS, max(1, _RESIDENT // nbytes))
    # parameter, gradient and states of each, and as much again for foreach's temporaries
    _room(free, sets * nbytes * (len(candidates.steps) + 2) + 2 * peers.COPY_BYTES)
    field = Field(clock)
    samples = _steps(clock, x, candidates, field, sets, rounds)
    free()
    return {
        "elements": x.elements,
        "tensors": x.count,
        "groups": x.groups,
        "sets": sets,
        "copied": peers.copy_bytes(x.elements),
        "samples": _short(samples | {"graph": _graphs(clock, x, candidates, field, sets, rounds)}),
        "absent": field.absent,
    }


def _steps(
    clock: Clock, x: Tensors, candidates: Candidates, field: Field, sets: int, rounds: int
) -> dict[str, Samples]:
    turns = {}
    for name, build in candidates.steps.items():
        calls = [call for _ in range(sets) for call in field.enter(name, partial(build, x))]
        if len(calls) == sets:
            turns[name] = calls
    alone = {name: calls[0] for name, calls in turns.items()}
    for name, build in candidates.bounds.items():
        for call in field.enter(name, partial(build, x)):
            alone[name] = call
    cold = 16 * x.elements < _RESIDENT
    return {
        "device": device_times(clock, alone, rounds, cold=cold),
        "end to end": wall_times(clock, {name: peers.in_turn(calls) for name, calls in turns.items()}, rounds),
    }


def _graphs(clock: Clock, x: Tensors, candidates: Candidates, field: Field, sets: int, rounds: int) -> Samples:
    """Seconds a step, of graphs of one step over each set."""
    graphs = {}
    for name, (build, capture) in candidates.graphs.items():
        for graph in field.enter(f"{name}, graph", partial(_captured, capture, build, x, sets)):
            graphs[name] = graph
    times = device_times(clock, graphs, rounds, cold=False)
    return {name: [t / sets for t in some] for name, some in times.items()}


def _captured(capture: Callable[[Sequence[Call]], Call], build: peers.Builder, x: Tensors, sets: int) -> Call:
    return capture([build(x) for _ in range(sets)])


def _room(free: Callable[[], int], needed: int) -> None:
    if needed > (there := free()):
        raise Skipped(f"it needs {needed / 2**30:.0f} GiB, and {there / 2**30:.0f} are free")


def _short(samples: Mapping[str, Samples]) -> dict[str, Samples]:
    """Four digits are more than any of these times has."""
    return {way: {n: [float(f"{t:.4g}") for t in times] for n, times in s.items()} for way, s in samples.items()}


def host_case(clock: Clock, some: int = 20, more: int = 1000) -> dict[str, Any]:
    """How long `step` keeps its caller."""
    small, many = Tensors(some, 500), Tensors(more, 64)
    builders = {
        "flat buffer of 20": partial(peers.ours_flat("cupy"), small),
        "flat buffer of 20, numba-cuda": partial(peers.ours_flat("numba-cuda"), small),
        "list of 1,000": partial(peers.ours_list("cupy"), many),
        "list of 1,000, other gradients each step": partial(peers.ours_moving, many),
        "torch fused, 20": partial(peers.torch_adamw(fused=True), small),
        "torch fused, 1,000": partial(peers.torch_adamw(fused=True), many),
    }
    field = Field(clock)
    calls = {name: call for name, build in builders.items() for call in field.enter(name, build)}
    for call in calls.values():
        call()
    return {"absent": field.absent, "samples": _short({"host": host_times(clock, calls, 60)})}


def values_case(clock: Clock, free: Callable[[], int], n: int = 2**28) -> dict[str, Any]:
    """Zero gradients, with which the square root takes its slow path, and subnormal states, against random ones."""
    _room(free, 3 * 16 * n)
    kinds = {"random": (1e-3, 1e-3, 1e-6), "zero gradients": (0.0, 0.0, 0.0), "subnormal": (1e-39, 1e-39, 1e-39)}
    calls = {}
    for name, (g, m, v) in kinds.items():
        arrays = [peers.random(n, seed, scale) for seed, scale in ((0, 0.1), (1, g), (2, m))]
        arrays.append(peers.random(n, 3, v, positive=True))
        calls[name] = partial(fused_adam.adamw_step, *arrays, step=1000, backend="cupy", **HYPER)
        calls[name]()
    return {"elements": n, "samples": _short({"device": device_times(clock, calls, 15, cold=False)})}


def stored_case(clock: Clock, free: Callable[[], int], n: int = 2**28) -> dict[str, Any]:
    """Numbers in 16 and 8 bits, with gradients that are random, zero and subnormal."""
    _room(free, (2 * 16 + 3 * 14 + 2 * 14) * n)
    field = Field(clock)
    found = _short(speed_stored.samples(clock, field.enter, n))
    free()
    return {"elements": n, "samples": found, "absent": field.absent}


def _race_case(clock: Clock, free: Callable[[], int], x: Tensors, candidates: Candidates) -> dict[str, Any]:
    return race(clock, x, candidates, free, rounds=25 if x.elements <= 2**26 else 11)


def name_of(x: Tensors) -> str:
    size = f"2^{x.size.bit_length() - 1}"
    one = size if x.count == 1 else f"{x.count:,} x {size}"
    return one if x.groups == 1 else f"{one}, {x.groups} groups"


def cases() -> list[Case]:
    bridged, clock = bridge(), Gpu()
    races = [(Tensors(1, n), ONE) for n in SIZES]
    races[4:4] = [(Tensors(count, n), SEVERAL) for count, n in MANY]
    races += [(Tensors(count, n, 8), GROUPS) for count, n in MANY]
    found = [(name_of(x), partial(_race_case, clock, free_bytes, x, candidates)) for x, candidates in races]
    found[6:6] = [
        ("host time", partial(host_case, clock)),
        ("values", partial(values_case, clock, free_bytes)),
        ("stored", partial(stored_case, clock, free_bytes)),
    ]
    return [Case(name, partial(_reported, bridged, run), limit=90.0) for name, run in found]


def _reported(bridged: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {"bridge": bridged, **run()}


def free_bytes() -> int:
    """The device's memory that nobody needs, once everybody has let go of what he kept for later."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    with suppress(Exception):  # where it was loaded, and works
        sys.modules["numba.cuda"].current_context().memory_manager.deallocations.clear()
    return int(cupy.cuda.runtime.memGetInfo()[0])
