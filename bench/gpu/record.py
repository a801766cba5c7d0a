"""What is committed of a run: where it ran, what the bits were, the medians, what the tools said."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import speed_stored
from .journal import Entry

_PACKAGES = ("fused_adam", "numpy", "cupy-cuda13x", "cupy-cuda12x", "cupy", "numba", "numba-cuda", "torch", "triton")
_FACTS = ("name", "driver_version", "memory.total", "compute_cap", "compute_mode")
BITS = ("bits-cupy", "bits-numba-cuda")


def _said(*command: str) -> str:
    """What a command prints, or nothing."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def device() -> dict[str, str]:
    """The first GPU as nvidia-smi knows it; only asked, never set."""
    line = _said("nvidia-smi", "-i", "0", f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader")
    facts = dict(zip(_FACTS, (x.strip() for x in line.split(",")), strict=False))
    return facts if facts.get("name") else {"name": "unknown GPU"}


def slug(name: str) -> str:
    """A device's name as that of a file: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def head(installed: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device(),
        "versions": versions,
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "installed": installed,
    }


def outcomes(entries: Iterable[Entry], *parts: str) -> list[Entry]:
    """Of each case of these parts its last entry, in the order of the cases."""
    last: dict[tuple[Any, ...], Entry] = {}
    for e in entries:
        if "status" in e and e["part"] in parts:
            last[e["part"], e["shard"], e["case"]] = e
    return list(last.values())


def _named(some: Sequence[Entry], status: str) -> dict[str, str]:
    return {e["case"]: e.get("reason", "") for e in some if e["status"] == status}


def _tally(some: Sequence[Entry]) -> dict[str, Any]:
    """How many were as they should be, and every other case by name."""
    result: dict[str, Any] = {"ok": sum(e["status"] == "ok" for e in some)}
    for status in ("different", "failed", "skipped", "dropped", "started"):
        if named := _named(some, status):
            result[status] = named
    if notes := {e["case"]: e["note"] for e in some if "note" in e}:
        result["notes"] = notes
    if bridge := next((e["bridge"] for e in some if e.get("bridge")), ""):
        result["bridge"] = bridge
    return result


def spread(samples: Sequence[float]) -> dict[str, Any]:
    several = samples if len(samples) > 1 else [*samples, *samples]
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median_s": middle, "quartiles_s": [low, high], "samples": len(samples)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times as fast: the median over the rounds, in each of which both were timed."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def _timed(e: Entry) -> dict[str, Any]:
    ways = {way: {name: spread(s) for name, s in some.items()} for way, some in e["samples"].items()}
    about = {k: e[k] for k in ("elements", "tensors", "groups", "sets", "copied", "absent") if e.get(k)}
    if copy := ways.get("device", {}).get("copy"):
        about["copied bytes a second"] = 2 * e["copied"] / copy["median_s"]  # each is read and written
    return {**about, **ways, "ratios": ratios(e)}


def ratios(e: Entry) -> dict[str, float]:
    """What the targets are about: the bounds' times and torch's over ours, and others' over that of random values."""
    samples, found = e["samples"], {}

    def compare(name: str, way: str, slow: str, fast: str, scale: float = 1.0) -> None:
        some: Mapping[str, Any] = samples.get(way, {})
        if slow in some and fast in some:
            found[name] = scale * ratio(some[slow], some[fast])

    for ours in ("cupy", "cupy list", "numba-cuda"):
        compare(f"{ours} of the roof", "device", "roof", ours)
        if "copied" in e:
            compare(f"{ours} of the copy rate", "device", "copy", ours, 14 * e["elements"] / e["copied"])
        for way in ("device", "end to end", "graph"):
            compare(f"{ours} over torch fused, {way}", way, "torch fused", ours)
    for values in ("zero gradients", "subnormal"):
        compare(values, "device", values, "random")
    for kind in speed_stored.KINDS:
        compare(f"{kind} over torch fused", "device", speed_stored.FUSED, kind)
        compare(f"{kind} of the copy rate", "device", speed_stored.copy_of(kind), kind)
        for values in filter(None, speed_stored.VALUES):
            compare(f"{kind}{values}", "device", f"{kind}{values}", kind)
    return found


def collect(about: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """The whole record of as much as has happened."""
    first, speed = outcomes(entries, "first-step"), outcomes(entries, "speed")
    started: dict[str, list[Any]] = {}
    for e in first:
        for cache, seconds in e.get("starts", {}).items():
            started.setdefault(f"{e['backend']}, {cache} cache", []).append(seconds)
    return {
        **about,
        "stages": {e["stage"]: e["seconds"] for e in entries if "stage" in e},
        "bits": {part.removeprefix("bits-"): _tally(found) for part in BITS if (found := outcomes(entries, part))},
        "first step": {**_tally(first), "seconds": started},
        "speed": {**_tally(speed), "cases": {e["case"]: _timed(e) for e in speed if "samples" in e}},
        "sanitizer": _tally(outcomes(entries, "sanitizer")),
        "profile": _tally(outcomes(entries, "profile")),
    }
