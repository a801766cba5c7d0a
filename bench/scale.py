"""What a sharded step takes from 1 GPU to 16,384: `python -m fused_adam.bench.scale` prints the table of docs/scale.md.

An estimate, from a measured rate and what is assumed below; nobody has run these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

COPY_RATE = 4.3e12  # bytes a second, read and written, that one H200 copies, measured: no step is faster
MEMORY = 141e9  # bytes of an H200
LINK_RATE = 45e9  # bytes a second that a GPU sends and receives at once: nine tenths of a port of 400 Gbit/s
SHARE = 0.5  # of its memory for parameters, gradients and states; the rest is for activations
WEIGHTS = 2 + 2  # bytes of a parameter and a gradient in bfloat16, which each rank has; both are communicated once

PARAMETERS = (1e9, 1e10, 1e11, 1e12)
GPUS = (1, 8, 64, 512, 4096, 16384)


class Form(NamedTuple):
    """states: bytes of master, m and v of a parameter. moved: bytes that its step reads and writes."""

    name: str
    states: float
    moved: float


# g is read, p written (and read, if a part of the master is in it), states are read and written; scales: 4 bytes for 64
FORMS = (Form("fp32", 12, 2 + 2 + 2 * 12), Form("8 bit", 3 + 4 / 64, 2 + 2 * 2 + 2 * (3 + 4 / 64)))


class Estimate(NamedTuple):
    """model_parallel: over how many GPUs a copy of the weights is cut. Per GPU: bytes, and seconds of a step."""

    model_parallel: int
    weights: float
    states: tuple[float, ...]
    kernel: tuple[float, ...]
    communication: float


def estimate(parameters: float, gpus: int) -> Estimate | None:
    """None if it does not fit."""
    states = tuple(parameters * form.states / gpus for form in FORMS)
    cuts = 1
    while parameters * WEIGHTS / cuts + states[0] > SHARE * MEMORY:
        cuts *= 2
        if cuts > gpus:
            return None
    ranks = gpus // cuts
    return Estimate(
        cuts,
        parameters * WEIGHTS / cuts,
        states,
        tuple(parameters * form.moved / gpus / COPY_RATE for form in FORMS),
        parameters * WEIGHTS / cuts * (ranks - 1) / ranks / LINK_RATE,
    )


def rows() -> list[list[str]]:
    found = []
    for n in PARAMETERS:
        for gpus in GPUS:
            start = [f"{n:.0e}".replace("e+", "e").replace("e0", "e"), f"{gpus:,}"]
            e = estimate(n, gpus)
            if e is None:
                found.append([*start, "does not fit", *[""] * 6])
                continue
            memory = [f"{x / 1e9:.3g}" for x in (e.weights, *e.states)]
            found.append([*start, f"{e.model_parallel} x {gpus // e.model_parallel:,}", *memory, *map(_time, e.kernel)])
            found[-1].append(_time(e.communication))
    return found


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return "< 0.01 ms" if 0 < seconds < 1e-5 else f"{1e3 * seconds:.3g} ms"


def table() -> str:
    """In Markdown."""
    states, kernels = ([f"{what}, {form.name}" for form in FORMS] for what in ("states GB", "kernel"))
    header = ["parameters", "GPUs", "model x data parallel", "p and g GB", *states, *kernels, "communication"]
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "".join(map(_line, (header, ruler, *rows())))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(table(), end="")
