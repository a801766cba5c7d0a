"""How tests run the command line: in this process, as a process, and on a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import fused_adam
from fused_adam.backends import ON_GPU
from fused_adam.cli import main

AVAILABLE = [name for name, ok, _ in fused_adam.backends() if ok]
ON_CPU = [name for name in AVAILABLE if name not in ON_GPU]
UNAVAILABLE = [name for name, ok, _ in fused_adam.backends() if not ok]
COMMAND = [sys.executable, "-m", "fused_adam"]
PNG = b"\x89PNG\r\n\x1a\n"


def run(capsys, *argv):
    """status, stdout, stderr of the command in this process."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *argv):
    """status and the parsed document; NaN and Infinity are not JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    status, out, _ = run(capsys, *argv, "--json")
    return status, json.loads(out, parse_constant=refuse)


class Terminal:
    """A command whose stderr, and stdout unless piped, is a terminal."""

    def __init__(self, *argv, stdout=None, **env):
        self._master, slave = os.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            [*COMMAND, *argv],
            stdin=subprocess.DEVNULL,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment | env,
            # a parent that ignores Ctrl-C, as a background job does, would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(slave)
        self.text = ""

    def read(self, until=None):
        """Read what comes until the pattern is seen, or until the end."""
        while until is None or not re.search(until, self.text):
            try:
                data = os.read(self._master, 65536)
            except OSError:  # how Linux says that the last writer has gone
                data = b""
            if not data:
                assert until is None, f"{until} never came: {self.text}"
                os.close(self._master)
                return self.text
            self.text += data.decode()
        return self.text
