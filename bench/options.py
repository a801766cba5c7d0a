"""What `fused-adam bench run` can be asked for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from fused_adam.backends import NAMES

from .peers import PEERS
from .problem import HYPER

MODES = ("e2e", "cold", "graph")
DTYPES = ("float32", "float64")


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Parses a list of some of them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; choose from {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def counts(text: str) -> list[int]:
    """Parses a list of whole numbers, each as it is or as a power: 1048576 or 2^20."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,18})(?:\^(\d{1,3}))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{part!r} is no number of elements; write 1048576 or 2^20")
        found.append(int(match[1]) ** int(match[2] or 1))
    return list(dict.fromkeys(found))


def _percent(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*%?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; write 5 or 5%")
    return float(match[1]) / 100


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    peers, rules = tuple(PEERS), tuple(HYPER)
    what = parser.add_argument_group("what is timed; lists are separated by commas")
    what.add_argument("--sizes", type=counts, metavar="N,..", help="elements of all tensors: 2^16,2^20,2^24 by default")
    what.add_argument("--tensors", type=counts, metavar="N,..", default=[1], help="of so many tensors, 1 by default")
    what.add_argument("--dtype", type=_names(DTYPES), metavar="D,..", default=["float32"], help=", ".join(DTYPES))
    what.add_argument("--rule", type=_names(rules), metavar="R,..", default=["adamw"], help=", ".join(rules))
    what.add_argument("--backend", type=_names(NAMES), metavar="B,..", help="by default all of a GPU, else of the CPU")
    what.add_argument("--peers", type=_names(peers), metavar="P,..", default=list(peers), help=", ".join(peers))
    what.add_argument(
        "--mode",
        type=_names(MODES),
        metavar="M,..",
        default=["e2e"],
        help="e2e: as called; cold: nothing in the cache; graph: replayed, on a GPU",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--quick", action="store_true", help="up to 2^22 and few samples, in under 15 s")
    how.add_argument(
        "--check", action="store_true", help="hold each against a float64 oracle; a wrong one is not timed"
    )
    how.add_argument("--max-noise", type=_percent, metavar="X%", help="exit 1 when a spread is larger")
    how.add_argument("--timeout", type=_seconds, metavar="S", help="seconds after which the measuring ends")
    how.add_argument("--list", action="store_true", help="say who could take part, and measure nothing")
    into = parser.add_argument_group("files")
    into.add_argument(
        "--json", metavar="FILE", help="everything, with each sample; - for stdout and nothing else there"
    )
    into.add_argument("--csv", metavar="FILE", help="one line a candidate and case")
    into.add_argument("--md", metavar="FILE", help="the tables as Markdown")
    into.add_argument("--plot", type=Path, metavar="FILE.png", help="bandwidth and time against the size")
