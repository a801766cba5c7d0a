"""Shards: safetensors files that hold arrays, or parts of them, written and read a block at a time.

Each tensor of a shard is elements [start, stop) of one array, by their canonical index. So any number of ranks can
write a shard each of what they own, and any other number read what they need.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_adam._arrays import Array
from fused_adam.checkpoint._elements import Elements
from fused_adam.checkpoint._files import MANIFEST, create, open_file, shard_name, write
from fused_adam.checkpoint._format import (
    DTYPES,
    CheckpointError,
    Tensor,
    canonical,
    header_length,
    parse_header,
    print_header,
    shown,
)
from fused_adam.checkpoint._manifest import BLOCK, Contents, Shard, Spec

_PIECE = 4 * BLOCK  # bytes that are taken from an array at a time
_WRITE_BACK = 32 * BLOCK  # bytes after which the disk may begin
_KEY = re.compile(r"(\d{1,9})\.([^.\[\]]+)(?:\[(\d{1,19}):(\d{1,19})\])?", re.ASCII)


class Piece(NamedTuple):
    """Elements [start, stop) of an array of parameter `number`, and where they lie."""

    number: int
    name: str
    start: int
    stop: int
    spec: Spec
    elements: Elements

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.spec.size)

    @property
    def key(self) -> str:
        """What the file calls it: an array that lies there as a whole keeps its shape."""
        return f"{self.number}.{self.name}" + ("" if self.whole else f"[{self.start}:{self.stop}]")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape if self.whole else (self.stop - self.start,)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, rank: int, pieces: Sequence[Piece], report: Callable[[int], None]) -> Shard:
    """Write pieces into the file of a rank, and bring it to the disk.

    Beyond the arrays themselves a few MiB are held, whatever their size.

    Args:
        report: called with the number of bytes of arrays that were written since the last call.

    Raises:
        OSError: the file cannot be written. ValueError: there are too many pieces.
    """
    pieces = sorted(pieces, key=lambda piece: -DTYPES[piece.spec.dtype].itemsize)  # so that each is aligned
    head, size = print_header((piece.key, piece.spec.dtype, piece.shape) for piece in pieces)
    sums = _Checksums(size)
    with create(folder / shard_name(rank)) as fd:
        written, begun = 0, 0
        for data in _data(head, pieces, report):
            write(fd, data)
            sums.add(data)
            written += len(data)
            if written - begun >= _WRITE_BACK and hasattr(os, "posix_fadvise"):
                # Linux starts to write what it is told will not be needed: the rest of this loop and the disk overlap
                os.posix_fadvise(fd, begun, written - begun, os.POSIX_FADV_DONTNEED)
                begun = written
    return Shard(size, sums.crc32)


def _data(head: bytes, pieces: Sequence[Piece], report: Callable[[int], None]) -> Iterator[memoryview]:
    """The bytes of a file in order, of which those of arrays are reported once they have been taken."""
    yield memoryview(head)
    for piece in pieces:
        dtype = DTYPES[piece.spec.dtype]
        step = _PIECE // dtype.itemsize
        for start in range(piece.start, piece.stop, step):
            x = piece.elements.read(start, min(start + step, piece.stop)).astype(dtype, copy=False)
            data = np.ascontiguousarray(canonical(piece.spec.dtype, x)).view(np.uint8).data
            yield data
            report(len(data))
        piece.elements.flush()


class _Checksums:
    """crc32: of each block of a file of `size` bytes that is added from its beginning on."""

    def __init__(self, size: int) -> None:
        self.crc32: Array = np.zeros(-(-size // BLOCK), np.uint32)
        self._at = 0

    def add(self, data: memoryview) -> None:
        while data:
            k, filled = divmod(self._at, BLOCK)
            part = data[: BLOCK - filled]
            self.crc32[k] = zlib.crc32(part, int(self.crc32[k]))
            self._at += len(part)
            data = data[len(part) :]


# --- reading ----------------------------------------------------------------------------------------------------------


class ShardFile:
    """An open shard. what: how messages call it.

    Raises:
        CheckpointError: it is missing, no regular file, or not of the size that the manifest says.
    """

    def __init__(self, folder: int, what: str, number: int, shard: Shard) -> None:
        self.what = f"{what}/{shard_name(number)}"
        self.size, self._crc32 = shard
        try:
            self._fd, size = open_file(folder, shard_name(number), self.what)
        except FileNotFoundError:
            raise CheckpointError(f"{self.what} is missing") from None
        if size != self.size:
            os.close(self._fd)
            raise CheckpointError(f"{self.what} is damaged: it has {size} bytes, and should have {self.size}")
        self._held = -1  # the block in the buffer
        self._buffer = memoryview(bytearray(min(BLOCK, self.size)))

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def block(self, k: int) -> memoryview:
        """The bytes of a block, until the next one is asked for. Raises CheckpointError unless it has its checksum."""
        start, stop = k * BLOCK, min((k + 1) * BLOCK, self.size)
        held = self._buffer[: stop - start]
        if k != self._held:
            self._held = -1
            got = 0
            while got < len(held) and (n := os.preadv(self._fd, [held[got:]], start + got)):
                got += n
            if got < len(held) or zlib.crc32(held) != self._crc32[k]:
                raise CheckpointError(
                    f"{self.what} is damaged: block {k} (bytes {start} to {stop}) does not have its checksum"
                )
            self._held = k
        return held

    def read(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes [begin, end) in order, each part valid until the next. Raises CheckpointError."""
        for k in range(begin // BLOCK, -(-end // BLOCK)):
            yield self.block(k)[max(begin - k * BLOCK, 0) : end - k * BLOCK]

    def tensors(self) -> dict[str, Tensor]:
        start = self.block(0)[:8].tobytes() if self.size else b""
        length = header_length(self.what, start, self.size)
        return parse_header(self.what, b"".join(map(bytes, self.read(0, length))), self.size)


class Segment(NamedTuple):
    """Elements [start, stop) of an array, in a shard from byte `begin` on."""

    start: int
    stop: int
    shard: int
    begin: int


Segments = dict[tuple[int, str], list[Segment]]  # by the number of the parameter and the name of the array


def where_all_is(folder: int, what: str, contents: Contents, shards: Sequence[Shard]) -> Segments:
    """Where each array lies, in order, by the headers of the shards in an open folder.

    Raises CheckpointError unless each element of each array is there once.
    """
    specs = {(number, name): spec for number, name, spec in contents.arrays()}
    found: Segments = {place: [] for place in specs}
    for k, described in enumerate(shards):
        with ShardFile(folder, what, k, described) as shard:
            for key, tensor in shard.tensors().items():
                place, segment = _segment(shard.what, k, key, tensor, specs)
                found[place].append(segment)
    for (number, name), mine in found.items():
        mine.sort()
        at = 0
        for segment in [*mine, Segment(specs[number, name].size, 0, 0, 0)]:
            if segment.start != at:
                wrong = f"{at} to {segment.start} are missing" if segment.start > at else f"{segment.start} comes twice"
                raise CheckpointError(f"{what} has not each element of {number}.{name} once: {wrong}")
            at = segment.stop
    return found


def _segment(
    what: str, shard: int, key: str, tensor: Tensor, specs: Mapping[tuple[int, str], Spec]
) -> tuple[tuple[int, str], Segment]:
    """Of which array a tensor is, and which elements of it."""
    parts = _KEY.fullmatch(key)
    place = (int(parts[1]), parts[2]) if parts else (-1, "")
    if parts is None or place not in specs:
        raise CheckpointError(f"{what} has {shown(key)!r}, of which {MANIFEST} knows nothing")
    spec = specs[place]
    start, stop = (0, spec.size) if parts[3] is None else (int(parts[3]), int(parts[4]))
    shape = spec.shape if parts[3] is None else (stop - start,)
    if (tensor.dtype, tensor.shape) != (spec.dtype, shape):
        given = f"{tensor.dtype} of shape {tensor.shape}"
        raise CheckpointError(f"{key!r} in {what} is {given}, and should be {spec.dtype} of {shape}")
    return place, Segment(start, stop, shard, tensor.begin)
