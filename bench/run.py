"""Time a step of every backend and of its peers, next to the speed of the memory.

Candidates take turns in random order in one process, on the same arrays; samples during which others used the
processor are taken again. Exit status: 0, 1 where a spread exceeds --max-noise, 2 usage, 3 a backend that was named
cannot run, 4 where --check found a wrong candidate, 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import fused_adam
from fused_adam.backends import NAMES, ON_GPU, reason
from fused_adam.cli import console, gpu
from fused_adam.cli.exit_codes import CommandError, Exit

from . import cases, machine, plot, show
from .options import arguments as arguments
from .peers import PEERS
from .problem import Candidate
from .race import Case, Method, copy_rate, on_cpu
from .report import power, progress
from .results import KIND, SCHEMA, Report, save

_OVERHEAD = 2**22  # elements whose steps take as long as what is done around any candidate's


def run(args: argparse.Namespace) -> int:
    backends = _backends(args.backend)
    on_gpu = backends[0] in ON_GPU
    if args.list:
        _list()
        return Exit.OK
    todo = _cases(args, on_gpu)
    _check_files(args)
    _check_memory(todo, on_gpu)
    cases.prepare()
    environment = machine.environment()
    report = Report(
        device=_device(on_gpu, environment),
        on="cuda" if on_gpu else "cpu",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        revision=machine.revision(),
        argv=list(sys.argv),
        environment=environment,
        rates={},
    )
    late = False
    try:
        late = _measure(args, todo, backends, report)
    except KeyboardInterrupt:
        report.interrupted = True
    _write(args, report)
    if late:
        print(f"fused-adam: --timeout: {_done(report)} of {len(todo)} cases were measured", file=sys.stderr)
    if report.interrupted:
        print(f"fused-adam: interrupted; {_done(report)} of {len(todo)} cases were measured", file=sys.stderr)
        return Exit.INTERRUPTED
    return _verdict(args, report)


def _backends(named: list[str] | None) -> list[str]:
    """All are of one device: times on two have nothing to say to each other."""
    if named is None:
        some = NAMES[2:] if reason("cupy") else ON_GPU  # both of a GPU's are timed by CuPy's clock
        return [name for name in some if not reason(name)]
    if not named:
        raise CommandError("--backend names none; leave it out for all", Exit.USAGE)
    if len({name in ON_GPU for name in named}) > 1:
        raise CommandError(f"--backend: {', '.join(named)} are not all of one device; run twice", Exit.USAGE)
    for name in named:
        gpu.require(name)
    if named[0] in ON_GPU:
        gpu.require("cupy")
    return named


def _cases(args: argparse.Namespace, on_gpu: bool) -> list[Case]:
    if "graph" in args.mode and not on_gpu:
        raise CommandError("--mode graph needs a GPU, and backends that step there", Exit.USAGE)
    sizes = args.sizes or ([2**10, 2**16, 2**20, 2**22] if args.quick else [2**16, 2**20, 2**24])
    for tensors in args.tensors:
        if tensors > min(sizes):
            fix = f"--sizes {power(min(sizes))} is too small for {tensors:,} tensors of at least one element"
            raise CommandError(fix, Exit.USAGE)
    return [
        Case(rule, dtype, mode, size, tensors)
        for rule in args.rule
        for dtype in args.dtype
        for mode in args.mode
        for tensors in args.tensors
        for size in sizes
    ]


def _check_memory(todo: list[Case], on_gpu: bool) -> None:
    """Before the first byte is allocated."""
    free = import_module(".gpu.speed", __package__).free_bytes() if on_gpu else machine.free_bytes()
    for case in todo:
        needed = case.needed * (case.sets if on_gpu else case.places)
        if needed > free:
            what = f"--sizes {power(case.size)} ({case.dtype}) needs {needed:,} bytes"
            raise CommandError(f"{what}, {case.needed // case.size} an element; {free:,} are free", Exit.USAGE)


def _check_files(args: argparse.Namespace) -> None:
    """Now, for what would fail after the measuring."""
    if args.plot:
        plot.check(args.plot)
    for option in ("json", "csv", "md"):
        path = getattr(args, option)
        if path and path != "-" and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise CommandError(f"--{option}: {path} cannot be written: no such folder, or one itself", Exit.USAGE)


def _list() -> None:
    rows = []
    for name, able, why in fused_adam.backends():
        rows.append([f"fused_adam {name}", "ours", "yes" if able else f"no: {why}"])
    for peer in PEERS.values():
        rows.append([peer.name, "peer", f"no: {' and '.join(peer.missing)} not installed" if peer.missing else "yes"])
    roof = f"no: {' and '.join(cases.ROOF.missing)} not installed" if cases.ROOF.missing else "yes"
    console.table("candidates", ["name", "kind", "available"], [*rows, [cases.ROOF.name, "roof", roof]])


def _device(on_gpu: bool, environment: dict[str, Any]) -> str:
    if on_gpu:
        return str(import_module(".race_gpu", __package__).name())
    return f"{environment['processor']}, {environment['threads']} threads"


def _measure(args: argparse.Namespace, todo: list[Case], backends: list[str], report: Report) -> bool:
    """Fill the report; whether the time was up before the end."""
    on_gpu = report.on == "cuda"
    rounds, budget_s = (7, 1.2) if args.quick else (75, 15.0)
    deadline = time.perf_counter() + (args.timeout or float("inf"))
    gpu_race: Any = import_module(".race_gpu", __package__) if on_gpu else None
    clock = gpu_race.Gpu() if on_gpu else None
    largest = max(todo, key=lambda case: case.moved)
    with _watched(todo) as watch:
        report.rates |= gpu_race.rates(clock, largest.size) if on_gpu else {"copy": copy_rate(largest.moved)}
        for k, case in enumerate(todo):
            if time.perf_counter() >= deadline:
                return True
            mine = [c for backend in backends for c in cases.candidates(backend, case.tensors, on_gpu)]
            peers = [PEERS[name] for name in args.peers]
            field: list[Candidate] = [*mine, *peers, cases.GPU_ROOF if on_gpu else cases.ROOF]
            share = (deadline - time.perf_counter()) / (len(todo) - k)  # so that the last ones are measured too
            method = Method(rounds, min(budget_s, share), deadline, args.check, watch(k, rounds))
            if on_gpu:
                gpu_race.race(clock, case, field, method, report.rows)
            else:
                on_cpu(case, field, method, report.rows)
            roofs = [row for row in report.rows if row.kind == "roof" and row.samples]
            if roofs:
                report.rates["roof"] = max(roofs, key=lambda row: row.size).bandwidth
    return False


@contextmanager
def _watched(todo: list[Case]) -> Iterator[Callable[[int, int], Callable[[int], None]]]:
    """Yields watch(number of a case, its rounds), whose result is told of each round and shows the time left."""
    weights = [_OVERHEAD + case.size for case in todo]
    start = time.perf_counter()
    with progress() as show_line:

        def watch(k: int, rounds: int) -> Callable[[int], None]:
            where = f"{power(todo[k].size)}, {k + 1} of {len(todo)}"
            show_line(where)

            def after_round(done: int) -> None:
                part = (sum(weights[:k]) + weights[k] * done / rounds) / sum(weights)
                left = (time.perf_counter() - start) * (1 - part) / part
                show_line(f"{where}: round {done} of {rounds}, about {left:.0f} s left")

            return after_round

        yield watch


def _write(args: argparse.Namespace, report: Report) -> None:
    if args.json == "-":
        console.emit_json({"kind": KIND, "schema_version": SCHEMA, **asdict(report)})
    else:
        show.tables(report)
    if args.json and args.json != "-":
        save(Path(args.json), report)
    if args.csv:
        Path(args.csv).write_text(show.as_csv(report))
    if args.md:
        Path(args.md).write_text(show.markdown(report))
    if args.plot and any(row.samples for row in report.rows):
        plot.draw([report], args.plot)


def _done(report: Report) -> int:
    return len({row.case for row in report.rows if row.samples})


def _verdict(args: argparse.Namespace, report: Report) -> int:
    wrong = [row for row in report.rows if row.status.startswith("wrong")]
    for row in wrong:
        print(f"fused-adam: {row.candidate} at {power(row.size)} is {row.status}", file=sys.stderr)
    if wrong:
        return Exit.WRONG
    noisy = (
        []
        if args.max_noise is None
        else [line for case in show.lines(report) for line in case if line.spread > args.max_noise]
    )
    for line in noisy:
        where = f"{line.row.candidate} at {power(line.row.size)}"
        print(f"fused-adam: --max-noise: {where} has a spread of {100 * line.spread:.1f} %", file=sys.stderr)
    return Exit.FAILED if noisy else Exit.OK
