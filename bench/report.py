"""What is printed and recorded beside the times themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fused_adam.cli import console

from .timing import Timing


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text; all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def fit(row: Sequence[str]) -> list[str]:
        return [row[0], *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]

    console.table(title, fit(header), [fit(row) for row in rows])


def power(n: int) -> str:
    """A size as people say it: 2^20 where it is a power of two, 1,000 where not."""
    return f"2^{n.bit_length() - 1}" if n and n & (n - 1) == 0 else f"{n:,}"


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields show(text): one line on stderr that rewrites itself, and nothing where nobody watches."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text:<{console.WIDTH - 1}}\r", end="", file=sys.stderr, flush=True)

    try:
        yield lambda what: show(f"measuring {what}")
    finally:
        show("")


def disturbed(timings: Iterable[Timing]) -> str:
    """A line that says how many samples were taken on a busy machine, or nothing."""
    timings = list(timings)
    count, total = sum(t.disturbed for t in timings), sum(len(t.samples) for t in timings)
    return f"{count} of {total} samples were taken while other processes used the cores\n" if count else ""


def figures(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The timings as plain numbers, for JSON."""
    return {
        name: {
            "median_s": t.median,
            "quartiles_s": t.quartiles,
            "samples": len(t.samples),
            "refused": t.refused,
            "disturbed": t.disturbed,
        }
        for name, t in timings.items()
    }
