"""Say whether steps became slower from one benchmark's file to another's.

The whole machine may have been slower in one of the runs. A candidate's times are therefore taken in units of the
roof's of its case and of a peer's: their rounds are interleaved, so what slows both cancels. No yardstick suffers from
a busy machine exactly as the candidate does, so a change counts only if both show it, and the seconds at least half.

From one run to the next a case changes by more than its own samples tell: where the machine put its memory, what a
neighbour does to the cache. Many cases together hardly do (`bench.rates` measures it), so what they say decides at the
threshold that was asked for, and a case by itself at twice that.
"""

from __future__ import annotations

import argparse
import re
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_adam.cli import console
from fused_adam.cli.exit_codes import CommandError, Exit

from . import stats
from .results import Report, Row
from .show import duration, extent, read

SLOWER, FASTER, SAME, UNCLEAR = "SLOWER", "faster", "no change", "unclear"
# Where more than this part of the samples, the refused ones included, found the machine busy, the rest was slowed too.
BUSY = 1 / 2
# A yardstick that itself changed by more was measured on a machine in another state: what has more threads, or
# needs more of the memory, suffers more from that.
SHIFTED = 1.25
# Confidence of the intervals that must not touch.
APART = 0.95
CASES = 4  # of ours, from which on they are also judged together
FEWEST = 5  # of fewer samples the smallest and the largest are too often on the same side of the median


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="the file to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="the file that may be slower")
    parser.add_argument(
        "--fail-on",
        type=threshold,
        default=0.05,
        metavar="median:N%",
        help="a regression is what took longer by more than this: all of ours together, or, beyond what the confidence "
        "intervals allow, one case alone by twice as much (default: median:5%%)",
    )
    parser.add_argument("--ignore-devices", action="store_true", help="compare runs of different devices all the same")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def threshold(text: str) -> float:
    """`median:5%` as 0.05."""
    found = re.fullmatch(r"median:(\d+(?:\.\d+)?)%", text)
    if not found or not 0 < float(found[1]) < 1000:
        raise argparse.ArgumentTypeError(f"should be like median:5%, got {text!r}")
    return float(found[1]) / 100


@dataclass(frozen=True)
class Change:
    """ratio: NEW's time over BASE's in units of that of `beside`, with its interval. why: of what is unclear."""

    new: Row
    base: Row
    beside: str | None
    ratio: float
    low: float
    high: float
    verdict: str
    why: str = ""


def run(args: argparse.Namespace) -> int:
    base, new = read(args.base), read(args.new)
    there, here = place(base), place(new)
    if there != here and not args.ignore_devices:
        raise CommandError(
            f"{args.base} is of {there}, {args.new} of {here}; --ignore-devices compares them all the same",
            Exit.NOT_COMPARABLE,
        )
    changes = compare(base, new, args.fail_on)
    if not changes:
        raise CommandError(f"no candidate was timed in both {args.base} and {args.new}", Exit.NOT_COMPARABLE)
    whole = together(base, new, args.fail_on)
    alone = {"BASE": unmatched(base, new), "NEW": unmatched(new, base)}
    (_emit if args.json else _print)(changes, whole, alone, args.fail_on)
    judged = [c.verdict for c in changes if c.new.kind == "ours"]
    if SLOWER in judged or (whole and whole.verdict == SLOWER):
        return Exit.FAILED
    return Exit.NOT_COMPARABLE if judged and set(judged) == {UNCLEAR} else Exit.OK


def place(report: Report) -> str:
    threads = report.environment.get("threads")
    return f"{report.device} ({report.on}{f', {threads} threads' if threads else ''})"


@dataclass(frozen=True)
class Whole:
    """All of our cases together. ratio: the median of NEW's times over BASE's."""

    cases: int
    ratio: float
    verdict: str


def compare(base: Report, new: Report, most: float = 0.05) -> list[Change]:
    """A change for each key with samples in both, in NEW's order."""
    pairs = _pairs(base, new)
    alone = most if together(base, new, most) is None else 2 * most
    return [_change(b, n, [] if n.kind == "roof" else _beside(n, pairs), alone) for b, n in pairs]


