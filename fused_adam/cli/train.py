"""Train a small network: the founding regression, or real handwritten digits.

With one seed the printed numbers are the same for every backend of a device; the network's own arithmetic differs
between NumPy and CuPy. The learning rate falls linearly to zero.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import fused_adam
from fused_adam.cli import console, gpu, info, network, plot, ranks, styles
from fused_adam.cli.exit_codes import CommandError, Exit
from fused_adam.cli.tasks import RULES, TASKS, Data, Task
from fused_adam.distributed import Collective

REPORTS = 10  # rows in the printed table
UNREAD = 100  # losses that stay on the device before they are read at once: reading waits for all work


@dataclass
class Point:
    """The state after `step` steps: loss over all training samples, fraction of the test samples that are right."""

    step: int
    loss: float
    accuracy: float | None


@dataclass
class Run:
    """One training: what was asked for, and what came of it so far. losses: of each step's batch, before the step."""

    task: Task
    rule: str
    lr: float
    batch: int
    dtype: str
    seed: int
    style: str
    device: str
    backend: str
    planned_steps: int
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    ranks: int = 1

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS, help="; ".join(f"{t.name}: {t.about}" for t in TASKS.values()))
    parser.add_argument("--rule", choices=RULES, help="adam for the regression and adamw for the digits by default")
    parser.add_argument("--style", choices=styles.STYLES, default="flat", help=styles.__doc__)
    parser.add_argument("--lr", type=float, help="learning rate at the start; each rule has its own default")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_count, help="how many steps")
    length.add_argument("--epochs", type=_count, help="how many passes over the training samples")
    parser.add_argument("--batch", type=_count, help="samples in a step: 32 for the digits, all for the regression")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", choices=gpu.DEVICES, default="cpu", help="cuda: all arrays are CuPy's, on a GPU")
    parser.add_argument("--backend", choices=info.BACKENDS, default="auto", help="of the step, the fastest by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distributed", action="store_true", help="on all processes that torchrun started")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the loss into this file")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with the loss of every step")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise CommandError(f"--seed should be at least 0, got {args.seed}", Exit.USAGE)
    if args.style == "tf" and args.rule not in (None, "adam"):
        raise CommandError(f"--style tf is Adam's; use --rule adam, or leave out --style for {args.rule}", Exit.USAGE)
    if args.plot:
        plot.check(args.plot)  # before the training, not after it
    if not args.distributed:
        return _report(args, _train(args))
    if args.style != "flat" or args.device != "cpu":
        raise CommandError("--distributed is for the CPU and --style flat; leave out --style and --device", Exit.USAGE)
    collective = ranks.join()
    try:
        result = _train(args, collective)
        return _report(args, result) if collective.rank == 0 else Exit.OK
    except ConnectionError as error:
        raise CommandError(str(error), Exit.FAILED) from None
    finally:
        ranks.leave(collective)


def _train(args: argparse.Namespace, collective: Collective | None = None) -> Run:
    return train(
        TASKS[args.task],
        rule=args.rule,
        style=args.style,
        lr=args.lr,
        steps=args.steps,
        epochs=args.epochs,
        batch=args.batch,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        seed=args.seed,
        collective=collective,
    )


def _report(args: argparse.Namespace, result: Run) -> int:
    """Print a training; returns the exit status."""
    print_json(result) if args.json else print_table(result)
    if args.plot and result.points:
        plot.png(args.plot, [result])
    steps = len(result.losses)
    print(
        f"{steps:,} steps in {result.seconds:.2f} s ({steps / max(result.seconds, 1e-9):,.0f} steps/s), "
        f"backend {result.backend}{f', {result.ranks} ranks' if result.ranks > 1 else ''}",
        file=sys.stderr,
    )
    if result.interrupted:
        print(f"fused-adam: interrupted after {steps:,} of {result.planned_steps:,} steps", file=sys.stderr)
        return Exit.INTERRUPTED
    if result.diverged:
        raise CommandError(f"the loss is no longer finite after {steps:,} steps; try a lower --lr", Exit.FAILED)
    return Exit.OK


