"""The `fused-adam` command. Results go to stdout, progress to stderr; exit codes are those of `exit_codes`.

Every subcommand is a module with `arguments(parser)` and `run(args)`. They import Numba, PyTorch, Matplotlib, rich and
scikit-learn only when they use them, so that `fused-adam --help` is immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fused_adam.cli import bench, checkpoint, demo, info, kernel, train, verify
from fused_adam.cli.exit_codes import CommandError, Exit

__all__ = ["main"]

_COMMANDS = {
    "info": info,
    "verify": verify,
    "train": train,
    "checkpoint": checkpoint,
    "bench": bench,
    "kernel": kernel,
    "demo": demo,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-adam",
        description="One pass over memory per optimizer step, with the same bits on every backend.",
        epilog="Exit status: 0 ok, 1 a failing check, 2 usage, 3 the named backend is unavailable, "
        "4 wrong results, 5 results not comparable, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        about = (module.__doc__ or "").split("\n\n")[0]
        subparser = commands.add_parser(name, help=about, description=about)
        module.arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `argv` is without the program's name."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help (0) or what is wrong (2)
        return int(stop.code or 0)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"fused-adam: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("fused-adam: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `fused-adam info | head -1`; the interpreter would flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.READER_GONE
