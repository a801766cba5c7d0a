"""`python -m fused_adam.bench` is `fused-adam bench`, and `run` may be left out; --ratios checks the speed targets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_adam.cli import bench
from fused_adam.cli import main as fused_adam_main

from . import ratios
from .cases import missing, prepare
from .machine import environment


def main(argv: Sequence[str]) -> int:
    if "--ratios" in argv:
        return _ratios(argv)
    named = bool(argv) and argv[0] in (*bench.COMMANDS, "-h", "--help")
    return fused_adam_main(["bench", *([] if named else ["run"]), *argv])


def _ratios(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_adam.bench")
    parser.add_argument("--ratios", action="store_true", help="check the speed targets; exit 1 when one is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    args = parser.parse_args(argv)
    if absent := missing("numba", "torch"):
        parser.error(f"--ratios compares with {' and '.join(absent)}; pip install it first")
    prepare()
    met, figures = ratios.check()
    if args.json:
        args.json.write_text(json.dumps({"machine": environment(), **figures}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
