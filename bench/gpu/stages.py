"""Stages of work, each in processes of its own that are ended on time and started again after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .journal import Entry, Journal

GRACE_S = 20.0  # for the case that is under way when a stage's time is up
_STARTS = 16  # of one shard's process, at most


@dataclass(frozen=True)
class Stage:
    """parts: each with the number of processes that share its cases, all at once. seconds: for starting cases."""

    name: str
    seconds: float
    parts: tuple[tuple[str, int], ...]


class _Shard:
    """Some of a part's cases, and the process that runs them."""

    def __init__(self, part: str, shard: str, command: Sequence[str], journal: Journal, log: IO[str]) -> None:
        self._part = part
        self._shard = shard
        self._command = command
        self._journal = journal
        self._log = log
        self._starts = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self, first: int, until: float) -> None:
        self._starts += 1
        self._until = until
        arguments = [self._part, self._shard, str(self._journal.path), str(first), str(until)]
        self._log.write(f"== {self._part} {self._shard} from case {first}\n")
        self._log.flush()
        self._process = subprocess.Popen(
            [*self._command, *arguments], stdout=self._log, stderr=self._log, process_group=0, text=True
        )

    def running(self) -> bool:
        """Whether there is more to wait for. What a dead process was at is written down, and the rest started again."""
        if self._process is None:
            return False
        status = self._process.poll()
        if status is None:
            return True
        self._process = None
        if status == 0:
            return False
        open_case = self._end(f"its process ended with status {status}")
        mine = self._mine()
        done = [e["number"] for e in mine if "number" in e]
        if not done and open_case is None:
            self._write("start", None, "failed", f"the process ended with status {status} before its first case")
        elif done and max(done) + 1 < len(self._plan(mine)):
            if self._starts < _STARTS:
                self.start(max(done) + 1, self._until)
                return True
            self._drop("its process crashed too often")
        return False

    def kill(self, reason: str) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if not self._mine():
            self._write("start", None, "failed", reason)
        self._end(reason)
        self._drop(reason)

    def _end(self, reason: str) -> Entry | None:
        """Give the case that was started and never ended its outcome."""
        last = next((e for e in reversed(self._mine()) if "number" in e), None)
        if last is None or last["status"] != "started":
            return None
        self._write(last["case"], last["number"], "failed", reason)
        return last

    def _drop(self, reason: str) -> None:
        mine = self._mine()
        done = {e["number"] for e in mine if "number" in e}
        for number, name in enumerate(self._plan(mine)):
            if number not in done:
                self._write(name, number, "dropped", reason)

    def _mine(self) -> list[Entry]:
        return [e for e in self._journal.read() if e.get("part") == self._part and e.get("shard") == self._shard]

    @staticmethod
    def _plan(mine: list[Entry]) -> list[str]:
        return next((e["plan"] for e in mine if "plan" in e), [])

    def _write(self, case: str, number: int | None, status: str, reason: str) -> None:
        numbered: dict[str, Any] = {} if number is None else {"number": number}
        self._journal.write(part=self._part, shard=self._shard, case=case, **numbered, status=status, reason=reason)


def run(stage: Stage, command: Sequence[str], journal: Journal, log: Path, until: float) -> None:
    """All processes of a stage, started as `command` with the arguments of `worker.main`; no case starts after `until`.

    A case that is still running some time after that is ended.
    """
    started = time.monotonic()
    with open(log, "a") as output:
        shards = [_Shard(part, f"{k}/{n}", command, journal, output) for part, n in stage.parts for k in range(n)]
        try:
            for shard in shards:
                shard.start(0, until)
            while sum(shard.running() for shard in shards):
                time.sleep(0.05)
                if time.monotonic() > until + GRACE_S:
                    break
        finally:
            for shard in shards:
                shard.kill("it ran past the stage's time")
    journal.write(stage=stage.name, seconds=round(time.monotonic() - started, 1))
