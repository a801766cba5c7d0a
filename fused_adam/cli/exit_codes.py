"""What the command's exit status means, and the error that carries one."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    FAILED = 1  # a regression, a failing check, or something missing that was asked for
    USAGE = 2
    UNAVAILABLE = 3  # the named backend cannot run
    WRONG = 4  # wrong or differing results
    NOT_COMPARABLE = 5
    INTERRUPTED = 130  # 128 + SIGINT, as shells count
    READER_GONE = 141  # 128 + SIGPIPE


class CommandError(Exception):
    """Ends the command with a message on stderr and this status."""

    def __init__(self, message: str, status: Exit) -> None:
        super().__init__(message)
        self.status = status
