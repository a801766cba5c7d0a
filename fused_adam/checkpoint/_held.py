"""Checkpoints in memory, on their way from or to files of other kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_adam._arrays import Array
from fused_adam.checkpoint._api import Progress, write_all
from fused_adam.checkpoint._elements import OnHost
from fused_adam.checkpoint._files import sync_folder
from fused_adam.checkpoint._format import DTYPES
from fused_adam.checkpoint._manifest import Contents
from fused_adam.checkpoint._saved import Saved


class Held(NamedTuple):
    """arrays: by the number of the parameter and the name."""

    contents: Contents
    arrays: dict[tuple[int, str], Array]

    def save(self, path: Path, progress: Progress | None) -> None:
        """As a checkpoint. Raises OSError."""
        located = {
            (number, name): OnHost(self.arrays[number, name].reshape(-1), spec.shape)
            for number, name, spec in self.contents.arrays()
        }
        write_all(path, self.contents, located, None, progress)


def array_of(saved: Saved, number: int, name: str) -> Array:
    """All elements of an array. Raises CheckpointError."""
    spec = saved.contents.spec(number, name)
    a = np.empty(spec.size, DTYPES[spec.dtype])
    for _, _, start, x in saved.read({(number, name): [(0, spec.size)]}):
        a[start : start + len(x)] = x
    return a.reshape(spec.shape)


@contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """A file to write to, which has its name once it is whole and on the disk."""
    part = path.with_name(f".{path.name}.new")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
