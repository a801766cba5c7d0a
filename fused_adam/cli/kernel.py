"""Print a rule as CUDA C++: its device function, or with --full all that CuPy compiles for it."""

from __future__ import annotations

import argparse

import numpy as np

from fused_adam import _codegen, _rules
from fused_adam.backends._cuda_source import source
from fused_adam.cli.exit_codes import CommandError, Exit


def arguments(parser: argparse.ArgumentParser) -> None:
    # choices: an unknown rule is a usage error whose message lists the rules
    parser.add_argument("rule", metavar="RULE", choices=sorted(_rules.RULES), help=", ".join(_rules.RULES))
    parser.add_argument("--full", action="store_true", help="the whole translation unit, without any #include")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of its numbers, float32 by default")


def run(args: argparse.Namespace) -> int:
    if args.full:
        print(source(_codegen.bind(args.rule), np.dtype(args.dtype or "float32")).text, end="")
    elif args.dtype:
        raise CommandError("--dtype needs --full: a rule by itself is the same for every number type", Exit.USAGE)
    else:
        print(_codegen.cuda(args.rule), end="")
    return Exit.OK
