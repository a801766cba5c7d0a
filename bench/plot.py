"""Draw a benchmark's files: speed and step time against size, beside what the memory gives."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from string import ascii_letters
from typing import Any

from fused_adam.cli.console import WIDTH
from fused_adam.cli.exit_codes import CommandError, Exit

from . import stats
from .results import Report, Row
from .show import read

_RATES = {"copy": ("copy rate", "--"), "roof": ("stream roof", "-."), "peak": ("theoretical peak", ":")}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X<>hp"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `bench run --json FILE` wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="F", help="a .png or .svg (default: FILE's name, here)")
    parser.add_argument("--term", action="store_true", help="in the terminal; no file unless -o is given")


def run(args: argparse.Namespace) -> int:
    path: Path | None = args.output
    if path is None and not args.term:
        path = Path(args.files[0].stem + ".png")
    if path is not None:
        check(path)
    reports = [read(file) for file in args.files]
    if not any(row.samples for report in reports for row in report.rows):
        raise CommandError("there is nothing to draw: no candidate was timed", Exit.FAILED)
    if args.term:
        terminal(reports)
    if path is not None:
        draw(reports, path)
        print(f"drawn in {path}")
    return Exit.OK


def check(path: Path) -> None:
    """Raise CommandError now for what would make `draw` fail later."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("a plot needs Matplotlib: pip install 'fused-adam[plot]'", Exit.FAILED)
    if path.suffix.lower() not in (".png", ".svg"):
        raise CommandError(f"a plot should be a .png or .svg file, got {path}", Exit.USAGE)
    if not path.parent.is_dir():
        raise CommandError(f"there is no folder {path.parent} for the plot", Exit.USAGE)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{path} cannot be written", Exit.USAGE)


@dataclass(frozen=True)
class Series:
    """One curve: the rows of a candidate, by size."""

    label: str
    candidate: str
    variant: tuple[str, ...]
    rows: tuple[Row, ...]


def series(reports: Sequence[Report]) -> list[Series]:
    """Labelled by the candidate and by as much more as not all have in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for name, report in zip(_names(reports), reports, strict=True):
        for row in report.rows:
            if row.samples:
                tensors = f"{row.tensors:,} tensors" if row.tensors > 1 else "1 tensor"
                found.setdefault((row.candidate, row.rule, row.dtype, row.mode, tensors, name), []).append(row)
    told = [k for k in range(1, 6) if len({key[k] for key in found}) > 1]
    return [
        Series(
            ", ".join([key[0], *(key[k] for k in told)]),
            key[0],
            key[1:],
            tuple(sorted(rows, key=lambda row: row.size)),
        )
        for key, rows in found.items()
    ]


def _names(reports: Sequence[Report]) -> list[str]:
    """What tells the files apart."""
    for names in ([r.device for r in reports], [r.revision[:9] for r in reports], [r.date for r in reports]):
        if len(set(names)) == len(reports):
            return names
    return [f"file {k}" for k in range(1, len(reports) + 1)]


def rates(reports: Sequence[Report]) -> list[tuple[str, str, float]]:
    """Label, dashes and bytes a second of each horizontal line."""
    lines = []
    for name, report in zip(_names(reports), reports, strict=True):
        where = f", {name}" if len(reports) > 1 else ""
        for key, (label, dashes) in _RATES.items():
            if key in report.rates:
                lines.append((f"{label} {_plain(report.rates[key] * 1e-9)} GB/s{where}", dashes, report.rates[key]))
    return lines


def draw(reports: Sequence[Report], path: Path) -> None:
    """GB/s on the left, the time of a step on the right; the legend has room of its own beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, whatever the environment says
    from matplotlib.figure import Figure

    curves, lines = series(reports), rates(reports)
    height = max(5.0, 1.2 + 0.22 * (len(curves) + len(lines)))
    width = 11.0 + 0.085 * max(len(label) for label in [*(c.label for c in curves), *(label for label, *_ in lines)])
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    candidates = list(dict.fromkeys(c.candidate for c in curves))
    variants = list(dict.fromkeys(c.variant for c in curves))
    for curve in curves:
        style = _style(curve, candidates.index(curve.candidate), variants.index(curve.variant))
        sizes = [row.size for row in curve.rows]
        ends = [stats.interval(row.samples) for row in curve.rows]
        _points(left, sizes, [r.bandwidth * 1e-9 for r in curve.rows], _speeds(curve.rows, ends), style)
        _points(right, sizes, [1e6 * r.median for r in curve.rows], [(1e6 * a, 1e6 * b) for a, b in ends], style)
    for label, dashes, rate in lines:
        left.axhline(rate * 1e-9, color="0.35", ls=dashes, lw=1.2, label=label, zorder=1)
    for axes, what in ((left, "achieved GB/s"), (right, "time of a step (us)")):
        _axes(axes, sorted({row.size for c in curves for row in c.rows}), what)
    figure.suptitle(_title(reports), fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path)


