"""Print the tables of a benchmark's file again, as text, Markdown or CSV."""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_adam.cli import console
from fused_adam.cli.exit_codes import CommandError, Exit

from .report import power
from .results import Report, Row, Unreadable, load

MODES = {"e2e": "end to end", "cold": "on the device, cold cache", "graph": "graph replay"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="what `bench run --json FILE` wrote")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--md", action="store_true", help="one Markdown table")
    form.add_argument("--csv", action="store_true", help="comma-separated, in seconds and bytes")


def run(args: argparse.Namespace) -> int:
    report = read(args.file)
    if args.csv or args.md:
        print((as_csv if args.csv else markdown)(report), end="")
    else:
        tables(report)
    return Exit.OK


def read(path: Path) -> Report:
    """`load` for a command: what is wrong with the file ends it with a message and exit status 2."""
    try:
        return load(path)
    except Unreadable as error:
        raise CommandError(str(error), Exit.USAGE) from error
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", Exit.USAGE) from error


@dataclass(frozen=True)
class Line:
    """A timed row beside the others of its case. over_peer: times as fast as the fastest peer."""

    row: Row
    spread: float
    of_roof: float | None
    over_peer: float | None

    @property
    def host(self) -> float | None:
        return statistics.median(self.row.host) if self.row.host else None


def cases(rows: Iterable[Row]) -> dict[tuple[str, str, str, int, int], list[Row]]:
    """The rows that were timed, by case."""
    found: dict[tuple[str, str, str, int, int], list[Row]] = {}
    for row in rows:
        if row.samples:
            found.setdefault(row.case, []).append(row)
    return found


def faster(slow: Row, fast: Row) -> float:
    """How many times as fast: the median over the rounds, in each of which both were timed."""
    return statistics.median(s / f for s, f in zip(slow.samples, fast.samples, strict=False))


def lines(report: Report) -> list[list[Line]]:
    """A list for each case."""
    return [[_line(row, rows, report.rates) for row in rows] for rows in cases(report.rows).values()]


def _line(row: Row, rows: Sequence[Row], rates: Mapping[str, float]) -> Line:
    roof, peer = (
        min((r for r in rows if r.kind == kind), key=lambda r: r.median, default=None) for kind in ("roof", "peer")
    )
    of_roof = over_peer = None
    if roof is not None:
        of_roof = faster(roof, row) * row.bytes_per_parameter / roof.bytes_per_parameter
    elif "roof" in rates:
        of_roof = row.bandwidth / rates["roof"]
    if peer is not None and row.kind != "roof":
        over_peer = faster(peer, row)
    several = row.samples if len(row.samples) > 1 else row.samples * 2
    low, _, high = statistics.quantiles(several, n=4, method="inclusive")
    return Line(row, (high - low) / row.median, of_roof, over_peer)


_Cell = Callable[[Line], str]


