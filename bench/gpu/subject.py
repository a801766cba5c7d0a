"""What the tools look at, as a program: small steps of every shape of launch, or one large step again and again."""

from __future__ import annotations

import sys

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
