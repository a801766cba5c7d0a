"""Show everything at once: the environment, both trainings with their loss curves, and a small speed table."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

import fused_adam
from fused_adam.backends import ON_GPU
from fused_adam.cli import info, plot, train
from fused_adam.cli.exit_codes import CommandError, Exit
from fused_adam.cli.tasks import TASKS

BENCH_LIMIT = 90  # seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE.png", default="fused_adam_demo.png", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    plot.check(args.plot)
    info.run(argparse.Namespace(json=False))

    available = [name for name, ok, _ in fused_adam.backends() if ok and name not in ON_GPU]  # the arrays are NumPy's
    runs = []
    for task in TASKS.values():
        first, *others = [train.train(task, backend=name, seed=args.seed) for name in available]
        if first.interrupted:
            raise KeyboardInterrupt
        train.print_table(first)
        plot.terminal(first)
        same = all(other.losses == first.losses for other in others)
        print(f"\n{task.name}: {'the same' if same else 'DIFFERENT'} losses on {' and '.join(available)}\n")
        if not same:
            raise CommandError("backends disagree; run `fused-adam verify`", Exit.WRONG)
        runs.append(first)
    plot.png(args.plot, runs)
    print(f"both curves are in {args.plot}\n")
    return _speed_table()


def _speed_table() -> int:
    """The quick benchmark, in a process of its own: it sets thread variables before NumPy is loaded."""
    if find_spec("fused_adam.bench") is None:
        print("the benchmark is not part of this installation")
        return Exit.OK
    sys.stdout.flush()
    try:
        done = subprocess.run([sys.executable, "-m", "fused_adam.bench", "--quick"], timeout=BENCH_LIMIT)
    except subprocess.TimeoutExpired:
        raise CommandError(f"the quick benchmark took longer than {BENCH_LIMIT} s", Exit.FAILED) from None
    return Exit.OK if done.returncode == 0 else Exit.FAILED