def train(
    task: Task,
    *,
    rule: str | None = None,
    style: str = "flat",
    lr: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str = "auto",
    seed: int = 0,
    collective: Collective | None = None,
) -> Run:
    """Train until done, until Ctrl-C or until the loss is not finite; None stands for the task's default.

    collective: this rank, if there are others that train the same.
    """
    xp = gpu.arrays(device, backend)
    rng = np.random.default_rng(seed)
    loaded = task.load(rng)
    initial = network.initial(task.sizes, rng, dtype)
    rule = rule or ("adam" if style == "tf" else task.rule)
    lr = task.lr[rule] if lr is None else lr
    try:
        data = Data(*(xp.asarray(a.astype(dtype)) for a in (loaded.x, loaded.y, loaded.x_test, loaded.y_test)))
        params = fused_adam.flatten({name: xp.asarray(a) for name, a in initial.items()})
        stepper: styles.Style
        if collective is None:
            stepper = styles.STYLES[style](rule, params, lr, backend)
        else:
            stepper = ranks.Ranks(rule, params, lr, backend, len(data.x), collective)
    except RuntimeError as error:
        raise CommandError(str(error), Exit.UNAVAILABLE) from None
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from None
    shown = collective is None or collective.rank == 0

    samples = len(data.x)
    batch = min(batch or task.batch or samples, samples)
    steps = steps or (epochs or task.epochs) * -(-samples // batch)
    result = Run(task, rule, lr, batch, dtype, seed, style, device, stepper.backend, steps)
    result.ranks = 1 if collective is None else collective.size
    every = max(steps // REPORTS, 1)
    unread: list[Any] = []

    def backward(rows: Any, grads: Any) -> Any:
        return network.backward(params, grads, data.x[rows], data.y[rows], task.loss)

    start = time.perf_counter()
    try:
        with console.progress(steps, shown) as show, np.errstate(all="ignore"):  # a loss of inf is reported below
            for step, rows in zip(range(1, steps + 1), _batches(xp, rng, samples, batch), strict=False):
                loss = stepper.step(backward, rows, lr * (1 - (step - 1) / steps), unread.append)
                show(step, loss)
                report = step % every == 0 or step == steps
                if report or len(unread) == UNREAD:
                    _read(unread, result)
                if result.diverged:
                    break
                if report:
                    result.points.append(_evaluate(step, params, data, task))
    except KeyboardInterrupt:
        result.interrupted = True
        _read(unread, result)
        if result.losses and not result.diverged and (not result.points or result.points[-1].step < len(result.losses)):
            result.points.append(_evaluate(len(result.losses), params, data, task))
    result.seconds = time.perf_counter() - start
    return result


def _read(unread: list[Any], result: Run) -> None:
    """Take the losses to the host, up to the first that is not finite."""
    if unread:
        losses = network.namespace(unread[0]).stack(unread).tolist()
        unread.clear()
        for loss in losses:
            if not result.diverged:
                result.losses.append(loss)


def _batches(xp: Any, rng: np.random.Generator, samples: int, batch: int) -> Iterator[Any]:
    """Rows of each step's batch, without end; every epoch in a new order."""
    while batch == samples:
        yield slice(None)
    while True:
        order = xp.asarray(rng.permutation(samples))
        for start in range(0, samples, batch):
            yield order[start : start + batch]


def _evaluate(step: int, params: Any, data: Data, task: Task) -> Point:
    _, outputs = network.forward(params, data.x)
    loss = float(task.loss(outputs, data.y)[0])
    if not len(data.x_test):
        return Point(step, loss, None)
    _, outputs = network.forward(params, data.x_test)
    return Point(step, loss, float((outputs.argmax(axis=1) == data.y_test.argmax(axis=1)).mean()))


def print_table(result: Run) -> None:
    """The numbers that are the same on every backend: no times."""
    rule = f"{result.rule}{', TensorFlow style' if result.style == 'tf' else ''}"
    samples = f"{result.task.about}\n{rule}, lr {result.lr:g}, batches of {result.batch}, {result.dtype}"
    rows = [
        [f"{p.step:,}", f"{p.loss:.8f}", "" if p.accuracy is None else f"{100 * p.accuracy:.2f} %"]
        for p in result.points
    ]
    accuracy = "test accuracy" if any(row[2] for row in rows) else ""
    console.table(f"{samples}, seed {result.seed}\n", ["step", "training loss", accuracy], rows)


def print_json(result: Run) -> None:
    last = result.points[-1] if result.points else Point(0, math.nan, None)
    document = asdict(result) | {
        "task": result.task.name,
        "steps": len(result.losses),
        "final_loss": last.loss,
        "test_accuracy": last.accuracy,
        "versions": info.versions(),
    }
    console.emit_json(document)
