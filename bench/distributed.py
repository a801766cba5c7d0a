"""What a sharded step costs beyond its communication and its kernel, on processes of one machine.

    torchrun --nproc-per-node 2 -m fused_adam.bench.distributed --size 2^24

In turns, so that a busy machine slows all alike: the sharded step; its communication alone, as PyTorch calls with a sum
in between; the kernel alone, over what a rank owns; and the two ways to reduce the gradients. Medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fused_adam
from fused_adam.distributed import Sharded, TorchCollective

ROUNDS, WARM_UP = 15, 3
LIMITS = {"step / (communication + kernel)": 1.1, "ordered / native reduction": 1.0}


class Raw:
    """The communication of a step over n float32 elements in buckets, by the calls of PyTorch alone."""

    def __init__(self, n: int, bucket: int) -> None:
        import torch
        import torch.distributed as dist

        self._dist = dist
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._g, self._p = torch.ones(n), torch.ones(n)
        self._received = [torch.empty(bucket) for _ in range(2)]
        self._own = torch.empty(bucket // self._ranks)
        self._buckets = [slice(start, start + bucket) for start in range(0, n, bucket)]

    def _all_to_all(self, k: int) -> Any:
        return self._dist.all_to_all_single(self._received[k % 2], self._g[self._buckets[k]], async_op=True)

    def _sum(self, k: int) -> None:
        parts = self._received[k % 2].numpy().reshape(self._ranks, -1)
        own = self._own.numpy()
        for lo in range(0, own.size, 2**14):
            out = own[lo : lo + 2**14]
            total = parts[0, lo : lo + 2**14]
            for part in parts[1:]:
                total = np.add(total, part[lo : lo + 2**14], out)

    def ordered(self, gather: bool = False) -> None:
        """Reduce all buckets in the order of the ranks; gather: and let all have the parameters, in the meantime."""
        gathers = []
        following = self._all_to_all(0)
        for k, bucket in enumerate(self._buckets):
            current, following = following, self._all_to_all(k + 1) if k + 1 < len(self._buckets) else None
            current.wait()
            self._sum(k)
            if gather:
                p = self._p[bucket]
                own = p.chunk(self._ranks)[self._rank]
                gathers.append(self._dist.all_gather_single(p, own, async_op=True))
        for work in gathers:
            work.wait()

    def native(self) -> None:
        """Reduce all buckets by the engine."""
        for bucket in self._buckets:
            self._dist.reduce_scatter_single(self._own, self._g[bucket])


def measure(size: int, bucket: int, rounds: int) -> dict[str, float]:
    """Medians in seconds, of all ranks' slowest."""
    collective = TorchCollective()
    params = fused_adam.flatten([np.ones(size, np.float32)])
    grads = params.zeros_like()
    grads.data[:] = 1e-3
    opt = Sharded(fused_adam.AdamW, params, collective, bucket_elements=bucket, average=False)
    opt.prepare()
    owned = fused_adam.flatten([np.ones(size // collective.size, np.float32)])
    kernel, own_grads = fused_adam.AdamW(owned), owned.zeros_like()
    own_grads.data[:] = 1e-3
    raw = Raw(size, bucket)
    what: dict[str, Callable[[], object]] = {
        "step": lambda: opt.step(grads),
        "communication": lambda: raw.ordered(gather=True),
        "kernel": lambda: kernel.step(own_grads),
        "ordered reduction": raw.ordered,
        "native reduction": raw.native,
    }
    times: dict[str, list[float]] = {name: [] for name in what}
    for k in range(WARM_UP + rounds):
        for name, run in what.items():
            collective.all_reduce(np.zeros(1, np.int64)).wait()  # so that all begin together
            start = time.perf_counter()
            run()
            collective.all_reduce(np.zeros(1, np.int64)).wait()
            if k >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {
        "step / (communication + kernel)": seconds["step"] / (seconds["communication"] + seconds["kernel"]),
        "ordered / native reduction": seconds["ordered reduction"] / seconds["native reduction"],
    }


def main() -> None:
    import torch.distributed as dist

    parser = argparse.ArgumentParser(prog="fused_adam.bench.distributed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", default="2^24", help="elements, as 2^24")
    parser.add_argument("--bucket", default="2^22", help="elements of a bucket")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    size, bucket = (int(x.partition("^")[0]) ** int(x.partition("^")[2] or 1) for x in (args.size, args.bucket))
    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(threads, 1)))  # before Numba is imported, by the first step
    dist.init_process_group("gloo")
    try:
        seconds = measure(size, min(size, bucket), args.rounds)
        if dist.get_rank() == 0:
            found = ratios(seconds)
            if args.json:
                print(json.dumps({"ranks": dist.get_world_size(), "seconds": seconds, "ratios": found}, indent=2))
                return
            for name, x in seconds.items():
                print(f"{name:32} {1e3 * x:8.2f} ms")
            for name, x in found.items():
                print(f"{name:32} {x:8.3f}    should be at most {LIMITS[name]}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
