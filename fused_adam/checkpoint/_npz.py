"""Checkpoints as NumPy's npz: arrays "0.p", "0.m" and so on, and the manifest as an array of bytes.

States and masters are float32 or float64; bfloat16 parameters are their bits, as uint16.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fused_adam._arrays import Array
from fused_adam.checkpoint._format import DTYPES
from fused_adam.checkpoint._held import Held, new_file
from fused_adam.checkpoint._manifest import parse_manifest, print_manifest
from fused_adam.checkpoint._saved import Saved
from fused_adam.checkpoint._wide import wide, wide_array

_MANIFEST = "manifest"


def write(path: Path, saved: Saved) -> None:
    """One array after the other. Raises CheckpointError, OSError."""
    contents = wide(saved.contents)
    manifest = np.frombuffer(print_manifest(contents, []), np.uint8)
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, a: Array) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, a, allow_pickle=False)

        add(_MANIFEST, manifest)
        for number, name, _ in contents.arrays():
            add(f"{number}.{name}", wide_array(saved, number, name))


def read(path: Path) -> Held:
    """Raises ValueError, OSError."""
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{path} is no npz: {error}") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is no npz but a single array")
        with archive:
            return _held(path, archive)


def _held(path: Path, archive: np.lib.npyio.NpzFile) -> Held:
    if _MANIFEST not in archive:
        raise ValueError(f"{path} has no array {_MANIFEST!r}; only what was converted to npz can be converted back")
    contents, _ = parse_manifest(f"{_MANIFEST!r} in {path}", archive[_MANIFEST].tobytes())
    arrays = {}
    for number, name, spec in contents.arrays():
        key = f"{number}.{name}"
        if key not in archive:
            raise ValueError(f"{path} has no array {key!r}")
        a = archive[key]
        if (a.dtype, a.shape) != (DTYPES[spec.dtype], spec.shape):
            raise ValueError(f"{key!r} in {path} is {a.dtype} of shape {a.shape}, not {spec.dtype} of {spec.shape}")
        arrays[number, name] = a
    return Held(contents, arrays)
