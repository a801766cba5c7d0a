"""`save`, `load` and `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fused_adam import _checks, _int8, _numbers, _row_checks, _state_dict
from fused_adam._arrays import Array
from fused_adam._base import Optimizer
from fused_adam._part import MASTER, ROW_STEPS, SCALES
from fused_adam.backends import DeferredInterrupt
from fused_adam.checkpoint._elements import FORTRAN_SCALES, Elements, Located, of_optimizer
from fused_adam.checkpoint._files import NewSave, open_folder
from fused_adam.checkpoint._format import CheckpointError
from fused_adam.checkpoint._manifest import PARAMETER, Contents, Parameter, Shard, plain, print_manifest
from fused_adam.checkpoint._saved import Saved
from fused_adam.checkpoint._shards import Piece, where_all_is, write_shard

Progress = Callable[[int, int], object]


def save(
    path: str | os.PathLike[str],
    optimizer: Optimizer,
    *,
    params: bool = True,
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = 1,
    progress: Progress | None = None,
) -> Path:
    """Save an optimizer: states, t, hyperparameters, and its parameters.

    `path` becomes a folder of saves. The new one is written beside the old ones, brought to the disk and only then
    given its name; the old ones are removed last. So whatever happens meanwhile, the last one or this one is there.

    Args:
        path: a folder, made if it is not there.
        optimizer: of any class of this package, on any backend; its arrays are read in pieces of 4 MiB. NaNs are saved
            as one and the same.
        params: whether the parameters are saved too. With a master they must be: the two belong together.
        extra: what else to save: numbers, strings, bools, None, and lists and dicts of these, such as
            ``{"epoch": 3, "rng": rng.bit_generator.state}``. Tuples come back as lists.
        keep_last: how many saves stay, with this one; None for all. One that is being loaded stays too.
        progress: called with the bytes that are written and the bytes of all, for each piece.

    Returns:
        The folder of this save, which `load` takes as well.

    Raises:
        TypeError, ValueError: an argument is wrong. BlockingIOError: another process is saving there. OSError: the disk
        is full, or the folder cannot be written. What was saved before is untouched then; but if an old save cannot be
        removed, this one is there all the same.
    """
    _check(optimizer)
    _numbers.flag("params", params)
    if keep_last is not None:
        _numbers.step_number(keep_last, name="keep_last")
    kept = plain("extra", _mapping(extra))
    described, located = of_optimizer(optimizer)
    if not params:
        described = states_of(described)
    numbers = _state_dict.numbers(optimizer)
    contents = Contents(numbers["optimizer"], numbers["t"], numbers["param_groups"], described, kept)
    return write_all(path, contents, located, keep_last, progress)


def states_of(described: Sequence[Parameter]) -> list[Parameter]:
    """Without the parameters themselves. Raises ValueError for masters."""
    if any(MASTER in p.arrays for p in described):
        raise ValueError("params is False, but a master belongs to its parameters; leave it out")
    return [replace(p, arrays={name: a for name, a in p.arrays.items() if name != PARAMETER}) for p in described]


def write_all(
    path: str | os.PathLike[str],
    contents: Contents,
    located: Located,
    keep_last: int | None,
    progress: Progress | None,
) -> Path:
    """A save in one shard. Raises ValueError, OSError."""
    pieces = [Piece(n, name, 0, spec.size, spec, located[n, name]) for n, name, spec in contents.arrays()]
    total = sum(piece.spec.nbytes for piece in pieces)
    with NewSave(path) as new:
        shard = write_shard(new.folder, 0, pieces, Counter(progress, total))
        return finish(new, contents, [shard], keep_last)


def finish(new: NewSave, contents: Contents, shards: list[Shard], keep_last: int | None) -> Path:
    """Make a checkpoint of the shards that all ranks have written, in the order of the ranks.

    Raises CheckpointError unless they hold each element of each array once, OSError.
    """
    folder = open_folder(new.folder, follow=False)
    try:
        where_all_is(folder, str(new.folder), contents, shards)
    finally:
        os.close(folder)
    return new.publish(print_manifest(contents, shards), keep_last)


def load(path: str | os.PathLike[str], optimizer: Optimizer, *, progress: Progress | None = None) -> dict[str, Any]:
    """Continue from a checkpoint: states, t, hyperparameters and, where they were saved, parameters, in place.

    Any backend loads what any other has saved, bit for bit. Everything is read and checked before the first byte is
    written; then it is read again, and Ctrl-C waits until it is done.

    Args:
        path: a folder of saves, of which the last is loaded, or one of them.
        optimizer: of the class that was saved, over parameters of the same names, shapes and dtypes in the same order,
            and with the same state_dtype and master.
        progress: called with the bytes that have been read and the bytes to read, each twice, for each MiB.

    Returns:
        What was saved as `extra`.

    Raises:
        FileNotFoundError: there is no checkpoint. CheckpointError, a ValueError: it is damaged; the message names file
        and block. ValueError: it does not fit this optimizer. TypeError: that is not one. OSError: it cannot be read.
        Nothing is changed then, unless a file changes or fails while it is read again; the error has a note of that.
    """
    _check(optimizer)
    with Saved(path) as saved:
        contents = saved.contents
        ours, located = of_optimizer(optimizer)
        t, writes = checked(saved, optimizer, ours)
        report = Counter(progress, 2 * saved.size)
        for damage in saved.damage(report):
            raise CheckpointError(damage)
        every = {(number, name): [(0, spec.size)] for number, name, spec in contents.arrays()}
        _check_values(saved, t)
        report.failure = []
        with DeferredInterrupt():
            try:
                _copy(saved.read(every), located, report)
                for write, arguments in writes:
                    write(*arguments)
            except BaseException as error:
                error.add_note("the optimizer now holds a part of the checkpoint; load again before you use it")
                raise
        for failure in report.failure:
            raise failure
        return contents.extra


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
    """Read all of a checkpoint, the last one in `path` or one of them, and compare it with its checksums.

    Raises:
        FileNotFoundError: there is none. CheckpointError, a ValueError: it is damaged; the message names file and
        block of all damage. OSError: it cannot be read.
    """
    with Saved(path) as saved:
        if found := list(saved.damage(Counter(progress, saved.size))):
            raise CheckpointError("\n".join(found))


# --- what fits what ---------------------------------------------------------------------------------------------------


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        fix = "those of fused_adam.torch and fused_adam.tf are saved by torch.save and pickle, a Sharded by its save"
        raise TypeError(f"optimizer should be one of fused_adam's, got {_checks.kind(optimizer)}; {fix}")


def _mapping(extra: Any) -> Mapping[str, Any]:
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra should be a dict, got {_checks.kind(extra)}")
    return extra or {}


def checked(saved: Saved, optimizer: Optimizer, ours: Sequence[Parameter]) -> tuple[int, list[_state_dict.Write]]:
    """t, and what writes it and the hyperparameters. ours: the optimizer's parameters.

    Raises ValueError if the checkpoint is not of the optimizer's class, or not of these.
    """
    contents = saved.contents
    _same_parameters(saved, ours)
    numbers = {"optimizer": contents.optimizer, "t": contents.t, "param_groups": contents.param_groups}
    try:
        t, writes = _state_dict.checked_numbers(optimizer, numbers, saved.name)
    except TypeError as error:
        raise CheckpointError(f"{saved.name} is damaged: {error}") from None
    _same_arrays(saved, ours)
    return t, writes


def _same_parameters(saved: Saved, ours: Sequence[Parameter]) -> None:
    theirs = saved.contents.parameters
    fix = "make the optimizer over the parameters that were saved, in their structure and order"
    if len(theirs) != len(ours):
        raise ValueError(f"{saved.name} has {len(theirs)} parameters but this optimizer has {len(ours)}; {fix}")
    for k, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if (a.name, a.dtype, a.shape) != (b.name, b.dtype, b.shape):
            raise ValueError(f"parameter {k} is {a.about} in {saved.name} but {b.about} in this optimizer; {fix}")


def _same_arrays(saved: Saved, ours: Sequence[Parameter]) -> None:
    """Of each parameter the same states, in the same format, and itself or not."""
    fix = "make it with the state_dtype and master of that one, and its other arguments"
    for k, (a, b) in enumerate(zip(saved.contents.parameters, ours, strict=True)):
        if {PARAMETER: b.arrays[PARAMETER], **a.arrays} != b.arrays:
            has, needs = (", ".join(f"{n} ({s.dtype}, {s.shape})" for n, s in x.arrays.items()) for x in (a, b))
            raise ValueError(f"of parameter {k}, {saved.name} has {has} but this optimizer {needs}; {fix}")


def _check_values(saved: Saved, t: int) -> None:
    """Raises ValueError for steps of rows, codes or scales that no optimizer has made by step t."""
    contents = saved.contents
    checked = {
        (number, name): [(0, spec.size)]
        for number, name, spec in contents.arrays()
        if name in (ROW_STEPS, SCALES, FORTRAN_SCALES) or spec.dtype == "I8"
    }
    for number, name, start, x in saved.read(checked):
        dtype, what = contents.spec(number, name).dtype, f"{saved.name}: {number}.{name}"
        if dtype == "I64":
            _row_checks.row_steps(f"{what}[{start}:]", x, x, t)
        elif dtype in ("I8", "U16"):
            wrong = x == -128 if dtype == "I8" else _int8.wrong_scales(x)
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                raise CheckpointError(f"{what}[{start + first}] is {x[first]}, which no step has made")


def _copy(arrays: Iterable[tuple[int, str, int, Array]], located: Located, report: Callable[[int], None]) -> None:
    last: Elements | None = None
    for number, name, start, x in arrays:
        elements = located[number, name]
        if last is not None and last is not elements:
            last.flush()
        elements.write(start, x)
        report(x.nbytes)
        last = elements
    if last is not None:
        last.flush()


class Counter:
    """Adds up what is reported to it for a progress function, which may raise.

    failure: where to put what it raises, and be silent from then on, instead of letting it pass.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total
        self.failure: list[BaseException] | None = None

    def __call__(self, n: int) -> None:
        self._done += n
        if self._progress is None or self.failure:
            return
        try:
            self._progress(self._done, self._total)
        except BaseException as error:
            if self.failure is None:
                raise
            self.failure.append(error)
