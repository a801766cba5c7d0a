"""The file that a benchmark leaves: what was measured where, with every sample, and how to read it back."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
KIND = "fused_adam benchmark"


class Unreadable(ValueError):
    """A file that is no benchmark of ours, or one of a version that is not known here."""


@dataclass
class Row:
    """One candidate in one case.

    kind: "ours", "peer" or "roof". backend: of ours. size: elements of all tensors together. mode: "e2e" (host and
    device together), "cold" (the device alone, nothing in its cache) or "graph". samples: seconds a step, one entry a
    round; rounds are interleaved, so entry k of one candidate in a case pairs with entry k of another. host: seconds
    until a step returns. bytes_per_parameter: what a step has to move. launches: kernels a step. refused, disturbed:
    samples thrown away, and kept all the same, because others used the machine. status: "ok", or "skipped: why" or
    "wrong: why", without samples.
    """

    candidate: str
    kind: str
    backend: str | None
    rule: str
    dtype: str
    mode: str
    size: int
    tensors: int
    bytes_per_parameter: int
    launches: int | None = None
    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    refused: int = 0
    disturbed: int = 0
    status: str = "ok"

    @property
    def case(self) -> tuple[str, str, str, int, int]:
        """What the candidates that may be compared with each other have in common."""
        return self.rule, self.dtype, self.mode, self.size, self.tensors

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same thing in another file."""
        return (self.candidate, *self.case)

    @property
    def median(self) -> float:
        return statistics.median(self.samples) if self.samples else math.nan

    @property
    def bandwidth(self) -> float:
        """Bytes a second at the median."""
        return self.bytes_per_parameter * self.size / self.median


@dataclass
class Report:
    """What one run measured.

    device: its name. on: "cpu" or "cuda". rates: bytes a second, as far as they are known: "copy", a plain copy's, read
    and written; "roof", of the step's own reads and writes with next to no arithmetic; "peak", the memory's by its data
    sheet. environment: versions, threads, driver.
    """

    device: str
    on: str
    date: str
    revision: str
    argv: list[str]
    environment: dict[str, Any]
    rates: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False


def save(path: Path, report: Report) -> None:
    """The old file or the new one, never half of it."""
    document = {"kind": KIND, "schema_version": SCHEMA, **asdict(report)}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def load(path: Path) -> Report:
    """Raises Unreadable, with what is wrong and what to do; OSError as the file system has it."""
    try:
        document = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Unreadable(f"{path} is no JSON, or only a part of it: {error}; run the benchmark again") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise Unreadable(f"{path} is no result of `fused-adam bench run`")
    version = document.pop("schema_version", None)
    if version != SCHEMA:
        newer = "; use the fused_adam that wrote it" if isinstance(version, int) and version > SCHEMA else ""
        raise Unreadable(f"{path} has schema version {version!r}; this fused_adam reads {SCHEMA}{newer}")
    del document["kind"]
    try:
        rows = [_row(row) for row in document.pop("rows")]
        report = Report(**document, rows=rows)
        _check(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(f"{path} is damaged: {error}; run the benchmark again") from error
    return report


def _row(given: Any) -> Row:
    row = Row(**given)
    for name in ("samples", "host"):
        samples = getattr(row, name)
        if not isinstance(samples, list) or not all(_is_time(s) for s in samples):
            raise ValueError(f"{name} of {row.candidate!r} should be positive numbers of seconds")
    for name in ("size", "tensors", "bytes_per_parameter", "refused", "disturbed"):
        if type(getattr(row, name)) is not int or getattr(row, name) < 0:
            raise ValueError(f"{name} of {row.candidate!r} should be a number that counts, got {getattr(row, name)!r}")
    _strings(row, ("candidate", "kind", "rule", "dtype", "mode", "status"))
    if (row.status == "ok") != bool(row.samples):
        raise ValueError(f"{row.candidate!r} has {len(row.samples)} samples and the status {row.status!r}")
    return row


def _check(report: Report) -> None:
    _strings(report, ("device", "on", "date", "revision"))
    if not isinstance(report.environment, dict) or not isinstance(report.argv, list):
        raise ValueError("environment should be a dict and argv a list")
    if not isinstance(report.rates, dict) or not all(_is_time(rate) for rate in report.rates.values()):
        raise ValueError("rates should be positive numbers of bytes a second")
    keys = [row.key for row in report.rows]
    if len(set(keys)) != len(keys):
        raise ValueError("a candidate comes twice in one case")


def _is_time(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x) and x > 0


def _strings(thing: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(getattr(thing, name), str):
            raise ValueError(f"{name} should be a string, got {getattr(thing, name)!r}")
