"""The bytes of a safetensors header, and JSON that is believed only as far as it has been checked.

A file is the header's length as 8 little-endian bytes, the header, and the tensors without a gap between them. The
header is a JSON object, padded with spaces: ``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}``,
with offsets from the end of the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks, _numbers
from fused_adam._arrays import Array

# What each dtype's elements are in NumPy. BF16, which NumPy has not, is kept as its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
LARGEST_JSON = 100_000_000  # bytes; safetensors reads no larger header, and what is parsed is held in memory
_LENGTH = 8  # bytes of the header's own length
_ALIGNMENT = 64  # bytes: of the first tensor in its file
_MOST_AXES = 64  # of a NumPy array


class CheckpointError(ValueError):
    """What is on the disk is no checkpoint, or is damaged; the message names the file."""


def shown(text: str) -> str:
    """Text from a file for a message or a terminal: short, and nothing but characters that can be seen."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text[:61])
    return text if len(text) <= 60 else text[:57] + "..."


def dtype_name(dtype: np.dtype[Any]) -> str:
    """By which safetensors knows a dtype of NumPy's. Raises TypeError."""
    for name, known in DTYPES.items():
        if known == dtype.newbyteorder("<") and name != "BF16":
            return name
    raise TypeError(f"a checkpoint cannot hold {dtype}; it holds {', '.join(DTYPES)}")


def canonical(name: str, x: Array) -> Array:
    """Elements of a dtype with one NaN for all, whose payloads differ from backend to backend; often x itself."""
    if name == "BF16":
        nan = (x & 0x7FFF) > 0x7F80
        return np.where(nan, x.dtype.type(0x7FC0), x) if nan.any() else x
    if x.dtype.kind != "f" or not x.size:
        return x
    with np.errstate(invalid="ignore"):
        clean = not np.isnan(x.min())
    return x if clean else np.where(np.isnan(x), x.dtype.type(np.nan), x)


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(what: str, text: bytes) -> dict[str, Any]:
    """An object, in which no key comes twice. Raises CheckpointError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(pairs)
        if len(d) < len(pairs):
            raise ValueError("a key comes twice")
        return d

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        d = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: it should be JSON, but {error}") from None
    if not isinstance(d, dict):
        raise CheckpointError(f"{what} is damaged: it should be a JSON object, got {_checks.kind(d)}")
    return d


def field(what: str, d: dict[str, Any], name: str, kind: type) -> Any:
    """d[name], of exactly this type. Raises CheckpointError."""
    x = d.get(name)
    if type(x) is not kind:
        wanted = {dict: "an object", list: "a list", str: "a string", int: "an integer"}[kind]
        raise CheckpointError(f"{what} is damaged: {name!r} should be {wanted}, got {_checks.kind(x)}")
    return x


def natural(what: str, name: str, x: Any) -> int:
    """An integer in [0, 2**63). Raises CheckpointError."""
    if type(x) is not int or not 0 <= x <= _numbers.MAX_STEP:
        raise CheckpointError(f"{what} is damaged: {name} should be an integer in [0, 2**63), got {repr(x)[:40]}")
    return x


def spec(what: str, d: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of an array as JSON has them. Raises CheckpointError."""
    dtype, shape = field(what, d, "dtype", str), field(what, d, "shape", list)
    if dtype not in DTYPES:
        raise CheckpointError(f"{what} is damaged: the dtype {shown(dtype)!r} is none of {', '.join(DTYPES)}")
    if len(shape) > _MOST_AXES:
        raise CheckpointError(f"{what} is damaged: a shape has {len(shape)} axes, more than {_MOST_AXES}")
    axes = tuple(natural(what, "each number of a shape", n) for n in shape)
    natural(what, "the size of an array in bytes", prod(axes) * DTYPES[dtype].itemsize)
    return dtype, axes


# --- safetensors ------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """begin, end: in bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def print_header(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> tuple[bytes, int]:
    """The beginning of a file of (name, dtype, shape) in this order, and the size of the whole file.

    Raises ValueError for a header that safetensors would not read.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % _ALIGNMENT)
    if len(text) > LARGEST_JSON:
        raise ValueError(
            f"{len(entries)} arrays make a header of {len(text)} bytes, but safetensors reads {LARGEST_JSON}; use more "
            "ranks, or fewer and larger arrays, as flatten makes them"
        )
    return len(text).to_bytes(_LENGTH, "little") + text, _LENGTH + len(text) + offset


def header_length(what: str, start: bytes, size: int) -> int:
    """How many bytes lie before the tensors of a file of `size` bytes that starts so. Raises CheckpointError."""
    if size < _LENGTH:
        raise CheckpointError(f"{what} is damaged: {size} bytes are no safetensors file")
    n = int.from_bytes(start[:_LENGTH], "little")
    if n > min(size - _LENGTH, LARGEST_JSON):
        raise CheckpointError(f"{what} is damaged: a header of {n} bytes in a file of {size}")
    return _LENGTH + n


def parse_header(what: str, head: bytes, size: int) -> dict[str, Tensor]:
    """The tensors of a file of `size` bytes that starts with `head`, of `header_length` bytes.

    Raises CheckpointError unless they follow each other from the end of the header to that of the file.
    """
    entries = parse_json(f"the header of {what}", head[_LENGTH:])
    entries.pop("__metadata__", None)
    tensors = {}
    for name, given in entries.items():
        place = f"{shown(name)!r} in the header of {what}"
        if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{place} is damaged: it should have dtype, shape and data_offsets")
        dtype, shape = spec(place, given)
        offsets = field(place, given, "data_offsets", list)
        if len(offsets) != 2:
            raise CheckpointError(f"{place} is damaged: data_offsets should be two integers, got {len(offsets)}")
        begin, end = (len(head) + natural(place, "an offset", x) for x in offsets)
        if end - begin != prod(shape) * DTYPES[dtype].itemsize or begin % DTYPES[dtype].itemsize:
            raise CheckpointError(f"{place} is damaged: bytes {begin} to {end} do not hold {dtype} of shape {shape}")
        tensors[name] = Tensor(dtype, shape, begin, end)
    at = len(head)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise CheckpointError(f"{shown(name)!r} in the header of {what} begins at byte {tensor.begin}, not at {at}")
        at = tensor.end
    if at != size:
        raise CheckpointError(f"the header of {what} accounts for {at} bytes of {size}")
    return tensors
