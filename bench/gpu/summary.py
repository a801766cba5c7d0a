"""The targets, and the table that ends a run."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fused_adam.cli import console

from . import speed, speed_stored

FAILED = ("failed", "started")  # a case that was started and has no other outcome was killed with its parent
_PARTS = ("first step", "speed", "sanitizer", "profile")
_FROM_ROOF, _FROM_GRAPH = 2**26, 2**22  # elements from which on these targets hold


@dataclass(frozen=True)
class Target:
    """measured: the worst of those that it is about, None if there are none. missed: where it was not met."""

    name: str
    bound: float
    at_most: bool
    measured: float | None
    where: str
    missed: tuple[str, ...]
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.measured is not None and not self.missed


def _target(name: str, bound: float, found: Mapping[str, float], at_most: bool = False, unit: str = "") -> Target:
    if not found:
        return Target(name, bound, at_most, None, "", (), unit)
    worst = (max if at_most else min)(found, key=lambda where: found[where])
    missed = [where for where, x in found.items() if (x > bound if at_most else x < bound)]
    return Target(name, bound, at_most, found[worst], worst, tuple(missed), unit)


def targets(record: Mapping[str, Any]) -> list[Target]:
    cases = record["speed"]["cases"]

    def ratios(name: str, least: int = 0, tensors: Sequence[int] = (1,)) -> dict[str, float]:
        some = {k: c for k, c in cases.items() if c.get("elements", 0) >= least and c.get("tensors") in tensors}
        return {k: c["ratios"][name] for k, c in some.items() if name in c["ratios"]}

    many = tuple(count for count, _ in speed.MANY)
    host = cases.get("host time", {}).get("host", {})
    values = cases.get("values", {}).get("ratios", {})
    stored = cases.get("stored", {}).get("ratios", {})
    first = record["first step"]["seconds"]
    end = "over torch fused, end to end"

    def started(cache: str) -> dict[str, float]:
        runs = [seconds["first step"] for seconds in first.get(f"cupy, {cache} cache", [])]
        return {"cupy": statistics.median(runs)} if runs else {}

    def called(name: str) -> dict[str, float]:
        return {"cupy": 1e6 * host[name]["median_s"]} if name in host else {}

    def one(name: str) -> dict[str, float]:
        return {"stored": stored[name]} if name in stored else {}

    other = [f"{kind}{v}" for kind in speed_stored.KINDS for v in speed_stored.VALUES if v]

    return [
        _target("of the roof, 2^26 up", 0.97, ratios("cupy of the roof", _FROM_ROOF)),
        _target("of the copy rate, 2^26 up", 0.92, ratios("cupy of the copy rate", _FROM_ROOF)),
        _target("torch fused, end to end", 1.0, ratios(f"cupy {end}")),
        _target("torch fused, many, flat", 1.05, ratios(f"cupy {end}", tensors=many)),
        _target("torch fused, many, list", 1.05, ratios(f"cupy list {end}", tensors=many)),
        _target("torch fused, graph, 2^22 up", 1.0, ratios("cupy over torch fused, graph", _FROM_GRAPH, (1, *many))),
        _target("zeros, subnormals to random", 1.05, values, at_most=True),
        _target("12 bytes over torch fused", 2.0, one("12 bytes over torch fused")),
        _target("bf16 of the copy rate", 0.92, one("bf16 of the copy rate")),
        _target("stored zeros, subnormals", 1.3, {k: stored[k] for k in other if k in stored}, at_most=True),
        _target("first step, empty cache", 1.5, started("empty"), at_most=True, unit=" s"),
        _target("first step, full cache", 0.15, started("full"), at_most=True, unit=" s"),
        _target("step(), flat buffer", 15.0, called("flat buffer of 20"), at_most=True, unit=" us"),
        _target("step(), 1,000 arrays", 40.0, called("list of 1,000"), at_most=True, unit=" us"),
    ]


def as_json(found: Sequence[Target]) -> list[dict[str, Any]]:
    return [{**asdict(t), "passed": t.passed} for t in found]


def said(record: Mapping[str, Any], *statuses: str) -> list[str]:
    """Every case that came out so, and why; one line for each reason."""
    parts = {f"bits {k}": v for k, v in record["bits"].items()} | {part: record[part] for part in _PARTS}
    cases = [
        (part, case, why or "it never ended")
        for part, tally in parts.items()
        for status in statuses
        for case, why in tally.get(status, {}).items()
    ]
    return [f"{part}: {case}: {why}" for (part, why), case in {(p, w): c for p, c, w in reversed(cases)}.items()]


def absent(record: Mapping[str, Any]) -> list[str]:
    """Every candidate that could not take part in a race, and why."""
    cases = record["speed"]["cases"]
    missing = {(who, why): case for case, c in cases.items() for who, why in c.get("absent", {}).items()}
    return [f"{case}: {who}: {why}" for (who, why), case in missing.items()]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """All columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def fit(row: Sequence[str]) -> list[str]:
        return [row[0], *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]

    console.table(title, fit(header), [fit(row) for row in rows])


