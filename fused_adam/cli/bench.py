"""Time a step against its peers and the memory, compare two measurements, draw or print one."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

COMMANDS = {
    "run": "time every backend and its peers",
    "compare": "say what became slower between two measurements",
    "plot": "draw a measurement",
    "show": "print a measurement again",
}


class _Lazy(argparse.ArgumentParser):
    """Imports its command, and asks it for its arguments, only when it has something to parse."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = _module(self.prog.rpartition(" ")[2])
        self.description = module.__doc__
        module.arguments(self)
        return super().parse_known_args(args, namespace)


def _module(name: str) -> Any:
    return import_module(f"fused_adam.bench.{name}")


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="bench", metavar="COMMAND", required=True, parser_class=_Lazy)
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about)


def run(args: argparse.Namespace) -> int:
    return int(_module(args.bench).run(args))
