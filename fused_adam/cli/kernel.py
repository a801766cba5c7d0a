"""Print a rule as CUDA C++: its device function, or with --full all that CuPy compiles for it."""

from __future__ import annotations

import argparse

import numpy as np

from fused_adam import _codegen, _formats, _rules
from fused_adam.backends._cuda_source import Source, source, stored_source
from fused_adam.cli.exit_codes import CommandError, Exit


def arguments(parser: argparse.ArgumentParser) -> None:
    # choices: an unknown rule is a usage error whose message lists the rules
    parser.add_argument("rule", metavar="RULE", choices=sorted(_rules.RULES), help=", ".join(_rules.RULES))
    parser.add_argument("--full", action="store_true", help="the whole translation unit, without any #include")
    kinds = "float32", "float64", "float16", "bfloat16"
    parser.add_argument("--dtype", choices=kinds, help="of its parameters, float32 by default")
    parser.add_argument("--gradient-dtype", choices=kinds, help="as that of the parameters by default")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16", "int8"), help="as in the classes")
    parser.add_argument("--master", choices=("float32", "split16", "split8"), help="as in the classes")
    parser.add_argument("--stochastic-rounding", action="store_true", help="as in the classes")


def run(args: argparse.Namespace) -> int:
    given = args.dtype, args.gradient_dtype, args.state_dtype, args.master, args.stochastic_rounding or None
    if args.full:
        print(_full(args).text, end="")
    elif any(given):
        raise CommandError("formats need --full: a rule by itself is the same for every one", Exit.USAGE)
    else:
        print(_codegen.cuda(args.rule), end="")
    return Exit.OK


def _full(args: argparse.Namespace) -> Source:
    rule, dtype = _codegen.bind(args.rule), args.dtype or "float32"
    try:
        storage = _formats.Storage.checked(args.master, args.state_dtype, args.stochastic_rounding)
        form = storage.format(dtype)
        if form is None:
            if args.gradient_dtype not in (None, dtype):
                raise ValueError(f"{dtype} parameters alone have {dtype} gradients; leave --gradient-dtype out")
            return source(rule, np.dtype(dtype))
        form = form._replace(g=args.gradient_dtype or dtype)
        _formats.refuse_rule(rule, form, "RULE")
        _formats.refuse_gradient(form, "RULE")
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    return stored_source(rule, form)