def _speeds(rows: Sequence[Row], ends: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    moved = [1e-9 * row.bytes_per_parameter * row.size for row in rows]
    return [(x / slow, x / fast) for x, (fast, slow) in zip(moved, ends, strict=True)]


def _points(
    axes: Any, x: Sequence[int], y: Sequence[float], ends: Sequence[tuple[float, float]], style: dict[str, Any]
) -> None:
    """With the intervals of the medians; one that rounding puts inside its ends has length 0."""
    below = [max(0.0, m - low) for m, (low, _) in zip(y, ends, strict=True)]
    above = [max(0.0, high - m) for m, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(x, y, yerr=(below, above), elinewidth=1, capsize=2, **style)


def _style(curve: Series, candidate: int, variant: int) -> dict[str, Any]:
    """Colour and marker are the candidate's, dashes those of dtype, mode and so on; the roof is black, ours thicker."""
    kind = curve.rows[0].kind
    return {
        "color": "black" if kind == "roof" else f"C{candidate % 10}",
        "marker": _MARKERS[candidate % len(_MARKERS)],
        "ls": _DASHES[variant % len(_DASHES)],
        "lw": {"ours": 2.2, "roof": 1.8}.get(kind, 1.2),
        "ms": 5,
        "label": curve.label,
        "zorder": {"ours": 4, "roof": 2}.get(kind, 3),
    }


def _axes(axes: Any, sizes: Sequence[int], what: str) -> None:
    first, last = math.floor(math.log2(sizes[0])), math.ceil(math.log2(sizes[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0 ** (first - 0.5), 2.0 ** (last + 0.5))
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 8)))
    axes.set_xticks([2.0**k for k in powers], [f"$2^{{{k}}}$" for k in powers])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, 2 * middle))  # room for labels, and noise does not look like more
    between = "25" if high / low < 1000 else ""  # few decades need more labels than their powers of ten
    axes.yaxis.set_major_formatter(lambda y, _: _plain(y))
    axes.yaxis.set_minor_formatter(lambda y, _: _plain(y) if f"{y:e}"[0] in between else "")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)


def _plain(x: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 1e-3 else f"{x:.6f}".rstrip("0")


def _title(reports: Sequence[Report]) -> str:
    rows = [row for report in reports for row in report.rows if row.samples]
    common = [values.pop() for values in ({r.rule for r in rows}, {r.dtype for r in rows}) if len(values) == 1]
    counted = sorted({row.bytes_per_parameter for row in rows})
    devices = " and ".join(dict.fromkeys(report.device for report in reports))
    return f"{', '.join([*common, devices])}; {' or '.join(map(str, counted))} bytes a parameter"


def terminal(reports: Sequence[Report]) -> None:
    """The speeds on stdout, 80 columns wide, in colour only on a terminal."""
    try:
        from plotext import figure, uncolorize
    except ImportError as error:  # not installed, or the older interface of plotext 5
        raise CommandError("--term needs plotext: pip install 'plotext>=6'", Exit.FAILED) from error
    curves = series(reports)
    sizes = sorted({row.size for c in curves for row in c.rows})
    first, last = math.floor(math.log2(sizes[0])), math.ceil(math.log2(sizes[-1]))
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 8)))
    figure.clear()
    figure.theme("simple")
    figure.plot_size(WIDTH, 22)
    lettered = list(zip(curves, cycle(ascii_letters), strict=False))
    for curve, letter in sorted(lettered, key=lambda pair: pair[0].rows[0].kind == "ours"):  # the last is on top
        x = [math.log2(row.size) for row in curve.rows]
        figure.draw(figure.signal(x, [row.bandwidth * 1e-9 for row in curve.rows], marker=letter))
    figure.ruler("y").scale("log")
    figure.ruler("x").lim(first - 0.5, last + 0.5)
    figure.ruler("x").ticks(list(powers), [f"2^{k}" for k in powers])
    figure.title(f"{_title(reports)}: GB/s, log scale")
    figure.label("parameters", "x")
    picture = str(figure.build())
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(picture if colour else "\n".join(line.rstrip() for line in uncolorize(picture).splitlines()))
    for curve, letter in lettered:
        print(f"{letter}  {curve.label}")
    for label, *_ in rates(reports):
        print(f"   {label}")
