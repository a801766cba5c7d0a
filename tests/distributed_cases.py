"""What the tests of sharded steps share; as a program, one rank of torch.distributed on gloo.

``python distributed_cases.py CASE RANK SIZE FOLDER [TIMEOUT]`` runs a case of this file in one of SIZE processes, which
meet by a file in FOLDER, and writes what it returns there as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

import fused_adam
from fused_adam import _storage
from fused_adam.distributed import Sharded, TorchCollective

SHAPES = {"W": (30, 50), "b": (7,), "e": (0, 3), "s": (), "V": (2500,)}
BUCKET = 1024  # elements: some buckets have parts of several parameters, some are within one
MICRO_BATCHES = 8
STEPS = 20
# Which parameters, and options; each with a norm that has to be clipped.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "float64": ("float64", {"amsgrad": True}),
    "bfloat16": ("bfloat16", {"stochastic_rounding": True, "seed": 7}),
    "int8": ("bfloat16", {"master": "split8", "state_dtype": "int8", "stochastic_rounding": True, "dtype": "bfloat16"}),
}


def numbers(kind: str, *seed: int) -> dict[str, np.ndarray]:
    """Arrays of the shapes; bfloat16 as uint16."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        x = rng.standard_normal(shape).astype("float32" if kind == "bfloat16" else kind)
        is_short = kind == "bfloat16"
        found[name] = _storage.encoded(x.reshape(-1), np.dtype("u2")).reshape(shape) if is_short else np.asarray(x)
    return found


def digest(opt: Any, params: Any) -> str:
    """Of p, and of all states."""
    found = hashlib.sha256()
    for p in params.values():
        found.update(p.tobytes())
    d = opt.state_dict()
    for state in d["state"]:
        for a in state.values():
            found.update(a.tobytes())
    return f"{found.hexdigest()[:16]} at t = {d['t']}"


def make(collective: Any, form: str = "float32", mode: str = "ordered", flat: bool = False, **more: Any) -> Any:
    """Parameters by their names, and an optimizer over them."""
    kind, options = FORMATS[form]
    params: Any = numbers(kind, 0)
    given = params
    if kind == "bfloat16":
        options = {**options, "dtype": "bfloat16"}
    if flat:
        float32 = {name: np.zeros(p.shape, np.float32) for name, p in params.items()}
        given = fused_adam.flatten(float32, kind)
        for name, p in params.items():
            given[name] = p
        params = given.tree
    if mode == "invariant":
        more.setdefault("micro_batches", MICRO_BATCHES)
    rule = more.pop("rule", fused_adam.AdamW)
    hyper = {"lr": 1e-2, "bucket_elements": BUCKET, "max_grad_norm": 10.0, **options, **more}
    return params, Sharded(rule, given, collective, mode=mode, **hyper)


def gradients(opt: Any, step: int, kind: str = "float32") -> Any:
    """This rank's in a step, which has one of each micro-batch."""
    rank, size = opt.collective.rank, opt.collective.size
    if opt.mode != "invariant":
        return numbers(kind, 1, step, rank)
    each = MICRO_BATCHES // size
    return [numbers(kind, 1, step, k) for k in range(rank * each, (rank + 1) * each)]


def trained(collective: Any, form: str, mode: str, steps: int = STEPS, **more: Any) -> tuple[Any, Any]:
    params, opt = make(collective, form, mode, **more)
    for step in range(steps):
        opt.step(gradients(opt, step, FORMATS[form][0]))
    return params, opt


def hashed(collective: Any, form: str, mode: str, **more: Any) -> str:
    params, opt = trained(collective, form, mode, **more)
    return digest(opt, params)


# --- cases, each run in every process ---------------------------------------------------------------------------------


def bits(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Of each number of ranks up to all, by the modes; and a checkpoint."""
    import torch.distributed as dist

    found: dict[str, Any] = {}
    for n in (1, 2, 4):
        group = dist.new_group(list(range(n)), timeout=timedelta(seconds=60))
        if rank >= n:
            continue
        collective = TorchCollective(group)
        for form in FORMATS:
            found[f"invariant {form} {n}"] = hashed(collective, form, "invariant")
        found[f"ordered float32 {n}"] = hashed(collective, "float32", "ordered", steps=5)
        found[f"ordered bfloat16 {n}"] = hashed(collective, "bfloat16", "ordered", steps=5)
        params, _ = trained(collective, "float32", "fast", steps=5, flat=True)
        found[f"fast {n}"] = np.concatenate([p.ravel() for p in params.values()]).tolist()
        if n == 4:
            params, opt = trained(collective, "float32", "invariant", 5)
            opt.save(folder / "saved", extra={"epoch": 3})
            found["saved"] = digest(opt, params)
    return found


def refusals(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What one rank has or does otherwise than the others."""
    found = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("mode", lambda: make(None, mode="fast" if rank else "ordered"))
    note("lr", lambda: make(None, lr=[1e-2, 1e-3][rank]))
    params, opt = make(None)
    before = digest(opt, params)
    note("gradient", lambda: opt.step({**gradients(opt, 0), **({"b": np.ones(8, "f")} if rank else {})}))
    found["unchanged"] = str(before == digest(opt, params))
    opt.step(gradients(opt, 0))
    found["t"] = str(opt.t)
    return found


def interrupted(rank: int, size: int, folder: Path, do: Callable[[], Any]) -> dict[str, Any]:
    """Rank 1 does something in mid-step, after a save."""
    _, opt = make(TorchCollective(), "float32", "ordered")
    opt.step(gradients(opt, 0))
    opt.save(folder / "saved")
    if rank == 1:
        shard = opt._pipeline.shards[1]
        shard.step = lambda *_: do()
    start = time.monotonic()
    errors = []
    for _ in range(2):
        try:
            opt.step(gradients(opt, 1))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors, "seconds": time.monotonic() - start}


def killed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return interrupted(rank, size, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return interrupted(rank, size, folder, lambda: time.sleep(600))


CASES = {f.__name__: f for f in (bits, refusals, killed, hanging)}


def main(case: str, rank: str, size: str, folder: str, timeout: str = "60") -> None:
    import torch.distributed as dist

    store = f"file://{folder}/store"
    limit = timedelta(seconds=float(timeout))
    dist.init_process_group("gloo", store, timeout=limit, rank=int(rank), world_size=int(size))
    found = CASES[case](int(rank), int(size), Path(folder))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group of which a rank is gone does not end by itself


def spawn(case: str, size: int, folder: Path, timeout: float = 60) -> list[subprocess.Popen[str]]:
    """The processes of a case."""
    package = str(Path(fused_adam.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, case]
    return [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), str(timeout)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def results(processes: list[subprocess.Popen[str]], folder: Path, ranks: list[int]) -> list[Any]:
    """What some ranks returned. Raises AssertionError, with what was printed, if one did not end well."""
    for rank in ranks:
        _, printed = processes[rank].communicate(timeout=240)
        assert processes[rank].returncode == 0, f"rank {rank}: {printed}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]


if __name__ == "__main__":
    main(*sys.argv[1:])
