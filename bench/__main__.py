"""How long an optimizer step takes here, next to what it is compared with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import ratios, sweep
from .cases import missing, prepare
from .report import machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_adam.bench", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="sizes up to 2^22 only, in under 15 s")
    what.add_argument("--ratios", action="store_true", help="check the speed targets; exit 1 when one is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    args = parser.parse_args(argv)
    if args.ratios and (absent := missing("numba", "torch")):
        parser.error(f"--ratios compares with {' and '.join(absent)}; pip install it first")

    prepare()
    met, figures = ratios.check() if args.ratios else (True, sweep.sweep(quick=args.quick))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
