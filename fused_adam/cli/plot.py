"""Loss curves: as a PNG with Matplotlib, in the terminal with plotext."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_adam.cli.console import WIDTH
from fused_adam.cli.exit_codes import CommandError, Exit

if TYPE_CHECKING:
    from fused_adam.cli.train import Run


def check(path: str) -> None:
    """Raise CommandError now for what would make `png` fail after the training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs Matplotlib: pip install 'fused-adam[plot]'", Exit.FAILED)
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise CommandError(f"--plot should name a .png file, got {path}", Exit.USAGE)
    if not target.parent.is_dir():
        raise CommandError(f"--plot: there is no folder {target.parent}", Exit.USAGE)
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise CommandError(f"--plot: {path} cannot be written", Exit.USAGE)


def png(path: str, runs: list[Run]) -> None:
    """A column a run: the loss of every step, and below it the test accuracy where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, whatever the environment says
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(runs), 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for column, run in zip(figure.subfigures(1, len(runs), squeeze=False)[0], runs, strict=True):
        column.suptitle(f"{run.task.name}: {run.rule}, lr {run.lr:g}, {run.dtype}, seed {run.seed}", fontsize=11)
        accuracies = [100 * p.accuracy for p in run.points if p.accuracy is not None]
        if accuracies:
            top, bottom = column.subplots(2, 1, sharex=True, height_ratios=[2, 1])
            _draw_loss(top, run)
            bottom.plot([p.step for p in run.points], accuracies, "o-", color="C1", ms=4)
            bottom.set_ylabel("test accuracy (%)")
            bottom.set_ylim(min(95, *accuracies) - 0.5, 100.5)
            bottom.grid(alpha=0.3)
            bottom.set_xlabel("steps")
        else:
            axes = column.subplots()
            _draw_loss(axes, run)
            axes.set_xlabel("steps")
    figure.savefig(path)


def _draw_loss(axes: Any, run: Run) -> None:
    """losses[k] was measured after k steps."""
    axes.plot(run.losses, color="C0", lw=1, alpha=0.5, label="each step's batch")
    axes.plot([p.step for p in run.points], [p.loss for p in run.points], "o", color="C0", ms=5, label="all samples")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    between = "236" if high / low < 20 else ""  # a decade or less needs more labels than its powers of ten
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in between else "")
    axes.set_ylabel(f"training loss\n({run.task.loss_name})")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def terminal(run: Run) -> None:
    """The loss of all steps on stdout, 80 columns wide, in colour only on a terminal."""
    try:
        from plotext import figure, uncolorize
    except ImportError:  # not installed, or the older interface of plotext 5
        print("(a curve in the terminal needs plotext: pip install 'plotext>=6')\n")
        return
    figure.clear()
    figure.theme("simple")
    figure.plot_size(WIDTH, 15)
    figure.draw(figure.signal(list(range(len(run.losses))), run.losses, marker="braille").lines())
    figure.ruler("y").scale("log")
    ticks = [round(len(run.losses) * k / 5) for k in range(6)]
    figure.ruler("x").lim(0, ticks[-1])
    figure.ruler("x").ticks(ticks, [f"{k:,}" for k in ticks])
    figure.title(f"{run.task.name}: {run.task.loss_name}, log scale")
    figure.label("steps", "x")
    picture = str(figure.build())
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(picture if colour else "\n".join(line.rstrip() for line in uncolorize(picture).splitlines()))
