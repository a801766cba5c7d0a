"""Times on a GPU: of the device by events, of host and device together, and of the host alone; always interleaved."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

Call = Callable[[], object]
Samples = dict[str, list[float]]  # seconds a call, one entry a round, for each candidate

_LONGEST_SPIN_S = 0.02


class Clock(Protocol):
    """The device work of all candidates is in the order of one stream."""

    def now(self) -> float:
        """The host's time in seconds."""

    def record(self) -> Any:
        """An event in the stream."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events that have happened."""

    def synchronize(self) -> None: ...

    def spin(self, seconds: float) -> None:
        """Keep the device busy for about so long, so that the host gets ahead of it."""

    def flush(self) -> None:
        """Push everything out of the device's cache."""


_KERNELS = r"""
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}

// Reads zeros and writes nothing, though no compiler can know: what it leaves in the cache need not be written back.
extern "C" __global__ void touch(float4* a, long long n) {
    float sum = 0;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        sum += a[i].x + a[i].y + a[i].z + a[i].w;
    if (sum != 0) a[0].x = sum;
}
"""
_CYCLES_A_SECOND = 1.98e9  # at the H200's highest clock; slower ones spin for longer
_FLUSH_BYTES = 2**28  # four times an H200's cache


class Gpu:
    """CuPy's current stream, the default one: where PyTorch and Numba work too."""

    def __init__(self) -> None:
        import cupy
        import numpy as np

        self._cupy = cupy
        self._int64 = np.int64
        self._spin, self._touch = cupy.RawKernel(_KERNELS, "spin"), cupy.RawKernel(_KERNELS, "touch")
        self._space = cupy.zeros(_FLUSH_BYTES // 4, np.float32)

    def now(self) -> float:
        return time.perf_counter()

    def record(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self._cupy.cuda.get_elapsed_time(start, end)) * 1e-3

    def synchronize(self) -> None:
        self._cupy.cuda.Device().synchronize()

    def spin(self, seconds: float) -> None:
        self._spin((1,), (1,), (self._int64(seconds * _CYCLES_A_SECOND),))

    def flush(self) -> None:
        self._touch((2048,), (256,), (self._space, self._int64(_FLUSH_BYTES // 16)))


def _rounds(names: Mapping[str, Call], rounds: int) -> Iterator[list[str]]:
    """All names in a new random order each round."""
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        yield order


def device_times(clock: Clock, calls: Mapping[str, Call], rounds: int, *, cold: bool) -> Samples:
    """What the device needs for a call when it never waits for the host.

    cold: the cache is flushed before each; otherwise the working set should be several times its size.
    """
    ahead = {name: min(2 * _host_time(clock, call) + 2e-5, _LONGEST_SPIN_S) for name, call in calls.items()}
    samples: Samples = {name: [] for name in calls}
    for order in _rounds(calls, rounds):
        events = {}
        for name in order:
            clock.spin(ahead[name])
            if cold:
                clock.flush()
            start = clock.record()
            calls[name]()
            events[name] = start, clock.record()
        clock.synchronize()
        for name, pair in events.items():
            samples[name].append(clock.elapsed(*pair))
    return samples


def _host_time(clock: Clock, call: Call, calls: int = 3) -> float:
    """Until a call returns, the device's queue being empty."""
    times = []
    for _ in range(calls):
        clock.synchronize()
        start = clock.now()
        call()
        times.append(clock.now() - start)
    clock.synchronize()
    return statistics.median(times)


def _wall(clock: Clock, call: Call, calls: int) -> float:
    """Seconds for so many calls and for the device to finish them."""
    clock.synchronize()
    start = clock.now()
    for _ in range(calls):
        call()
    clock.synchronize()
    return clock.now() - start


def wall_times(clock: Clock, calls: Mapping[str, Call], rounds: int, sample_s: float = 0.02) -> Samples:
    """Host and device together: many calls, and the device done, divided by their number."""
    batch = {}
    for name, call in calls.items():
        n = 4
        while (elapsed := _wall(clock, call, n)) < sample_s / 4:
            n *= 2
        batch[name] = max(4, round(n * sample_s / elapsed))
    samples: Samples = {name: [] for name in calls}
    for order in _rounds(calls, rounds):
        for name in order:
            samples[name].append(_wall(clock, calls[name], batch[name]) / batch[name])
    return samples


def host_times(clock: Clock, calls: Mapping[str, Call], rounds: int, queue: int = 10) -> Samples:
    """Until a call returns, on average over a short queue that starts empty."""
    samples: Samples = {name: [] for name in calls}
    for order in _rounds(calls, rounds):
        for name in order:
            clock.synchronize()
            start = clock.now()
            for _ in range(queue):
                calls[name]()
            samples[name].append((clock.now() - start) / queue)
    clock.synchronize()
    return samples
