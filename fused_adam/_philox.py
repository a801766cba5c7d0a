"""Random bits for stochastic rounding: Philox-4x32-10 of Salmon et al. 2011, "Parallel random numbers".

One draw of 128 bits serves 8 elements that follow each other in canonical order. The key is the seed, its lower half
first. The counter is, from its lowest word on: the canonical index of the first of the 8 elements over 8 (60 bits), the
number of what is rounded (4 bits: 0 for p, 1 and so on for its states) and the step t (64 bits). Element 8 b + j takes
the lower (j even) or upper 16 bits of word j / 2. So an element's bits depend on nothing but seed, step and index.
"""

from __future__ import annotations

import numpy as np

from fused_adam._arrays import Array
from fused_adam._storage import Call

EACH = 8  # elements a draw serves
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the words of the key grow by from round to round


class Scratch:
    """Rows for tiles of at most n elements."""

    def __init__(self, n: int) -> None:
        draws = max(2, -(-n // EACH))
        self.noise = np.empty(EACH * draws, np.uint16)
        # Words in 64 bits, for their products; and two of these.
        self.rows = [np.empty(draws, np.uint64) for _ in range(6)]
        self.numbers = np.arange(draws, dtype=np.uint64)


def words(low: int, count: int = 2) -> list[int]:
    """Of 32 bits, the lowest first."""
    return [low >> 32 * k & 0xFFFFFFFF for k in range(count)]


def _constant(x: int) -> Array:
    return np.array(x, np.uint64)


_32, _WORD = _constant(32), _constant(0xFFFFFFFF)
_M0, _M1 = map(_constant, MULTIPLIERS)


def rounds(rows: list[Array], seed: int) -> list[Call]:
    """Counters, as rows of their four words in uint64, become draws. rows: these and two more."""
    c0, c1, c2, c3, p0, p1 = rows
    calls: list[Call] = []
    for r in range(ROUNDS):
        k0, k1 = (_constant((k + r * weyl) & 0xFFFFFFFF) for k, weyl in zip(words(seed), WEYL, strict=True))
        calls += [
            (np.multiply, (c0, _M0, p0)),
            (np.multiply, (c2, _M1, p1)),
            (np.right_shift, (p1, _32, c0)),
            (np.bitwise_xor, (c0, c1, c0)),
            (np.bitwise_xor, (c0, k0, c0)),
            (np.bitwise_and, (p1, _WORD, c1)),
            (np.right_shift, (p0, _32, c2)),
            (np.bitwise_xor, (c2, c3, c2)),
            (np.bitwise_xor, (c2, k1, c2)),
            (np.bitwise_and, (p0, _WORD, c3)),
        ]
    return calls


def fill(seed: int, t: int, first: int, n: int, stream: int, scratch: Scratch) -> tuple[list[Call], Array]:
    """The calls that make 16 random bits for each of n elements, and where they will be.

    first: the canonical index of the first element, a multiple of 8. stream: the number of what is rounded.
    """
    draws = -(-n // EACH)
    rows = [row[: max(draws, 2)] for row in scratch.rows]  # in place on one element a ufunc allocates
    c0, c1, c2, c3, *_ = rows
    t0, t1 = words(t)
    calls: list[Call] = [
        (np.add, (scratch.numbers[: c0.size], _constant(first // EACH), c0)),
        (np.right_shift, (c0, _32, c1)),
        (np.bitwise_or, (c1, _constant(stream << 28), c1)),
        (np.bitwise_and, (c0, _WORD, c0)),
        (np.copyto, (c2, _constant(t0))),
        (np.copyto, (c3, _constant(t1))),
        *rounds(rows, seed),
    ]
    columns = scratch.noise[: EACH * draws].view(np.uint32).reshape(-1, 4)
    calls += [(np.copyto, (columns[:, k], rows[k][:draws], "unsafe")) for k in range(4)]
    return calls, scratch.noise[:n]