def _number(x: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    return "" if x is None else format(scale * x, form)


_FIGURES: dict[str, _Cell] = {
    "median": lambda x: duration(x.row.median),
    "spread": lambda x: f"{100 * x.spread:.0f} %",
    "GB/s": lambda x: f"{x.row.bandwidth * 1e-9:,.{1 if x.row.bandwidth < 1e11 else 0}f}",
    "roof": lambda x: _number(x.of_roof, ".0f", 100) + (" %" if x.of_roof else ""),
    "launches": lambda x: _number(x.row.launches, "d", 1),
    "host us": lambda x: _number(x.host, ",.1f", 1e6),
    "x peer": lambda x: _number(x.over_peer),
}
_WHERE: dict[str, _Cell] = {
    "candidate": lambda x: x.row.candidate,
    "backend": lambda x: x.row.backend or "",
    "size": lambda x: extent(x.row),
    "dtype": lambda x: x.row.dtype,
    "rule": lambda x: x.row.rule,
    "mode": lambda x: x.row.mode,
}
_LEGEND = (
    "spread: between the quartiles, as a part of the median. roof: the part of the speed of a loop with the same reads "
    "and writes and next to no arithmetic. x peer: times as fast as the fastest peer."
)


def duration(seconds: float) -> str:
    """Four digits, and the unit in which they are easy to read."""
    unit, name = next(
        (u, n) for u, n in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")) if seconds >= u or u < 1e-8
    )
    x = seconds / unit
    return f"{x:.{max(0, 3 - max(0, math.floor(math.log10(x))))}f} {name}"


def extent(row: Row) -> str:
    """Elements of all tensors together, and how many these are where there is more than one."""
    return power(row.size) + (f" in {row.tensors:,}" if row.tensors > 1 else "")


def tables(report: Report) -> None:
    """A table for each case on stdout, then what was not timed, and what the columns are."""
    print(textwrap.fill(heading(report), console.WIDTH) + "\n")
    for case in lines(report):
        row = case[0].row
        counted = sorted({x.row.bytes_per_parameter for x in case})
        what = f"{row.rule}, {row.dtype}, {extent(row)}, {MODES.get(row.mode, row.mode)}"
        _table(f"{what}; {' or '.join(map(str, counted))} bytes a parameter", case)
    for line in footnotes(report):
        print(textwrap.fill(line, console.WIDTH, subsequent_indent="    "))
    if cases(report.rows):
        print(textwrap.fill(_LEGEND, console.WIDTH))


def _table(title: str, case: Sequence[Line]) -> None:
    """Columns in which nobody has a figure are left out."""
    columns = {name: [cell(x) for x in case] for name, cell in _FIGURES.items()}
    columns = {name: [cell or "-" for cell in cells] for name, cells in columns.items() if any(cells)}
    fitted = [[cell.rjust(max(map(len, (name, *cells)))) for cell in (name, *cells)] for name, cells in columns.items()]
    header, *body = zip(["candidate", *(x.row.candidate for x in case)], *fitted, strict=True)
    console.table(title, header, body)


def heading(report: Report) -> str:
    """Where and when, and what the memory gives."""
    rates = "".join(f", {name} {rate * 1e-9:,.1f} GB/s" for name, rate in report.rates.items())
    return f"{report.device} ({report.on}), {report.date}, revision {report.revision[:12]}{rates}"


def footnotes(report: Report) -> list[str]:
    """What was not timed and why, once for each reason, and how quiet the machine was."""
    absent: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if not row.samples:
            absent.setdefault((row.candidate, row.status), []).append(extent(row))
    some = {extent(row) for row in report.rows}
    notes = []
    for (candidate, status), sizes in absent.items():
        where = "" if set(sizes) == some else f" at {', '.join(dict.fromkeys(sizes))}"
        notes.append(f"{candidate}{where}: {status}")
    refused, disturbed = sum(r.refused for r in report.rows), sum(r.disturbed for r in report.rows)
    if refused or disturbed:
        total = sum(len(r.samples) for r in report.rows)
        notes.append(f"others used the machine: {refused} samples refused, {disturbed} of {total} kept all the same")
    if report.interrupted:
        notes.append("interrupted: this is as much as there was")
    return notes


def markdown(report: Report) -> str:
    """The heading, one table over all cases, and the footnotes."""
    columns = _WHERE | _FIGURES
    rows = [[cell(x) or "-" for cell in columns.values()] for case in lines(report) for x in case]
    ruler = ["---"] * len(_WHERE) + ["---:"] * len(_FIGURES)
    table = [f"| {' | '.join(cells)} |" for cells in (list(columns), ruler, *rows)]
    return "\n".join([heading(report), "", *table, "", *(f"* {note}" for note in footnotes(report)), _LEGEND, ""])


_CSV = (
    "rule dtype mode size tensors candidate kind backend bytes_per_parameter launches refused disturbed status".split()
)


def as_csv(report: Report) -> str:
    """One line a row; seconds, bytes a second and plain fractions; empty where there is no figure."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write([*_CSV, "rounds", "median_s", "spread", "bytes_per_s", "of_roof", "host_s", "over_best_peer"])
    timed = {x.row.key: x for case in lines(report) for x in case}
    for row in report.rows:
        x = timed.get(row.key)
        figures = [row.median, x.spread, row.bandwidth, x.of_roof, x.host, x.over_peer] if x else [None] * 6
        write([*(getattr(row, name) for name in _CSV), len(row.samples), *figures])
    return out.getvalue()
