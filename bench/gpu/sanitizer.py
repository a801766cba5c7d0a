"""compute-sanitizer over small steps: writes out of bounds, races, reads of memory that nothing wrote."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import subject
from .worker import Case, Skipped

TOOLS = ("memcheck", "racecheck", "initcheck")
_SUMMARY = re.compile(r"=========\s+(?:ERROR SUMMARY|RACECHECK SUMMARY):\s+(\d+) (?:errors?|hazards?)\b.*")


def found(output: str) -> tuple[int, str] | None:
    """How many errors or hazards the tool counted, and its own words; None if it never came to count."""
    match = _SUMMARY.search(output)
    return (int(match[1]), match[0].lstrip("= ")) if match else None


def run_tool(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """A tool's exit status and output. Raises Skipped if it is not installed or does not come to an end."""
    if shutil.which(command[0]) is None:
        raise Skipped(f"{command[0]} is not on the PATH")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it looks at
            raise Skipped(f"{command[0]} took more than {timeout:.0f} s") from error
    print(output)  # into the log
    return process.returncode, output


def unusable(tool: str, status: int, output: str) -> Skipped:
    """As on a machine whose driver does not let tools in."""
    lines = [line for line in output.splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"not supported|failed|error", line, re.IGNORECASE)), "nothing")
    return Skipped(f"{tool} does not work here (status {status}): {said.strip('= ')[:300]}")


def check(tool: str) -> dict[str, Any]:
    program = [sys.executable, "-m", subject.__spec__.name, "small"]
    status, output = run_tool(["compute-sanitizer", "--tool", tool, *program], timeout=50.0)
    counted = found(output)
    if counted is None or "not supported" in output:
        raise unusable("compute-sanitizer", status, output)
    count, words = counted
    if count or subject.DONE not in output:
        raise RuntimeError(f"{tool}: {words}; status {status}; see the log")
    return {"note": words}


def cases() -> list[Case]:
    return [Case(tool, partial(check, tool)) for tool in TOOLS]
