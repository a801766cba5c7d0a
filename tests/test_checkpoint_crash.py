"""Whatever ends a save, the last checkpoint or the new one is there, whole; and what is safe is safe on the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import adam, stepped
from conftest import missing
from watch import memory

import fused_adam
from fused_adam import checkpoint
from fused_adam.checkpoint import _files, _saved

KILLS = int(os.environ.get("FUSED_ADAM_KILLS", "20"))

# Forks one child after the other, each of which loads, steps and saves until it is killed at a random moment. What it
# has saved for certain it tells through a pipe. Printed: how many were killed before, and how many within, a save.
KILLED = """
import os, random, signal, sys, time
import numpy as np
import fused_adam
from fused_adam import checkpoint

folder, kills = sys.argv[1], int(sys.argv[2])
N, ROUND = 300_000, 10_000


def optimizer():
    p = np.zeros(N, np.float32)
    return p, fused_adam.SGD(p, lr=1.0, momentum=0.5, backend="numpy")


def expected(t):
    p = m = 0.0
    for _ in range(t):
        m = 0.5 * m - 1
        p -= m
    return np.float32(p), np.float32(m)


def child(write):
    p, opt = optimizer()
    if os.path.exists(folder) and any(n.startswith("save") for n in os.listdir(folder)):
        checkpoint.load(folder, opt)
    g = np.full(N, -1, np.float32)
    os.write(write, b"started\\n")
    for _ in range(ROUND):
        opt.step(g)
        checkpoint.save(folder, opt)
        os.write(write, b"%d\\n" % opt.t)


start = time.perf_counter()
p, opt = optimizer()
checkpoint.save(folder, opt)
took = time.perf_counter() - start
rng = random.Random(0)
known, between, within = 0, 0, 0
for k in range(kills):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            child(write)
        finally:
            os._exit(1)
    os.close(write)
    told = os.fdopen(read, "rb")
    assert told.readline() == b"started\\n"
    time.sleep(rng.uniform(0, min(3 * took, 0.3)))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    for line in told.read().split():
        known = int(line)
    p, opt = optimizer()
    checkpoint.load(folder, opt)
    assert opt.t in (known, known + 1), (opt.t, known)
    states = opt.state_dict()["state"][0]
    value, momentum = expected(opt.t)
    assert (p == value).all() and (states["m"] == momentum).all(), opt.t
    left = {name for name in os.listdir(folder) if not name.startswith("save-")} - {".lock"}
    within, between = within + bool(left), between + (not left)
    known = opt.t
