"""A folder of checkpoints, in which one is either whole or not there.

Each save is a folder of its own, ``save-00000007``, numbered on from the last. It is written under another name, all of
it brought to the disk, and then renamed, which is atomic. So a process that is killed leaves at most a folder that
nobody takes for a checkpoint, and that the next save removes. Older ones are removed only once the new one is safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fused_adam.checkpoint._format import CheckpointError

MANIFEST = "manifest.json"
_SAVE = re.compile(r"save-(\d{8,15})", re.ASCII)
_LOCK = ".lock"
_NEW, _OLD = ".new", ".old-"  # what is being written, and what is being removed


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def saves(path: Path) -> list[str]:
    """The names of the saves in a folder, oldest first. Raises OSError."""
    numbered = [(int(found[1]), name) for name in os.listdir(path) if (found := _SAVE.fullmatch(name))]
    return [name for _, name in sorted(numbered)]


# --- writing ----------------------------------------------------------------------------------------------------------


class NewSave:
    """A save in the making: `folder` to write into, then `publish`. Without that, or if it fails, nothing is left.

    Raises:
        BlockingIOError: another process is saving there. OSError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.folder = self.folder_of(path)
        _make_durable(self.path)
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            # it goes with the process that holds it, so a killed one is in nobody's way
            if not lock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                why = f"another process is saving to {self.path}; wait for it, or save to another folder"
                raise BlockingIOError(errno.EWOULDBLOCK, why)
            for entry in list(os.scandir(self.path)):
                if entry.name == _NEW or entry.name.startswith(_OLD):
                    _remove(entry)
            os.mkdir(self.folder)
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def folder_of(path: str | os.PathLike[str]) -> Path:
        """Where the shards of a save to `path` are written."""
        return Path(path) / _NEW

    def publish(self, manifest: bytes, keep_last: int | None) -> Path:
        """Make a checkpoint of it, and remove all but the last `keep_last`; returns its folder."""
        with create(self.folder / MANIFEST) as fd:
            write(fd, manifest)
        sync_folder(self.folder)
        before = saves(self.path)
        last = _SAVE.fullmatch(before[-1]) if before else None
        name = f"save-{int(last[1]) + 1 if last else 1:08d}"
        os.rename(self.folder, self.path / name)
        sync_folder(self.path)
        for old in [*before, name][: -keep_last if keep_last else 0]:
            self._retire(old)
        for entry in list(os.scandir(self.path)):
            if entry.name.startswith(_OLD):
                _remove(entry)
        return self.path / name

    def _retire(self, name: str) -> None:
        """Rename it, so that half of it is no checkpoint; but leave alone what is being read, or is no folder."""
        try:
            folder = open_folder(self.path / name, follow=False)
        except CheckpointError:
            return
        try:
            if lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.rename(self.path / name, self.path / (_OLD + name))
        finally:
            os.close(folder)

    def __enter__(self) -> NewSave:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


@contextmanager
def create(path: Path) -> Iterator[int]:
    """A new file to write to, which is on the disk once the block is done."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def write(fd: int, data: bytes | memoryview) -> None:
    """All of it; the system may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_durable(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for p in missing:
        sync_folder(p.parent)


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
    else:
        os.unlink(entry.path)


def lock(fd: int, how: int) -> bool:
    """Whether nobody else has a lock that excludes this one. Where files cannot be locked, nobody has."""
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


def open_folder(path: Path, follow: bool) -> int:
    """A folder that is read by what it holds, whatever is renamed meanwhile. follow: it may be a symbolic link."""
    return _open(str(path), os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW), None, str(path))


def open_file(folder: int, name: str, what: str) -> tuple[int, int]:
    """A regular file in an open folder, and its size. Raises CheckpointError for a link or anything else."""
    # without waiting for the writer of a pipe
    fd = _open(name, os.O_NOFOLLOW | os.O_NONBLOCK, folder, what)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{what} is no regular file")
    return fd, status.st_size


def _open(name: str, flags: int, folder: int | None, what: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | flags, dir_fd=folder)
    except OSError as error:
        # a folder that is a link is reported as no folder
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and flags & os.O_NOFOLLOW:
            raise CheckpointError(f"{what} is a symbolic link, or no folder; checkpoints hold none") from None
        raise
