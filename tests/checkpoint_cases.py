"""What the tests of checkpoints share: small optimizers that have stepped, and where their bytes lie."""

from __future__ import annotations

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from conftest import require

import fused_adam
from fused_adam.checkpoint._manifest import BLOCK

# Each class with all of its states, as (class, hyperparameters).
CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (fused_adam.SGD, {}),
    (fused_adam.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    (fused_adam.SGD, {"momentum": 0.9, "nesterov": True}),
    (fused_adam.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    (fused_adam.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    (fused_adam.Adam, {"amsgrad": True}),
    (fused_adam.AdamW, {"numerics": "optax", "amsgrad": True, "eps_root": 1e-6}),
    (fused_adam.Lion, {"weight_decay": 0.1}),
]
SHAPES = {"W": (30, 50), "b": (7,), "e": (0, 3), "s": (), "F": (5, 4, 3)}


def params(dtype: Any = np.float32, seed: int = 0, shapes: Any = SHAPES) -> dict[str, np.ndarray]:
    """One of them in Fortran order."""
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    return {name: np.asfortranarray(a) if name == "F" else a for name, a in arrays.items()}


def stepped(optimizer: Any, like: Any, steps: int, seed: int = 1) -> Any:
    """The optimizer after some steps with gradients in the structure of `like`, a dict of arrays."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        optimizer.step({k: np.asarray(rng.standard_normal(np.shape(p)), p.dtype) for k, p in like.items()})
    return optimizer


def adam(steps: int = 3, seed: int = 0, **hyper: Any) -> tuple[dict[str, np.ndarray], Any]:
    p = params(seed=seed)
    return p, stepped(fused_adam.AdamW(p, backend="numpy", **hyper), p, steps)


def load_file(path: Path) -> dict[str, np.ndarray]:
    """What safetensors' own reader finds in a file."""
    require("safetensors")
    found: dict[str, np.ndarray] = importlib.import_module("safetensors.numpy").load_file(path)
    return found


def sign(manifest: bytes) -> bytes:
    """A manifest with the checksum that it should have."""
    start = len(b'{"crc32":"00000000",')
    return b'{"crc32":"%08x",' % zlib.crc32(manifest[start:]) + manifest[start:]


def put(path: Path, data: bytes) -> None:
    """Write a file anew: one that is only made shorter first, some disks keep safe at the cost of milliseconds."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def rewrite(save: Path, change: Any) -> None:
    """Change the document of a manifest, and sign it anew."""
    path = save / "manifest.json"
    d = json.loads(path.read_text())
    del d["crc32"]
    d = change(d) or d
    put(path, sign(b'{"crc32":"00000000",' + json.dumps(d, separators=(",", ":")).encode()[1:]))


def checksums(data: bytes) -> str:
    return "".join(f"{zlib.crc32(data[k : k + BLOCK]):08x}" for k in range(0, len(data), BLOCK))


def replace_shard(save: Path, data: bytes, number: int = 0) -> None:
    """Give a shard other bytes, and the manifest their size and checksums."""

    def change(d: Any) -> None:
        d["shards"][number] |= {"size": len(data), "crc32": checksums(data)}

    put(save / f"shard-{number:05d}.safetensors", data)
    rewrite(save, change)