def together(base: Report, new: Report, most: float = 0.05) -> Whole | None:
    """None where there are too few cases, or there is nothing to compare them with.

    A case's ratio is the median over its yardsticks. The roof, which no library's threads disturb, must show half.
    """
    pairs = _pairs(base, new)
    ratios, roofs = [], []
    for b, n in pairs:
        others = _beside(n, pairs)
        if n.kind == "ours" and others and min(len(b.samples), len(n.samples)) >= FEWEST:
            ratios.append(statistics.median(_median_ratio(b, n, pair) for pair in others))
            roofs += [_median_ratio(b, n, pair) for pair in others if pair[1].kind == "roof"]
    if len(ratios) < CASES:
        return None
    ratio = statistics.median(ratios)
    roof = statistics.median(roofs or ratios)
    verdict = SAME
    if ratio > 1 + most and roof > 1 + most / 2:
        verdict = SLOWER
    elif ratio < 1 / (1 + most) and roof < 1 / (1 + most / 2):
        verdict = FASTER
    return Whole(len(ratios), ratio, verdict)


def _pairs(base: Report, new: Report) -> list[_Pair]:
    """The rows with samples in both, in NEW's order."""
    before = {row.key: row for row in base.rows if row.samples}
    return [(before[row.key], row) for row in new.rows if row.samples and row.key in before]


def unmatched(some: Report, other: Report) -> list[Row]:
    """The rows with samples in some that have none in the other."""
    there = {row.key for row in other.rows if row.samples}
    return [row for row in some.rows if row.samples and row.key not in there]


_Pair = tuple[Row, Row]
_Yardstick = tuple[Row | None, Row | None]


def _beside(new: Row, pairs: Sequence[_Pair]) -> list[_Pair]:
    """What does not depend on our code, in the same case."""
    return [(b, n) for b, n in pairs if n.case == new.case and n.kind in ("roof", "peer") and n.key != new.key]


def _yardsticks(base: Row, new: Row, others: Sequence[_Pair]) -> list[_Pair]:
    """The roof, and the peer that goes up and down with the candidate most closely."""
    found = []
    for kind in ("roof", "peer"):
        if same := [pair for pair in others if pair[1].kind == kind]:
            found.append(min(same, key=lambda pair: _scatter(base, pair[0]) + _scatter(new, pair[1])))
    return found


def _relative(row: Row, yardstick: Row | None) -> list[float]:
    """Times in units of the yardstick's of the same round."""
    if yardstick is None:
        return row.samples
    return [a / b for a, b in zip(row.samples, yardstick.samples, strict=False)]


def _scatter(row: Row, yardstick: Row) -> float:
    low, high = np.quantile(np.log(_relative(row, yardstick)), [0.25, 0.75])
    return float(high - low)


def _change(base: Row, new: Row, others: Sequence[_Pair], most: float) -> Change:
    yardsticks = _yardsticks(base, new, others)
    steady = [pair for pair in yardsticks if not _doubt(*pair, shifted=True)]
    used: list[_Yardstick] = [*steady] or [*yardsticks[:1]] or [(None, None)]
    beside_base, beside_new = used[0]
    before, after = _relative(base, beside_base), _relative(new, beside_new)
    ratio, low, high = stats.ratio(after, before)
    why = _doubt(base, new)
    if yardsticks and not steady:
        why = why or _doubt(*yardsticks[0], shifted=True)

    (least_before, most_before), (least_after, most_after) = (stats.interval(x, APART) for x in (before, after))
    beside = [_median_ratio(base, new, pair) for pair in used]
    seconds = new.median / base.median
    verdict = SAME
    if why:
        verdict = UNCLEAR
    elif least_after > most_before and min(beside) > 1 + most and seconds > 1 + most / 2:
        verdict = SLOWER
    elif most_after < least_before and max(beside) < 1 / (1 + most) and seconds < 1 / (1 + most / 2):
        verdict = FASTER
    if verdict in (SLOWER, FASTER) and (why := _shared(others, seconds)):
        verdict = UNCLEAR
    return Change(new, base, beside_new.candidate if beside_new else None, ratio, low, high, verdict, why)


def _shared(others: Sequence[_Pair], seconds: float) -> str:
    """Who else, though not changed, took much longer, or much less, as the candidate did; or nothing."""
    for base, new in others:
        shift = new.median / base.median
        if not _doubt(base, new) and (shift > SHIFTED if seconds > 1 else shift < 1 / SHIFTED):
            return f"{new.candidate}, which did not change, took {shift:.2f} times as long"
    return ""


