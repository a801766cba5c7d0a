"""Tables and JSON on stdout, progress on stderr: with rich on a terminal where it is installed, plain elsewhere.

Piped output is never coloured, truncated or wider than 80 columns; rich itself heeds NO_COLOR.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

WIDTH = 80
_COLOURS = {"yes": "green", "no": "yellow", "identical": "green", "DIFFERENT": "bold red"}


def _use_rich(stream: TextIO) -> bool:
    return stream.isatty() and importlib.util.find_spec("rich") is not None


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a title; the last column wraps."""
    if _use_rich(sys.stdout):
        _rich_table(title, header, rows)
        return
    widths = [max(map(len, column)) for column in zip(*rows, header, strict=True)][:-1]
    indent = " " * sum(w + 2 for w in widths)
    print(title)
    for row in [header, *rows] if any(header) else rows:
        start = "".join(f"{cell:<{w}}  " for cell, w in zip(row, widths, strict=False))
        line = textwrap.fill(row[-1], WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
        print((line or start).rstrip())
    print()


def _rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, show_header=any(header), padding=(0, 2, 0, 0))
    for k, name in enumerate(header):
        grid.add_column(name, no_wrap=k < len(header) - 1, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, style=_COLOURS.get(cell.partition(":")[0], "")) for cell in row))
    console = Console(highlight=False)
    console.print(Text(title, style="bold"))  # a title of the table itself would wrap to the table's width
    console.print(grid)
    console.print()


def emit_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout. NaN and infinity are not JSON: they become null."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: clean(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [clean(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    print(json.dumps(clean(document), indent=2, allow_nan=False))


@contextmanager
def progress(total: int, shown: bool = True) -> Iterator[Callable[[int, Any], None]]:
    """Yields update(step, loss), which shows the loss and the steps per second ten times a second on a terminal.

    Only then is the loss read: on a GPU that waits for it.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    show, close = (_rich_bar if _use_rich(sys.stderr) else _plain_bar)(total)
    start = last = time.perf_counter()

    def update(step: int, loss: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 0.1 or step == total:
            last = now
            show(step, f"loss {float(loss):.6f}, {step / (now - start):,.0f} steps/s")

    try:
        yield update
    finally:
        close()


@contextmanager
def transfer(name: str) -> Iterator[Callable[[int, int], None]]:
    """Yields update(done, total), in bytes, which shows them ten times a second on a terminal."""
    start = shown = time.perf_counter()
    bar: tuple[Callable[[int, str], None], Callable[[], None]] | None = None

    def update(done: int, total: int) -> None:
        nonlocal bar, shown
        now = time.perf_counter()
        if not sys.stderr.isatty() or (now - shown <= 0.1 and done < total):
            return
        shown = now
        bar = bar or (_rich_bar if _use_rich(sys.stderr) else _plain_bar)(total, "bytes")
        bar[0](done, f"{size(round(done / max(now - start, 1e-9)))}/s, {name}")

    try:
        yield update
    finally:
        if bar:
            bar[1]()


def size(n: int) -> str:
    """Bytes as people read them: 999 B, 1.0 kB, 12.3 GB."""
    power = min((len(str(n)) - 1) // 3, 5)
    return f"{n / 1000**power:.1f} {'kMGTP'[power - 1]}B" if power else f"{n} B"


def _plain_bar(total: int, unit: str = "steps") -> tuple[Callable[[int, str], None], Callable[[], None]]:
    def show(step: int, text: str) -> None:
        print(f"\r{step:,}/{total:,} {unit}, {text}".ljust(WIDTH - 1), end="", file=sys.stderr, flush=True)

    return show, lambda: print(file=sys.stderr)


def _rich_bar(total: int, unit: str = "steps") -> tuple[Callable[[int, str], None], Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    text = TextColumn("{task.description}", markup=False)
    bar = Progress(BarColumn(24), count, text, console=Console(stderr=True))
    task = bar.add_task("starting", total=total)
    bar.start()
    return lambda step, text: bar.update(task, completed=step, description=text), bar.stop
