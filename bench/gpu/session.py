"""Bits, speed and tools on the GPU of this machine, unattended, in under eight minutes.

Files go to $OUT, or bench/results: the record <device>.json, each single outcome in gpu.jsonl, and gpu.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fused_adam
from fused_adam.cli.exit_codes import Exit

from . import record, stages, summary
from .journal import Journal
from .stages import Stage

JOURNAL, LOG = "gpu.jsonl", "gpu.log"
LIMIT_BYTES = 15 * 2**20  # of a file; a machine that is lent gives back 8 files of at most 16 MiB
_GPU_BACKENDS = ("cupy", "numba-cuda")


def no_gpu() -> str:
    """Why neither backend can run here; "" if one can."""
    why = {name: reason for name, _, reason in fused_adam.backends() if name in _GPU_BACKENDS}
    return "\n".join(f"  {name}: {reason}" for name, reason in why.items()) if all(why.values()) else ""


def install() -> tuple[str, str]:
    """The package that the workers are modules of, and how it got to where they find it."""
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    commands = (
        [*pip, "--no-build-isolation", "--no-deps", "-e", "."],
        [sys.executable, "-c", "import fused_adam.bench.gpu as gpu; print(gpu.__file__)"],
    )
    why, found = "", ""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
            break
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            why = next((line for line in lines if "Error: " in line), lines[-1]).strip()
            break
        found = done.stdout.strip()
    if not why and Path(found).samefile(Path(__file__).with_name("__init__.py")):
        return "fused_adam.bench.gpu", "editable, without dependencies"
    return "bench.gpu", f"run from the checkout, not installed: {why or f'it is imported from {found}'}"


def plan(facts: Mapping[str, str]) -> list[Stage]:
    """What there is to do, in this order, and for how many seconds. facts: of the device."""
    exclusive = "Exclusive" in facts.get("compute_mode", "")  # the GPU takes one process at a time
    jobs = 1 if exclusive else min(6, max(2, (os.cpu_count() or 2) // 2))
    each = max(1, jobs // 2)
    bits = [Stage("bits", 140, (("bits-cupy", each), ("bits-numba-cuda", each)))]
    if exclusive:
        bits = [Stage(f"bits {name}", 70, ((f"bits-{name}", 1),)) for name in _GPU_BACKENDS]
    return [
        *bits,
        Stage("first step", 40, (("first-step", 1),)),
        Stage("speed", 190, (("speed", 1),)),
        Stage("sanitizer", 45, (("sanitizer", min(3, jobs)),)),
        Stage("profile", 30, (("profile", 1),)),
    ]


def run(folder: Path, about: Mapping[str, Any], work: Sequence[Stage], command: Sequence[str]) -> int:
    """All stages; the record is written anew after each. The exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    journal, log = Journal(folder / JOURNAL), folder / LOG
    for file in (journal.path, log):
        file.unlink(missing_ok=True)
    journal.write(about=about)
    until = time.monotonic()
    for stage in work:
        until += stage.seconds  # what one stage leaves, the next may have
        print(f"{stage.name}: at most {until - time.monotonic():.0f} s", flush=True)
        stages.run(stage, command, journal, log, until)
        write_record(folder)
    return finish(folder)


def finish(folder: Path) -> int:
    """The record and the table of what the journal in a folder holds, complete or not. The exit status."""
    found, targets = write_record(folder)
    for name in (JOURNAL, LOG):
        trim(folder / name)
    summary.show(found, targets)
    if summary.said(found, "different"):
        return Exit.WRONG
    return Exit.FAILED if summary.said(found, *summary.FAILED) else Exit.OK


def write_record(folder: Path) -> tuple[dict[str, Any], list[summary.Target]]:
    entries = Journal(folder / JOURNAL).read()
    found = record.collect(next(e["about"] for e in entries if "about" in e), entries)
    targets = summary.targets(found)
    _write(folder / f"{record.slug(found['device']['name'])}.json", {**found, "targets": summary.as_json(targets)})
    return found, targets


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """All of it, or what was there before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def trim(path: Path, limit: int = LIMIT_BYTES) -> None:
    """Leave the beginning and the end of what is too long to be brought back."""
    if path.exists() and path.stat().st_size > limit:
        text = path.read_bytes()
        path.write_bytes(text[: limit // 2 - 8] + b"\n[...]\n" + text[-(limit // 2) :])


def main() -> int:
    if why := no_gpu():
        print(f"make gpu needs a GPU, and none can be used here:\n{why}", file=sys.stderr)
        return Exit.UNAVAILABLE
    os.environ.pop("FUSED_ADAM_BACKEND", None)
    package, installed = install()
    about = record.head(installed)
    print(f"{about['device']['name']}; {installed}", flush=True)
    command = [sys.executable, "-m", package, "worker"]
    return run(Path(os.environ.get("OUT") or "bench/results"), about, plan(about["device"]), command)
