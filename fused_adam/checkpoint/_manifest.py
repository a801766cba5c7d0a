"""What a checkpoint holds, as one JSON file that begins with its own checksum."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

import fused_adam
from fused_adam import _checks, _numbers
from fused_adam._arrays import Array
from fused_adam.checkpoint._files import shard_name
from fused_adam.checkpoint._format import DTYPES, LARGEST_JSON, CheckpointError, field, natural, parse_json, shown, spec

VERSION = 1
BLOCK = 2**20  # bytes of a shard that have a checksum of their own
PARAMETER = "p"  # beside the names of its states
_FIRST = re.compile(rb'\{"crc32":"([0-9a-f]{8})",')


@dataclass(frozen=True)
class Spec:
    """An array: its dtype, by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


@dataclass(frozen=True)
class Parameter:
    """name: its place among the parameters of its group, as ``["W1"]``. arrays: of itself, "p", and of its states."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: dict[str, Spec]

    @property
    def about(self) -> str:
        return f"{shown(self.name) or 'the only one'} ({self.dtype}, shape {self.shape})"


class Shard(NamedTuple):
    """A file of arrays or parts of them. size: in bytes. crc32: of each block, uint32."""

    size: int
    crc32: Array


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint but the numbers in its arrays.

    optimizer: the name of its class. param_groups: hyperparameters, and "params": indices as in a state dict. extra:
    the user's own.
    """

    optimizer: str
    t: int
    param_groups: list[dict[str, Any]]
    parameters: list[Parameter]
    extra: dict[str, Any]

    def spec(self, number: int, name: str) -> Spec:
        return self.parameters[number].arrays[name]

    def arrays(self) -> Iterator[tuple[int, str, Spec]]:
        """(number of the parameter, name, what it is) of each array."""
        for number, parameter in enumerate(self.parameters):
            for name, array in parameter.arrays.items():
                yield number, name, array


def print_manifest(contents: Contents, shards: list[Shard]) -> bytes:
    """Raises ValueError if it is too long to be read again."""
    document = {
        "format": "fused_adam checkpoint",
        "version": VERSION,
        "written_by": fused_adam.__version__,
        **vars(contents),
        "block": BLOCK,
        "shards": [
            {"file": shard_name(k), "size": shard.size, "crc32": shard.crc32.astype(">u4").tobytes().hex()}
            for k, shard in enumerate(shards)
        ],
    }
    rest = json.dumps(document, allow_nan=False, default=vars, separators=(",", ":"))[1:].encode()
    if len(rest) > LARGEST_JSON:
        raise ValueError(f"the manifest would have {len(rest)} bytes, more than {LARGEST_JSON}; make extra smaller")
    return b'{"crc32":"%08x",' % zlib.crc32(rest) + rest


def parse_manifest(what: str, text: bytes) -> tuple[Contents, list[Shard]]:
    """Raises CheckpointError."""
    start = _FIRST.match(text)
    if not start:
        raise CheckpointError(f"{what} is damaged, or of another program: it should begin with its checksum")
    if zlib.crc32(memoryview(text)[start.end() :]) != int(start[1], 16):
        raise CheckpointError(f"{what} is damaged: it does not have its checksum")
    d = parse_json(what, text)
    version = natural(what, "version", d.get("version"))
    if d.get("format") != "fused_adam checkpoint" or version != VERSION:
        raise CheckpointError(f"{what} is of version {version}, but this fused_adam reads {VERSION}; use the other one")
    if field(what, d, "block", int) != BLOCK:
        raise CheckpointError(f"{what} is damaged: block should be {BLOCK}")
    parameters = [_parameter(what, p) for p in field(what, d, "parameters", list)]
    groups = field(what, d, "param_groups", list)
    numbers: list[Any] = []
    for group in groups:
        numbers += field(what, _object(what, "a group", group), "params", list)
    if numbers != list(range(len(parameters))) or {*map(type, numbers)} - {int}:
        raise CheckpointError(f"{what} is damaged: the groups should have each of {len(parameters)} parameters in turn")
    contents = Contents(
        field(what, d, "optimizer", str),
        natural(what, "t", d.get("t")),
        groups,
        parameters,
        field(what, d, "extra", dict),
    )
    return contents, [_shard(what, k, s) for k, s in enumerate(field(what, d, "shards", list))]


def _object(what: str, name: str, x: Any) -> dict[str, Any]:
    if type(x) is not dict:
        raise CheckpointError(f"{what} is damaged: {name} should be an object, got {_checks.kind(x)}")
    return x


def _parameter(what: str, given: Any) -> Parameter:
    d = _object(what, "a parameter", given)
    arrays = {}
    for name, array in field(what, d, "arrays", dict).items():
        if not name.isidentifier():
            raise CheckpointError(f"{what} is damaged: {shown(name)!r} is no name of an array")
        arrays[name] = Spec(*spec(what, _object(what, "an array", array)))
    return Parameter(field(what, d, "name", str), *spec(what, d), arrays)


def _shard(what: str, number: int, given: Any) -> Shard:
    d = _object(what, "a shard", given)
    if field(what, d, "file", str) != shard_name(number):
        raise CheckpointError(
            f"{what} is damaged: shard {number} should be called {shard_name(number)}, not {shown(d['file'])!r}"
        )
    size = natural(what, "size", d.get("size"))
    digits = field(what, d, "crc32", str)
    if not re.fullmatch("[0-9a-f]*", digits) or len(digits) != 8 * -(-size // BLOCK):
        raise CheckpointError(f"{what} is damaged: {shard_name(number)} should have a checksum of each of its blocks")
    return Shard(size, np.frombuffer(bytes.fromhex(digits), ">u4").astype(np.uint32))


# --- what the caller gives --------------------------------------------------------------------------------------------


def plain(name: str, x: Any) -> Any:
    """A copy that JSON gives back as it is, but for tuples, which become lists. Raises TypeError or ValueError."""
    if isinstance(x, Mapping):
        for key in x:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}, but JSON has strings only; make it one")
        return {key: plain(f"{name}[{key!r}]", value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(f"{name}[{k}]", value) for k, value in enumerate(x)]
    if x is None or type(x) in (bool, int, str):
        return x
    if type(x) is float:
        return _numbers.real(name, x)
    wanted = "a number, string, bool, None, list or dict of such"
    raise TypeError(f"{name} should be {wanted}, got {_checks.kind(x)}; NumPy's have .tolist()")
