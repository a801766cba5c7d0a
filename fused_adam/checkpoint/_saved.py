"""A checkpoint on the disk, opened to be read: nothing in it is believed before it has been checked."""

from __future__ import annotations

import fcntl
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_adam._arrays import Array
from fused_adam.checkpoint._files import MANIFEST, lock, open_file, open_folder, saves
from fused_adam.checkpoint._format import DTYPES, LARGEST_JSON, CheckpointError
from fused_adam.checkpoint._manifest import parse_manifest
from fused_adam.checkpoint._shards import ShardFile, where_all_is

Wanted = Mapping[tuple[int, str], Sequence[tuple[int, int]]]


class Run(NamedTuple):
    """Elements of an array of parameter `number` from `start` on, and where they lie in their shard."""

    begin: int
    end: int
    number: int
    name: str
    start: int


class Saved:
    """The save in a folder, or the last one of a folder of saves. While it is open no process removes it.

    Attributes:
        name: how messages call it. contents: all but the numbers in its arrays. size: of its shards, in bytes. shards:
        how many there are.

    Raises:
        FileNotFoundError: there is none. CheckpointError: it is damaged. OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder, self.name = _open_last(Path(path))
        try:
            text = _manifest(self._folder, f"{self.name}/{MANIFEST}")
            self.contents, self._shards = parse_manifest(f"{self.name}/{MANIFEST}", text)
            self.size = sum(shard.size for shard in self._shards)
            self.shards = len(self._shards)
            self._segments = where_all_is(self._folder, self.name, self.contents, self._shards)
        except BaseException:
            os.close(self._folder)
            raise

    @property
    def digest(self) -> str:
        """Tells this save from others."""
        return f"{zlib.crc32(b''.join(shard.crc32.tobytes() for shard in self._shards)):08x}"

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def _shard(self, k: int) -> ShardFile:
        return ShardFile(self._folder, self.name, k, self._shards[k])

    def damage(self, report: Callable[[int], None]) -> Iterator[str]:
        """Read everything; yields a message for each block that is damaged. report: as for `write_shard`."""
        for k, described in enumerate(self._shards):
            with self._shard(k) as shard:
                for block in range(len(described.crc32)):
                    try:
                        report(len(shard.block(block)))
                    except CheckpointError as error:
                        yield str(error)

    def read(self, wanted: Wanted) -> Iterator[tuple[int, str, int, Array]]:
        """Elements of arrays, by the number of the parameter, the name and the intervals [start, stop).

        Yields (number, name, start, elements from there on), whatever lies together in a file at once, in the order of
        the files; each array is valid until the next. Only the blocks that hold them are read. Raises CheckpointError.
        """
        runs: list[list[Run]] = [[] for _ in self._shards]
        for (number, name), intervals in wanted.items():
            mine = self._segments[number, name]
            starts = [segment.start for segment in mine]
            itemsize = DTYPES[self.contents.spec(number, name).dtype].itemsize
            for start, stop in intervals:
                for segment in mine[max(bisect_right(starts, start) - 1, 0) :]:
                    if segment.start >= stop:
                        break
                    first, last = max(start, segment.start), min(stop, segment.stop)
                    begin = segment.begin + (first - segment.start) * itemsize
                    end = begin + (last - first) * itemsize
                    if first < last:
                        runs[segment.shard].append(Run(begin, end, number, name, first))
        for k, some in enumerate(runs):
            if some:
                with self._shard(k) as shard:
                    yield from self._read(shard, sorted(some))

    def _read(self, shard: ShardFile, runs: Sequence[Run]) -> Iterator[tuple[int, str, int, Array]]:
        for begin, end, number, name, start in runs:
            dtype = DTYPES[self.contents.spec(number, name).dtype]
            for data in shard.read(begin, end):
                x = np.frombuffer(data, dtype)
                yield number, name, start, x
                start += len(x)


def _open_last(path: Path) -> tuple[int, str]:
    """An open folder that has, or should have, a manifest, and its name."""
    while True:
        chosen = path
        if not (path / MANIFEST).exists():
            found = saves(path)
            if not found:
                raise FileNotFoundError(f"{path} holds no checkpoint: neither {MANIFEST} nor a folder save-00000001")
            chosen = path / found[-1]
        try:
            folder = open_folder(chosen, follow=chosen is path)
        except FileNotFoundError:
            continue  # a later one is there, and this one has just been removed
        lock(folder, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.stat(chosen), os.fstat(folder)):
                return folder, str(chosen)
        except FileNotFoundError:
            pass  # renamed before it was locked
        os.close(folder)


def _manifest(folder: int, what: str) -> bytes:
    try:
        fd, size = open_file(folder, MANIFEST, what)
    except FileNotFoundError:
        raise CheckpointError(f"{what} is missing") from None
    with open(fd, "rb") as file:
        if size > 2 * LARGEST_JSON:
            raise CheckpointError(f"{what} is damaged: {size} bytes are more than any manifest has")
        return file.read(size)
