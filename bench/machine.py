"""Where the benchmark runs: what a reader must know to compare its figures with others."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fused_adam.cli import info

from .cases import THREADS


def environment() -> dict[str, Any]:
    found = info.collect()
    return {
        "processor": found["machine"]["cpu"],
        "threads": THREADS,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version for package, version in found["versions"].items() if version},
        "gpu": found["gpu"],
        "numba": found["threads"],
        "variables": found["environment"],
    }


def revision() -> str:
    """Of the checkout that this file is in, "-dirty" where it was changed; "" for an installed copy."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def free_bytes() -> int:
    """Host memory that can be had without swapping: of the machine, and of the container if there is one."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - used)
    except (OSError, ValueError):  # not Linux, or no limit: the word "max"
        pass
    return free
