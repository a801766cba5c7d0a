"""Checkpoints of which each rank writes, and reads, what it owns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_adam import _numbers, _state_dict
from fused_adam._arrays import Array
from fused_adam.backends import DeferredInterrupt
from fused_adam.checkpoint import _api
from fused_adam.checkpoint._elements import Elements, of_optimizer
from fused_adam.checkpoint._files import NewSave
from fused_adam.checkpoint._manifest import PARAMETER, Contents, Parameter, Shard, Spec, plain
from fused_adam.checkpoint._saved import Saved
from fused_adam.checkpoint._shards import Piece, write_shard
from fused_adam.distributed._agree import agree, exchange
from fused_adam.distributed._state import interval

if TYPE_CHECKING:
    from fused_adam.distributed._sharded import Sharded

Progress = Callable[[int, int], object]


class _Part:
    """Elements of an array from `start` on, which are those of another one."""

    def __init__(self, elements: Elements, start: int) -> None:
        self._elements, self._start = elements, start

    def read(self, start: int, stop: int) -> Array:
        return self._elements.read(start - self._start, stop - self._start)

    def write(self, start: int, x: Array) -> None:
        self._elements.write(start - self._start, x)

    def flush(self) -> None:
        self._elements.flush()


def _described(sharded: Sharded) -> list[Parameter]:
    """The parameters and the arrays of each, whole."""
    model = sharded._model
    found = []
    for bare, size, shape in zip(of_optimizer(model.prototype)[0], model.sizes, model.shapes, strict=True):
        arrays = {}
        for name, spec in bare.arrays.items():
            whole = interval(name, 0, size)[1]
            arrays[name] = Spec(spec.dtype, shape if whole == size else (whole,))
        found.append(replace(bare, shape=shape, arrays=arrays))
    return found


def _owned(sharded: Sharded, contents: Contents) -> Iterator[Piece]:
    """What this rank has of each array that is saved."""
    for shard in sharded._pipeline.shards.values():
        _, located = of_optimizer(shard.optimizer)
        for (k, name), elements in located.items():
            number, start, stop, _ = shard.pieces[k]
            if name in contents.parameters[number].arrays:
                lo, hi = interval(name, start, stop)
                yield Piece(number, name, lo, hi, contents.spec(number, name), _Part(elements, lo))


def save(
    sharded: Sharded,
    path: str | os.PathLike[str],
    params: bool,
    extra: Mapping[str, Any] | None,
    keep_last: int | None,
    progress: Progress | None,
) -> Path:
    """See `Sharded.save`."""
    collective, first = sharded.collective, sharded.collective.rank == 0
    error: Exception | None = None
    with ExitStack() as stack:
        try:
            _numbers.flag("params", params)
            if keep_last is not None:
                _numbers.step_number(keep_last, name="keep_last")
            numbers = _state_dict.numbers(sharded._model.prototype)
            described = _described(sharded)
            if not params:
                described = _api.states_of(described)
            kept = plain("extra", dict(extra or {})) if first else {}
            contents = Contents(numbers["optimizer"], numbers["t"], numbers["param_groups"], described, kept)
            if first:
                new = stack.enter_context(NewSave(path))
        except Exception as wrong:
            error = wrong
        lines = [] if error else [f"t = {sharded.t}", f"params = {params}", *sharded._model.hyperparameters()]
        agree(collective, "saved anything", lines, error)
        data = b""
        try:
            pieces = list(_owned(sharded, contents))
            report = _api.Counter(progress, sum((p.stop - p.start) * p.spec.itemsize for p in pieces))
            folder = new.folder if first else NewSave.folder_of(path)
            written = write_shard(folder, collective.rank, pieces, report)
            data = written.size.to_bytes(8, "little") + written.crc32.astype("<u4").tobytes()
        except Exception as wrong:
            error = wrong
        agree(collective, "saved anything", [], error)
        shards = [
            Shard(int.from_bytes(found[:8], "little"), np.frombuffer(found, "<u4", offset=8).astype(np.uint32))
            for found in exchange(collective, data)
        ]
        name = b""
        try:
            if first:
                name = os.fsencode(_api.finish(new, contents, shards, keep_last).name)
        except Exception as wrong:
            error = wrong
        agree(collective, "can tell whether anything was saved", [], error)
        return Path(path) / os.fsdecode(exchange(collective, name)[0])


def load(sharded: Sharded, path: str | os.PathLike[str], progress: Progress | None) -> dict[str, Any]:
    """See `Sharded.load`."""
    model = sharded._model
    error: Exception | None = None
    lines: list[str] = []
    with ExitStack() as stack:
        try:
            saved = stack.enter_context(Saved(path))
            contents = saved.contents
            described = _described(sharded)
            _, last = _api.checked(saved, model.prototype, described)
            pieces: dict[tuple[int, str], list[Piece]] = {}
            for piece in _owned(sharded, contents):
                pieces.setdefault((piece.number, piece.name), []).append(piece)
            wanted = {place: [(p.start, p.stop) for p in some] for place, some in pieces.items()}
            nbytes = sum((p.stop - p.start) * p.spec.itemsize for some in pieces.values() for p in some)
            report = _api.Counter(progress, 2 * nbytes)
            for *_, x in saved.read(wanted):
                report(x.nbytes)
            lines = [f"a save of t = {contents.t} with checksums {saved.digest}"]
        except Exception as wrong:
            error = wrong
        agree(sharded.collective, "loaded anything", lines, error)
        report.failure = []
        with DeferredInterrupt():
            try:
                for number, name, start, x in saved.read(wanted):
                    owner = next(p for p in pieces[number, name] if p.start <= start < p.stop)
                    owner.elements.write(start, x)
                    report(x.nbytes)
                for write, arguments in last:
                    write(*arguments)
            except BaseException as cut:
                sharded._broken = "a checkpoint was loaded in part"
                cut.add_note("this rank now holds a part of the checkpoint; end all processes and load again")
                raise
        if all(PARAMETER in p.arrays for p in contents.parameters):
            for k in range(sharded._plan.buckets):
                sharded._pipeline.gathers.start(k)
            sharded._pipeline.gathers.wait()
        for failure in report.failure:
            raise failure
        return contents.extra
