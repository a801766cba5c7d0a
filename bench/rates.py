"""How often `bench compare` is right: runs of the same code, and runs in which every step was slowed on purpose.

`python -m fused_adam.bench.rates` makes both kinds in turn, each in a process of its own, and compares all pairs. It
takes a minute for each pair of runs and wants a machine that does nothing else; runs already in --dir are kept.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fused_adam
from fused_adam import _base
from fused_adam.cli import console
from fused_adam.cli import main as fused_adam_main

from .compare import SAME, SLOWER, UNCLEAR, compare, together
from .results import Report, load

Pair = tuple[Report, Report]


def slowed(call: Callable[..., Any], part: float) -> Callable[..., Any]:
    """call, made to take 1 + part times as long."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        end = time.perf_counter()
        while time.perf_counter() < end + part * (end - start):
            pass
        return result

    return slow


def run(path: Path, part: float) -> None:
    """One `bench run`, in a process that this spoils for any other use: every step of ours is slowed."""
    if part:
        for owner, name in ((_base.Optimizer, "step"), (fused_adam, "adam_step"), (fused_adam, "adamw_step")):
            setattr(owner, name, slowed(getattr(owner, name), part))
    fused_adam_main(["bench", "run", "--json", str(path)])


def runs(folder: Path, count: int, part: float) -> tuple[list[Report], list[Report]]:
    """count reports of the code as it is and count of it slowed, made in turn where folder lacks them."""
    spawn = multiprocessing.get_context("spawn")
    for k in range(count):
        for path, slower in ((folder / f"same{k}.json", 0.0), (folder / f"slow{k}.json", part)):
            if not path.exists():
                process = spawn.Process(target=run, args=(path, slower))
                process.start()
                process.join()
    same, slow = ([load(folder / f"{name}{k}.json") for k in range(count)] for name in ("same", "slow"))
    return same, slow


def counted(pairs: Iterable[Pair]) -> list[str]:
    """Of pairs (BASE, NEW): their number, those reported, and what parts of the cases are each of three verdicts."""
    reported, total = 0, 0
    verdicts: Counter[str] = Counter()
    for base, new in pairs:
        found = [c.verdict for c in compare(base, new) if c.new.kind == "ours"]
        whole = together(base, new)
        reported += SLOWER in found or (whole is not None and whole.verdict == SLOWER)
        total += 1
        verdicts.update(found)
    parts = [f"{verdicts[v] / max(verdicts.total(), 1):.1%}" for v in (SAME, SLOWER, UNCLEAR)]
    return [str(total), str(reported), *parts]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_adam.bench.rates", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where the runs' JSON files are and go")
    parser.add_argument("--runs", type=int, default=10, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--slower", type=float, default=0.1, help="how much slower on purpose (default: %(default)s)")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    same, slow = runs(args.dir, args.runs, args.slower)
    rows = {
        "same code, one after the other": itertools.pairwise(same),
        "same code, all pairs": ((x, y) for x in same for y in same if x is not y),
        f"{args.slower:.0%} slower, one after the other": zip(same, slow, strict=True),
        f"{args.slower:.0%} slower, all pairs": ((x, y) for x in same for y in slow),
    }
    heads = ["runs", "pairs", "reported", SAME, SLOWER, UNCLEAR]
    console.table("bench compare", heads, [[name, *counted(pairs)] for name, pairs in rows.items()])


if __name__ == "__main__":
    main()