print(between, within, known)
"""


def test_kills_at_random_moments(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run", str(KILLS)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    _, within, saved = map(int, done.stdout.split())
    assert within > KILLS / 4 and saved > KILLS / 4, done.stdout  # most of the time is spent in saves


class Disk:
    """The os module, of which the calls that take room fail from the k-th on, or only that one."""

    COUNTED = ("open", "write", "fsync", "mkdir", "rename")

    def __init__(self, k: int, on: bool) -> None:
        self._left, self._on = k, on
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(real) if name in self.COUNTED else real

    def _counted(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if real is os.open and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self._left -= 1
            if self._left < 0 and (self._on or not self.failed):
                self.failed = True
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("on", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_full_disk_at_every_call(on, keep_last, monkeypatch, tmp_path):
    """The last save stays as it is until the new one is whole, and the next one needs no help."""
    p, opt = adam(1)
    folder = tmp_path / "run"
    checkpoint.save(folder, opt)
    k = 0
    while True:
        opt.step({name: np.ones_like(a) for name, a in p.items()})
        before = memory([p, opt])
        with monkeypatch.context() as patch:
            disk = Disk(k, on)
            patch.setattr(_files, "os", disk)
            try:
                checkpoint.save(folder, opt, keep_last=keep_last)
                failed = False
            except OSError as error:
                failed = error.errno == errno.ENOSPC
        assert memory([p, opt]) == before
        assert not list(folder.glob(".new*"))
        q, other = adam(0, seed=9)
        checkpoint.load(folder, other)
        assert other.t == opt.t or (failed and other.t == opt.t - 1)
        if other.t == opt.t:
            assert memory([p, opt]) == memory([q, other])
        checkpoint.save(folder, opt, keep_last=keep_last)
        assert len(list(folder.glob("save-*"))) == keep_last
        k += 1
        if not disk.failed:
            break
    # lock, folder, header and 12 arrays, sync; manifest, write, sync, sync; rename, sync, and the rename of the old one
    assert k > 20


def test_writes_that_take_less(monkeypatch, tmp_path):
    class Short:
        """The os module, whose writes take half of what they are given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, fd: int, data: Any) -> int:
            return os.write(fd, data[: -(-len(data) // 2)])

    p, opt = adam()
    monkeypatch.setattr(_files, "os", Short())
    checkpoint.save(tmp_path, opt)
    q, other = adam(0, seed=9)
    checkpoint.load(tmp_path, other)
    assert memory([p, opt]) == memory([q, other])


def test_a_disk_that_is_full(tmp_path):
    """As far as one file of each size goes, which the system sees to."""
    code = """
import os, resource, signal, sys, numpy as np, fused_adam
from fused_adam import checkpoint
folder, size = sys.argv[1], int(sys.argv[2])
p = np.zeros(20_000, np.float32)
opt = fused_adam.SGD(p, lr=1.0, backend="numpy")
checkpoint.save(folder, opt)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
p[:] = 1
try:
    checkpoint.save(folder, opt)
except OSError as error:
    print(error.strerror)
checkpoint.load(folder, opt)
print(p[0], sorted(os.listdir(folder)))
"""
    expected = "File too large\n0.0 ['.lock', 'save-00000001']\n"
    for size in (0, 1, 64, 79_999, 80_000):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / str(size), str(size)], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == expected, done.stderr


def test_all_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    """Files, then their folder, then the name, then its folder; and only then is the old one removed."""
    calls: list[tuple[str, str]] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, fd: int) -> None:
            calls.append(("sync", str(Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(tmp_path))))
            os.fsync(fd)

        def rename(self, a: Path, b: Path) -> None:
            calls.append((str(a.relative_to(tmp_path)), str(b.relative_to(tmp_path))))
            os.rename(a, b)

    if not os.path.exists("/proc/self/fd"):
        missing("asks Linux which file is synced")
    monkeypatch.setattr(_files, "os", Watched())
    _, opt = adam()
    checkpoint.save(tmp_path / "a" / "run", opt)
    assert calls[:2] == [("sync", "a"), ("sync", ".")]  # the folders that were made
    del calls[:]
    checkpoint.save(tmp_path / "a" / "run", opt)
    assert calls == [
        ("sync", "a/run/.new/shard-00000.safetensors"),
        ("sync", "a/run/.new/manifest.json"),
        ("sync", "a/run/.new"),
        ("a/run/.new", "a/run/save-00000002"),
        ("sync", "a/run"),
        ("a/run/save-00000001", "a/run/.old-save-00000001"),
    ]


# --- others at the same time ------------------------------------------------------------------------------------------


def test_two_saves_at_once(tmp_path):
    _, opt = adam()
    with _files.NewSave(tmp_path) as new:
        with pytest.raises(BlockingIOError, match=f"another process is saving to {tmp_path}; wait for it"):
            checkpoint.save(tmp_path, opt)
        assert new.folder.is_dir()
    checkpoint.save(tmp_path, opt)


def test_a_checkpoint_that_is_read_stays(tmp_path):
    _, opt = adam()
    first = checkpoint.save(tmp_path, opt)
    with _saved.Saved(tmp_path):
        checkpoint.save(tmp_path, opt)
        assert first.is_dir()
    checkpoint.save(tmp_path, opt)
    assert [path.name for path in tmp_path.glob("save-*")] == ["save-00000003"]


def test_loads_beside_saves(tmp_path):
    """While another thread saves, one after the other, each load finds a checkpoint, and never a mix of two."""
    p = np.zeros(1000, np.float32)
    opt = fused_adam.SGD(p, lr=1.0, backend="numpy")
    checkpoint.save(tmp_path, opt)
    stop = threading.Event()
    errors: list[BaseException] = []

    def save() -> None:
        try:
            while not stop.is_set():
                opt.step(np.full(1000, -1, np.float32))
                checkpoint.save(tmp_path, opt)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    seen = set()
    q = np.zeros(1000, np.float32)
    other = fused_adam.SGD(q, backend="numpy")
    trials = 0
    try:
        while trials < 200 or (len(seen) < 4 and thread.is_alive()):  # a slow disk saves less often than it loads
            checkpoint.load(tmp_path, other)
            assert (q == other.t).all()
            seen.add(other.t)
            trials += 1
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize("moment", ["open_folder", "lock"])
def test_a_checkpoint_that_goes_while_it_is_opened(moment, monkeypatch, tmp_path):
    """Between the look into the folder and the lock, another process saves, and removes what was the last."""
    p, opt = adam()
    checkpoint.save(tmp_path, opt)
    stepped(opt, p, 1)
    real = getattr(_saved, moment)

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(_saved, moment, real)
        checkpoint.save(tmp_path, opt)
        return real(*arguments, **options)

    monkeypatch.setattr(_saved, moment, late)
    q, other = adam(0, seed=9)
    checkpoint.load(tmp_path, other)
    assert other.t == 4 and memory([p, opt]) == memory([q, other])
    assert [path.name for path in tmp_path.glob("save-*")] == ["save-00000002"]


def test_where_files_cannot_be_locked(monkeypatch, tmp_path):
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    _, opt = adam()
    for _ in range(3):
        checkpoint.save(tmp_path, opt)
    checkpoint.load(tmp_path, opt)
    assert [path.name for path in tmp_path.glob("save-*")] == ["save-00000003"]


# --- memory -----------------------------------------------------------------------------------------------------------

# Prints by how much the largest memory in use grows, in MiB, beyond what there was before.
LARGE = """
import sys
from pathlib import Path
import numpy as np
import fused_adam
from fused_adam import checkpoint

def peak(field):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1]) / 1024

folder, n, order = sys.argv[1], int(sys.argv[2]), sys.argv[3]
p = np.full((n // 1024, 1024), 1, np.float32, order=order)
opt = fused_adam.Adam([p], backend="numpy")
for state in opt._parts[0].states.values():
    state.data[:] = 2
for call in (checkpoint.save, checkpoint.verify, checkpoint.load):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("VmRSS")
    call(folder, *[opt] * (call is not checkpoint.verify))
    print(peak("VmHWM") - before)
"""


@pytest.mark.parametrize("order", ["C", "F"])
def test_no_copy_of_a_large_array_is_made(order, tmp_path):
    """Three arrays of 32 MiB each: a copy of one would show."""
    if not os.path.exists("/proc/self/clear_refs"):
        missing("asks Linux for the largest memory in use")
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path, str(2**23), order], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(float(grown) < 16 for grown in done.stdout.split()), done.stdout
