"""One process's cases, in order, until its time is up.

Each is announced before it runs and its outcome is written at once, so that whoever started this process knows what a
crash was about, and where to go on.
"""

from __future__ import annotations

import argparse
import faulthandler
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .journal import Journal


class Different(Exception):
    """The bits are not NumPy's."""


class Skipped(Exception):
    """There is nothing to be found out here; why."""


@dataclass(frozen=True)
class Case:
    """run: returns what there is to report, or raises. limit: seconds after which it hangs, and the process ends."""

    name: str
    run: Callable[[], Mapping[str, Any] | None]
    limit: float = 60.0


# Of each part of the work: the module of its cases, and the arguments of that module's `cases`.
PARTS = {
    "bits-cupy": ("bits", "cupy"),
    "bits-numba-cuda": ("bits", "numba-cuda"),
    "first-step": ("first_step",),
    "speed": ("speed",),
    "sanitizer": ("sanitizer",),
    "profile": ("profile",),
}


def cases(part: str) -> list[Case]:
    module, *arguments = PARTS[part]
    found: list[Case] = import_module(f".{module}", __package__).cases(*arguments)
    return found


def work(part: str, shard: str, make: Callable[[str], list[Case]], journal: Journal, first: int, until: float) -> int:
    """Run the cases of a shard such as "0/3" from number `first` on. The exit status: 1 to be started again."""
    k, n = map(int, shard.split("/"))
    try:
        mine = make(part)[k::n]
    except Skipped as reason:
        journal.write(part=part, shard=shard, case="all", status="skipped", reason=str(reason))
        return 0
    except Exception as error:
        traceback.print_exc()
        journal.write(part=part, shard=shard, case="start", status="failed", reason=_shown(error))
        return 0
    journal.write(part=part, shard=shard, plan=[case.name for case in mine])
    for number, case in enumerate(mine):
        if number < first:
            continue
        about = {"part": part, "shard": shard, "case": case.name, "number": number}
        if time.monotonic() >= until:
            journal.write(**about, status="dropped", reason="the stage's time was up")
            continue
        journal.write(**about, status="started")
        start = time.monotonic()
        faulthandler.dump_traceback_later(case.limit, exit=True, file=2)  # also out of a C call
        outcome = _outcome(case)
        faulthandler.cancel_dump_traceback_later()
        journal.write(**about, **outcome, seconds=round(time.monotonic() - start, 3))
        if outcome["status"] == "failed":
            return 1  # after an error of CUDA's own nothing works any more in this process
    return 0


def _outcome(case: Case) -> dict[str, Any]:
    try:
        return {"status": "ok", **(case.run() or {})}
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Different as difference:
        return {"status": "different", "reason": str(difference)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": _shown(error)}


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def main(argv: Sequence[str], make: Callable[[str], list[Case]] = cases) -> int:
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument("part")
    parser.add_argument("shard")
    parser.add_argument("journal", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("until", type=float)
    args = parser.parse_args(argv)
    return work(args.part, args.shard, make, Journal(args.journal), args.first, args.until)
