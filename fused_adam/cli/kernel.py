"""Print a rule's CUDA source, as every CUDA backend compiles it."""

from __future__ import annotations

import argparse

from fused_adam import _codegen, _rules
from fused_adam.cli.exit_codes import Exit


def arguments(parser: argparse.ArgumentParser) -> None:
    # choices: an unknown rule is a usage error whose message lists the rules
    parser.add_argument("rule", metavar="RULE", choices=sorted(_rules.RULES), help=", ".join(_rules.RULES))


def run(args: argparse.Namespace) -> int:
    print(_codegen.cuda(args.rule), end="")
    return Exit.OK
