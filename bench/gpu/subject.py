"""What the tools look at, as a program: small steps of every shape of launch, or one large step again and again."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import fused_adam

LARGE = 2**26
DONE = "the steps are done"


def small() -> None:
    """Tables, tails, misaligned pointers, groups, both types; each array is an allocation of its own."""
    import cupy

    cupy.cuda.set_allocator(None)  # in CuPy's pool nobody could tell one array's end from the next one's start
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for make in (fused_adam.AdamW, fused_adam.SGD):
            host = [rng.normal(size=n).astype(dtype) for n in (1, 5, 129, 2049, 4099)]
            gradients = [rng.normal(size=a.size).astype(dtype) for a in host]
            device = [cupy.asarray(np.append(np.zeros(1, dtype), a))[1:] for a in host[:2]]
            device += [cupy.asarray(a) for a in host[2:]]
            given = [cupy.asarray(g) for g in gradients]
            flat = fused_adam.flatten(device)
            grads = flat.zeros_like()
            for into, g in zip(grads.tree, given, strict=True):
                into[...] = g
            make(flat, lr=0.1).step(grads)
            make([{"params": device[:2]}, {"params": device[2:], "lr": 0.1}], lr=0.2).step([given[:2], given[2:]])
            expected = make([{"params": host[:2]}, {"params": host[2:], "lr": 0.1}], lr=0.2, backend="numpy")
            expected.step([gradients[:2], gradients[2:]])
            assert all(a.get().tobytes() == b.tobytes() for a, b in zip(device, host, strict=True))
        for lazy in (False, True):
            _rows(cupy, rng, dtype, lazy)
    for late in (False, True):
        _stored(cupy, late)


def _rows(cupy: Any, rng: Any, dtype: Any, lazy: bool) -> None:
    """Rows of every width, each with a t of its own; some come often, and one parameter moves as a whole."""
    host = [rng.normal(size=shape).astype(dtype) for shape in ((300, 1), (50, 59), (9, 2049), (7, 3))]
    device = [cupy.asarray(a) for a in host]
    ours, expected = (fused_adam.AdamW(a, lr=0.1, per_row_step=True) for a in (device, host))
    for k in (1, 2):
        rows = [rng.integers(0, len(a), k * len(a) // 2) for a in host[:3]]
        values = [rng.normal(size=(len(r), a.shape[1])).astype(dtype) for r, a in zip(rows, host[:3], strict=True)]
        for opt, put in ((ours, cupy.asarray), (expected, np.asarray)):
            some = [fused_adam.SparseGrad(r, put(v), lazy) for r, v in zip(rows, values, strict=True)]
            opt.step([*some, put(np.ones((7, 3), dtype))])
    assert all(a.get().tobytes() == b.tobytes() for a, b in zip(device, host, strict=True))


def _stored(cupy: Any, late: bool) -> None:
    """16 and 8 bits, and scales of blocks; all at once or, of an array that starts an element late, each by itself."""
    how: dict[str, Any] = {"dtype": "bfloat16", "state_dtype": "int8", "master": "split8", "stochastic_rounding": True}
    p, g = (np.full(n, 0x3C00, np.uint16) for n in (4099, 4099))
    device, given = (
        cupy.asarray(np.append(np.zeros(1, np.uint16), a))[1:] if late else cupy.asarray(a) for a in (p, g)
    )
    ours, expected = fused_adam.AdamW(device, **how), fused_adam.AdamW(p, **how)
    for _ in range(2):
        ours.step(given)
        expected.step(g)
    assert device.get().tobytes() == p.tobytes()


def large() -> None:
    import cupy

    a = cupy.asarray(np.random.default_rng(0).standard_normal(LARGE, np.float32))
    opt = fused_adam.AdamW(a.copy())
    for _ in range(5):
        opt.step(a)
    cupy.cuda.Device().synchronize()


def main() -> int:
    {"small": small, "large": large}[sys.argv[1]]()
    print(DONE, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