def show(record: Mapping[str, Any], found: Sequence[Target]) -> None:
    """On stdout, 80 columns: bits, times, targets, and whatever went wrong."""
    counts = ("ok", "different", "failed", "skipped", "dropped")
    rows = [(f"bits {k}", tally) for k, tally in record["bits"].items()] + [(part, record[part]) for part in _PARTS]
    _table(
        f"cases ({record['device']['name']})",
        ["", *counts],
        [[part, *(str(n if isinstance(n := t.get(c, 0), int) else len(n)) for c in counts)] for part, t in rows],
    )
    _times(record["speed"]["cases"])
    _table("targets", ["ours (CuPy)", "target", "worst", "at", ""], [_shown(t) for t in found])
    kinds = {"BITS DIFFER": said(record, "different"), "FAILED": said(record, *FAILED)}
    kinds |= {"skipped": said(record, "skipped"), "dropped": said(record, "dropped"), "not timed": absent(record)}
    for title, lines in kinds.items():
        for line in lines[:12]:
            print(textwrap.fill(textwrap.shorten(f"{title}: {line}", 400), 80, subsequent_indent="    "))


def _shown(t: Target) -> list[str]:
    bound = f"{'<=' if t.at_most else '>='} {t.bound:g}{t.unit}"
    if t.measured is None:
        return [t.name, bound, "-", "-", "not measured"]
    return [t.name, bound, f"{t.measured:.3g}", t.where, "pass" if t.passed else f"MISS ({len(t.missed)})"]


def _times(cases: Mapping[str, Any]) -> None:
    timed = {k: c for k, c in cases.items() if "elements" in c and "tensors" in c}
    if not timed:
        return
    ways = (("roof", "cupy of the roof"), ("copy", "cupy of the copy rate"))
    over = [(way, f"cupy over torch fused, {way}") for way in ("end to end", "graph")]

    def row(name: str, c: Mapping[str, Any]) -> list[str]:
        times = [c["device"].get(who) for who in (speed.CUPY, speed.NUMBA, speed.FUSED)]
        shown = [f"{1e6 * t['median_s']:,.1f}" if t else "-" for t in times]
        part = [f"{100 * c['ratios'][key]:.0f} %" if key in c["ratios"] else "-" for _, key in ways]
        factors = [f"{c['ratios'][key]:.2f}" if key in c["ratios"] else "-" for _, key in over]
        return [name, *shown, *part, *factors]

    by_size = sorted(timed.items(), key=lambda item: (item[1]["tensors"], item[1]["groups"], item[1]["elements"]))
    header = ["", "cupy", "numba", "fused", "roof", "copy", "end", "graph"]
    _table(
        "AdamW, float32: us on the device; of the roof, the copy rate, torch fused",
        header,
        [row(name, c) for name, c in by_size],
    )