def _median_ratio(base: Row, new: Row, yardstick: _Yardstick) -> float:
    return statistics.median(_relative(new, yardstick[1])) / statistics.median(_relative(base, yardstick[0]))


def _doubt(base: Row, new: Row, shifted: bool = False) -> str:
    """Why two rows say nothing about the code, or nothing; shifted: and the machine, of which they are a yardstick."""
    if (rounds := min(len(base.samples), len(new.samples))) < FEWEST:
        return f"{rounds} rounds are too few"
    if any(row.refused + row.disturbed > BUSY * (row.refused + len(row.samples)) for row in (base, new)):
        return f"the machine was busy while {new.candidate} ran"
    shift = new.median / base.median
    if shifted and not 1 / SHIFTED < shift < SHIFTED:
        return f"{new.candidate}, which did not change, took {shift:.2f} times as long"
    return ""


def _print(changes: Sequence[Change], whole: Whole | None, alone: dict[str, list[Row]], most: float) -> None:
    seen: dict[str, list[Change]] = {}
    for c in changes:
        seen.setdefault(f"{c.new.rule}, {c.new.dtype}, {extent(c.new)}, {c.new.mode}", []).append(c)
    for title, some in seen.items():
        console.table(title, ["candidate", "BASE", "NEW", "ratio", "interval", "verdict"], [*map(_cells, some)])
    if whole:
        print(f"all {whole.cases} cases of ours together: {whole.ratio:.3f} times as long: {whole.verdict}")
    for line in _notes(changes, alone, most if whole is None else 2 * most):
        print(textwrap.fill(line, console.WIDTH, subsequent_indent="    "))


def _cells(c: Change) -> list[str]:
    times = [f"{duration(row.median):>8}" for row in (c.base, c.new)]
    verdict = c.verdict if c.new.kind == "ours" else c.new.kind
    return [c.new.candidate, *times, f"{c.ratio:.3f}", f"{c.low:.3f}-{c.high:.3f}", verdict]


def _notes(changes: Sequence[Change], alone: dict[str, list[Row]], most: float) -> Iterator[str]:
    ours = [c for c in changes if c.new.kind == "ours"]
    for c in ours:
        if c.verdict == UNCLEAR:
            yield f"{c.new.candidate}, {extent(c.new)}: unclear: {c.why}; measure again"
    for name, rows in alone.items():
        if rows:
            yield f"only in {name}: " + ", ".join(
                f"{row.candidate} {extent(row)} {row.dtype} {row.mode}" for row in rows
            )
    # Two intervals that touch are together as wide as the smallest change that would have been seen.
    if blind := [c for c in ours if c.verdict == SAME and c.high / c.low > (1 + 2 * most) ** 2]:
        where = ", ".join(f"{c.new.candidate} {extent(c.new)}" for c in blind)
        yield f"too noisy to see {2 * most:.0%}, more rounds would help: {where}"
    if yardsticks := list(dict.fromkeys(c.beside for c in changes if c.beside)):
        yield f"ratio: NEW's time over BASE's, in units of that of {' or '.join(yardsticks)} in the same round"
    count = sum(c.verdict == SLOWER for c in ours)
    yield f"slower by more than {most:.2%}: {count} of {len(ours)}".replace(".00%", "%").replace("%", " %")


def _emit(changes: Sequence[Change], whole: Whole | None, alone: dict[str, list[Row]], most: float) -> None:
    def named(row: Row) -> dict[str, Any]:
        names = ("candidate", "kind", "rule", "dtype", "mode", "size", "tensors")
        return {name: getattr(row, name) for name in names}

    console.emit_json(
        {
            "fail_on": most,
            "together": whole and asdict(whole),
            "changes": [
                named(c.new)
                | {"base_s": c.base.median, "new_s": c.new.median}
                | {k: v for k, v in asdict(c).items() if k not in ("new", "base")}
                for c in changes
            ],
            "only_in_base": [named(row) for row in alone["BASE"]],
            "only_in_new": [named(row) for row in alone["NEW"]],
        }
    )
