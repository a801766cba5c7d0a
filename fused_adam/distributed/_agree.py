"""What all ranks have to agree on, before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fused_adam.distributed._collective import Collective

_FLAGS = 2


def exchange(collective: Collective, data: bytes) -> list[bytes]:
    """The bytes of every rank, by rank; of any length."""
    if collective.size == 1:
        return [data]
    sizes = np.empty(collective.size, np.int64)
    collective.all_gather(sizes, np.array([len(data)], np.int64)).wait()
    longest = int(sizes.max())
    if not longest:
        return [b""] * collective.size
    mine = np.zeros(longest, np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    table = np.empty(collective.size * longest, np.uint8)
    collective.all_gather(table, mine).wait()
    return [row[:n].tobytes() for row, n in zip(table.reshape(collective.size, -1), sizes.tolist(), strict=True)]


def agree(
    collective: Collective, what: str, lines: Sequence[str], error: Exception | None = None, flag: bool = False
) -> bool:
    """Whether any rank has the flag.

    Args:
        what: how messages call what is not done if they do not agree.
        lines: what has to be the same on all ranks.
        error: what this rank found wrong.

    Raises:
        error; or ValueError on all ranks, with the same text, if another one found something wrong or has other lines.
    """
    if collective.size == 1:
        if error is not None:
            raise error
        return flag
    digest = hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).digest()
    mine = np.frombuffer(bytes([error is not None, flag]) + digest, np.uint8)
    table = np.empty(collective.size * len(mine), np.uint8)
    collective.all_gather(table, mine).wait()
    rows = table.reshape(collective.size, -1)
    if not rows[:, 0].any() and (rows[:, _FLAGS:] == rows[0, _FLAGS:]).all():
        return bool(rows[:, 1].any())
    text = "\n".join(lines) if error is None else f"{type(error).__name__}: {error}"
    said = [found.decode() for found in exchange(collective, text.encode(errors="backslashreplace"))]
    if error is not None:
        raise error
    failed = np.flatnonzero(rows[:, 0]).tolist()
    if failed:
        raise ValueError(f"no rank {what}, because rank {failed[0]} of {collective.size} raised {said[failed[0]]}")
    k = next(k for k in range(collective.size) if said[k] != said[0])
    ours, theirs = (text.split("\n") for text in (said[0], said[k]))
    n = max(len(ours), len(theirs))
    pairs = zip(*((x + ["nothing more"] * (n - len(x))) for x in (ours, theirs)), strict=True)
    one, other = next((a, b) for a, b in pairs if a != b)
    raise ValueError(
        f"no rank {what}, because the ranks differ: rank 0 has {one} where rank {k} of {collective.size} has {other}"
    )
