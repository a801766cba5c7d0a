"""Check checkpoints, show what is in one, or convert one to npz or torch.save's format and back."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_adam.cli import console
from fused_adam.cli.exit_codes import CommandError, Exit

if TYPE_CHECKING:
    from fused_adam.checkpoint._held import Held
    from fused_adam.checkpoint._manifest import Parameter
    from fused_adam.checkpoint._saved import Saved

_ABOUT = "a folder of saves, or one of them"


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="checkpoint", metavar="COMMAND", required=True)

    verify = commands.add_parser("verify", help="read all and compare it with its checksums")
    verify.add_argument("path", metavar="PATH", type=Path, help=f"{_ABOUT}; of a folder, all are read")
    verify.set_defaults(command=_verify)

    show = commands.add_parser("show", help="print what is in it")
    show.add_argument("path", metavar="PATH", type=Path, help=f"{_ABOUT}; of a folder, the last is shown")
    show.set_defaults(command=_show)
    for command in (verify, show):
        command.add_argument("--json", action="store_true", help="print one JSON document")

    convert = commands.add_parser("convert", help="write a checkpoint as a file of another kind, or such a file as one")
    convert.add_argument("path", metavar="PATH", type=Path, help=f"{_ABOUT}; or a file, for --to checkpoint")
    convert.add_argument("out", metavar="OUT", type=Path, help="what to write; it must not be there yet")
    convert.add_argument("--to", choices=("npz", "torch", "checkpoint"), required=True)
    convert.add_argument("--optimizer", metavar="CLASS", help="of a file of torch's that does not tell, such as AdamW")
    convert.add_argument("--t", metavar="N", type=int, help="the steps done, for a file of torch's that has no count")
    convert.set_defaults(command=_convert)


def run(args: argparse.Namespace) -> int:
    from fused_adam.checkpoint import CheckpointError

    try:
        status: int = args.command(args)
    except CheckpointError as error:
        raise CommandError(str(error), Exit.WRONG) from None
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(str(error), Exit.FAILED) from None
    return status


# --- verify and show --------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    from fused_adam.checkpoint import CheckpointError, verify
    from fused_adam.checkpoint._files import saves

    found = saves(args.path)
    results: list[dict[str, Any]] = []
    for path in [args.path / name for name in found] or [args.path]:
        with console.transfer(path.name) as progress:
            try:
                verify(path, progress=progress)
                damage = []
            except CheckpointError as error:
                damage = str(error).splitlines()
        results.append({"path": str(path), "right": not damage, "damage": damage})
    right = all(result["right"] for result in results)
    if args.json:
        console.emit_json({"right": right, "saves": results})
    else:
        for result in results:
            print("\n".join(result["damage"] or [f"{result['path']}: every byte as it was saved"]))
    return Exit.OK if right else Exit.WRONG


def _show(args: argparse.Namespace) -> int:
    from fused_adam.checkpoint._files import saves
    from fused_adam.checkpoint._saved import Saved

    with Saved(args.path) as saved:
        contents = saved.contents
        document: dict[str, Any] = {
            "path": saved.name,
            "saves": saves(args.path),
            "optimizer": contents.optimizer,
            "t": contents.t,
            "bytes": saved.size,
            "shards": saved.shards,
            "param_groups": contents.param_groups,
            "parameters": [
                {
                    "name": p.name,
                    "dtype": p.dtype,
                    "shape": p.shape,
                    "arrays": list(p.arrays),
                    "dtypes": [a.dtype for a in p.arrays.values()],
                }
                for p in contents.parameters
            ],
            "extra": contents.extra,
        }
    if args.json:
        console.emit_json(document)
        return Exit.OK
    about = [
        ("optimizer", f"{contents.optimizer}, t = {contents.t:,}"),
        ("size", f"{console.size(saved.size)} in {saved.shards} shard{'s' * (saved.shards != 1)}"),
        ("saves", ", ".join(document["saves"]) or "this one"),
        *((f"group {k}", _group(group)) for k, group in enumerate(contents.param_groups)),
        ("extra", _text(json.dumps(contents.extra))),
    ]
    console.table(saved.name, ["", ""], [[name, text] for name, text in about])
    rows = [
        [str(k), p.dtype, "x".join(map(str, p.shape)) or "()", f"{_text(p.name)}: {', '.join(_arrays(p))}"]
        for k, p in enumerate(contents.parameters)
    ]
    console.table("parameters", ["", "dtype", "shape", "name: arrays"], rows)
    return Exit.OK


def _group(group: dict[str, Any]) -> str:
    numbers = group["params"]
    which = f"parameters {numbers[0]} to {numbers[-1]}" if numbers else "no parameters"
    return _text(", ".join([which, *(f"{name} {value}" for name, value in group.items() if name != "params")]))


def _arrays(parameter: Parameter) -> list[str]:
    """Their names, with the dtypes of those that have another one than the parameter."""
    each = parameter.arrays.items()
    return [name if spec.dtype == parameter.dtype else f"{name} {spec.dtype}" for name, spec in each]


def _text(text: str) -> str:
    """Text from a file without what would move the cursor, and of a length that can be read."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text[:1000])
    return text if len(text) < 1000 else f"{text} ..."


# --- convert ----------------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from fused_adam.checkpoint._saved import Saved

    if args.out.exists():
        raise CommandError(f"{args.out} is there already; name one that is not", Exit.USAGE)
    if args.to == "checkpoint":
        held = _read(args)
        with console.transfer(args.out.name) as progress:
            held.save(args.out, progress)
        return Exit.OK
    if args.optimizer or args.t is not None:
        raise CommandError("--optimizer and --t are for --to checkpoint", Exit.USAGE)
    with Saved(args.path) as saved:
        _writer(args.to)(args.out, saved)
    return Exit.OK


def _writer(kind: str) -> Callable[[Path, Saved], None]:
    if kind == "npz":
        from fused_adam.checkpoint import _npz

        return _npz.write
    return _with_torch().write  # type: ignore[no-any-return]


def _read(args: argparse.Namespace) -> Held:
    if args.path.is_dir():
        raise CommandError(f"{args.path} is a folder; --to checkpoint takes an npz or a file of torch.save", Exit.USAGE)
    if args.path.suffix == ".npz":
        from fused_adam.checkpoint import _npz

        return _npz.read(args.path)
    held: Held = _with_torch().read(args.path, args.optimizer, args.t)
    return held


def _with_torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise CommandError("PyTorch is not installed; pip install 'fused-adam[torch]'", Exit.FAILED)
    from fused_adam.checkpoint import _torch

    return _torch
