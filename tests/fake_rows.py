"""What a launch of kernels/rows.cu is held to on a GPU that is not there: all that it will touch is the device's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_I64 = np.int64

ARGUMENTS = np.dtype([("table", _I64), ("of_block", _I64), ("chunk", _I64)])


def checker(text: str) -> Callable[[Any, int], None]:
    """Of the arguments and the blocks of a kernel, by what its text says of itself."""
    import fake_cupy  # which imports this

    on_device, read = fake_cupy.on_device, fake_cupy._read
    states, coefficients = map(int, re.findall(r"(?:STATES|COEFFICIENTS) = (\d+)", text))
    number = np.dtype({"float": np.float32, "double": np.float64}[re.findall(r"typedef (\w+) Number;", text)[0]])
    fields: list[Any] = [(name, _I64) for name in ("first", "count", "width", "each", "pieces", "p")]
    fields.append(("states", _I64, (max(1, states),)))
    names = ("values", "rows", "starts", "order", "met", "variant", "coefficients")
    gathered = np.dtype([*fields, *((name, _I64) for name in names)])

    def check(a: Any, blocks: int) -> None:
        assert on_device(int(a["of_block"]), 4 * blocks)
        of_block = read(a["of_block"], np.int32, blocks)
        n = int(of_block[-1]) + 1
        assert on_device(int(a["table"]), n * gathered.itemsize) and set(of_block) == set(range(n))
        assert (np.diff(of_block) >= 0).all()
        for k, line in enumerate(read(a["table"], gathered, n)):
            mine = np.flatnonzero(of_block == k)
            one(line, int(a["chunk"]), len(mine), int(mine[0]))

    def one(line: Any, chunk: int, blocks: int, first: int) -> None:
        def indices(name: str, n: int) -> Any:
            assert on_device(int(line[name]), max(1, 8 * n)) and line[name] % 8 == 0
            return read(line[name], _I64, n)

        width, count = int(line["width"]), int(line["count"])
        assert line["first"] == first and min(width, count, line["each"], line["pieces"]) >= 1
        assert min(line["each"], line["pieces"]) == 1 and width <= line["pieces"] * chunk
        assert line["each"] * min(width, chunk) <= chunk and blocks == -(-count // line["each"]) * line["pieces"]
        if line["met"]:
            met = indices("met", blocks // int(line["pieces"]) + 1)
            rows = indices("rows", int(met[-1]))
            assert (np.diff(met) >= 0).all() and met[0] == 0 and (rows < count).all()
            last = count - 1
        else:
            rows = indices("rows", count) if line["rows"] else np.arange(count)
            last = int(rows[-1])
        assert (np.diff(rows) > 0).all() and (rows >= 0).all()
        nbytes = (last + 1) * width * number.itemsize
        assert all(on_device(int(x), nbytes) for x in (line["p"], *line["states"][:states]))
        given = len(rows)
        if line["starts"]:
            starts = indices("starts", given + 1)
            assert (np.diff(starts) >= 1).all() and starts[0] == 0
            given = int(starts[-1])
        order = indices("order", given) if line["order"] else np.arange(given)
        if given:
            assert (order >= 0).all() and on_device(
                int(line["values"]), (int(order.max()) + 1) * width * number.itemsize
            )
        variants = int(indices("variant", count).max()) + 1 if line["variant"] else 1
        assert on_device(int(line["coefficients"]), variants * coefficients * number.itemsize)

    return check
