"""`make figures`: write the README's figures from bench/results."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import power
from .results import KIND, Report, load
from .show import cases, faster

BEGIN = "<!-- figures: begin; written by `make figures` from bench/results -->\n"
END = "<!-- figures: end -->"


def main() -> int:
    """In a checkout's root."""
    path = Path("README.md")
    path.write_text(replaced(path.read_text(), section(Path("bench", "results"))))
    return 0


def replaced(text: str, figures: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md should hold {BEGIN.strip()} and {END}")
    return before + begin + figures + end + after


def section(folder: Path) -> str:
    """A paragraph and a table for each file, in the order of their names."""
    return "\n".join(_figures(path) for path in sorted(folder.glob("*.json")))


def _figures(path: Path) -> str:
    document = json.loads(path.read_text())
    link = f"Raw figures: [bench/results/{path.name}](bench/results/{path.name})."
    if document.get("kind") == KIND:
        return _sweep(load(path), link)
    if "ratios" in document:
        return _ratios(document, link)
    if "speed" in document:
        return _gpu(document, link)
    raise SystemExit(f"{path}: none of `fused-adam bench run`, `make ratios` and `make gpu` writes such a file")


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(header)
    return "".join(f"|{'|'.join(r)}|\n" if r is ruler else f"| {' | '.join(r)} |\n" for r in (header, ruler, *rows))


def _ratios(document: Mapping[str, Any], link: str) -> str:
    machine = document["machine"]
    names = {"numpy": "NumPy", "numba": "Numba", "torch": "PyTorch"}
    versions = ", ".join(f"{name} {machine['versions'][key].split('+')[0]}" for key, name in names.items())
    rows = [
        [r["target"]["ours"], r["target"]["peer"], r["where"], f"{r['target']['least']:.2f}", f"{r['measured']:.2f}"]
        for r in document["ratios"]
    ]
    about = f"""
        How many times as fast, AdamW in float32, on {machine["processor"]}, {machine["threads"]} threads
        ({versions}; {document["date"]}). The memory roof is a loop with the step's four reads and three writes and next
        to no arithmetic; above 1 against it is the noise of a shared machine. "2 busy" has two other processes at work
        on both cores. {link}"""
    return _paragraph(about) + _table(["ours", "against", "at", "target", "measured"], rows)


def _sweep(report: Report, link: str) -> str:
    """The speed of every candidate by size, and our part of the roof's."""
    timed = cases(report.rows)
    about = f"GB/s on {report.device} ({report.date[:10]}), and in brackets the part of the roof's speed. {link}"
    tables = []
    for kind in dict.fromkeys((rule, dtype, mode, tensors) for rule, dtype, mode, _, tensors in timed):
        some = {c[3]: {r.candidate: r for r in rows} for c, rows in timed.items() if (*c[:3], c[4]) == kind}
        names = list(dict.fromkeys(name for rows in some.values() for name in rows))

        def cell(rows: Mapping[str, Any], name: str) -> str:
            if name not in rows:
                return ""
            roof = next((r for r in rows.values() if r.kind == "roof"), None)
            part = f" ({100 * faster(roof, rows[name]):.0f} %)" if roof and rows[name].kind == "ours" else ""
            return f"{rows[name].bandwidth * 1e-9:,.1f}{part}"

        rule, dtype, mode, tensors = kind
        title = f"{rule}, {dtype}, {mode}" + (f", {tensors:,} tensors" if tensors > 1 else "")
        body = [[name, *(cell(rows, name) for rows in some.values())] for name in names]
        tables.append(_table([title, *map(power, some)], body))
    return _paragraph(about) + "\n".join(tables)


def _gpu(document: Mapping[str, Any], link: str) -> str:
    """The device's time for a step, the part of its bounds, and how many times as fast as PyTorch's fused AdamW."""
    timed = [(name, c) for name, c in document["speed"]["cases"].items() if "elements" in c and "device" in c]
    ratios = ("of the roof", "of the copy rate", "over torch fused, end to end", "over torch fused, graph")

    def row(name: str, case: Mapping[str, Any]) -> list[str]:
        times = [case["device"].get(who) for who in ("cupy", "numba-cuda", "torch fused")]
        found = [case["ratios"].get(f"cupy {ratio}") for ratio in ratios]
        return [
            name,
            *(f"{1e6 * t['median_s']:,.1f}" if t else "" for t in times),
            *("" if x is None else f"{x:.2f}" for x in found),
        ]

    by_size = sorted(timed, key=lambda item: (item[1].get("tensors", 1), item[1]["elements"]))
    header = ["us on the device", "cupy", "numba-cuda", "torch fused", "roof", "copy", "x fused", "x fused, graph"]
    about = f"""
        AdamW in float32 on {document["device"]["name"]} ({document["date"][:10]}): the device's time, CuPy's part of
        the roof's speed and of a plain copy's, and how many times as fast as PyTorch's fused step, end to end and in
        a graph. {link}"""
    return _paragraph(about) + _table(header, [row(*item) for item in by_size])


if __name__ == "__main__":
    sys.exit(main())
