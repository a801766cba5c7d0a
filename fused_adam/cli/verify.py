"""Check every backend on fresh random inputs, against the float64 oracle and against each other.

Two checks a rule. Accuracy: one step from random states, compared with the oracle in extended precision, in ulps of the
update (and of each state) beyond the one rounding of p itself. Where terms of opposite sign cancel, an ulp of a term is
many ulps of the result in any order of operations, so these inputs share a sign. Identity: on inputs of any sign and
size, with infinities, NaN, -0 and subnormals, all backends must return the same bytes (all NaNs count as one). Inputs
are copied to a GPU for the backends that step there, and the results back.
"""

from __future__ import annotations

import argparse
import secrets
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

import fused_adam
from fused_adam.cli import console, gpu, info, oracle
from fused_adam.cli.exit_codes import CommandError, Exit

LIMIT = 10.0  # ulps of the update, and of a state
DTYPES = ("float32", "float64")
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A rule with its class and the hyperparameters by which the class and the oracle know it."""

    name: str
    make: Any
    rule: str
    hyper: dict[str, Any]


def _cases() -> list[Case]:
    sgd, adam, adamw, rmsprop = fused_adam.SGD, fused_adam.Adam, fused_adam.AdamW, fused_adam.RMSprop
    heavy = {"momentum": 0.9}
    table: list[tuple[str, Any, dict[str, Any]]] = [
        ("sgd", sgd, {}),
        ("momentum", sgd, heavy | {"dampening": 0.1}),
        ("nesterov", partial(sgd, nesterov=True), heavy),
        ("adagrad", fused_adam.Adagrad, {"lr_decay": 1e-3}),
        ("rmsprop", rmsprop, {}),
        ("rmsprop_momentum", rmsprop, heavy),
        ("rmsprop_centered", partial(rmsprop, centered=True), {}),
        ("rmsprop_centered_momentum", partial(rmsprop, centered=True), heavy),
        ("adam", adam, {}),
        ("adamw", adamw, {"weight_decay": 1e-2}),
        ("amsgrad", partial(adam, amsgrad=True), {}),
        ("amsgradw", partial(adamw, amsgrad=True), {"weight_decay": 1e-2}),
        ("lion", fused_adam.Lion, {"weight_decay": 1e-2}),
    ]
    plain = [Case(rule, make, rule, {"lr": 1e-2} | hyper) for rule, make, hyper in table]
    variants = [
        Case(f"{case.name}, L2, maximize", case.make, case.rule, case.hyper | {"weight_decay": 1e-2, "maximize": True})
        for case in plain
        if case.name in ("sgd", "momentum", "nesterov", "adam", "amsgrad")
    ]
    libraries: list[tuple[Any, str, dict[str, Any]]] = [
        (adam, "adam", {"numerics": "keras"}),
        (adam, "adam", {"numerics": "mlx"}),
        (adam, "adam", {"numerics": "optax", "eps_root": 1e-4}),
        (adamw, "adamw", {"numerics": "optax", "eps_root": 1e-4, "weight_decay": 1e-2}),
        (adamw, "adamw", {"numerics": "bitsandbytes", "weight_decay": 1e-2}),
        (partial(adam, amsgrad=True), "amsgrad", {"numerics": "optax", "eps_root": 1e-4}),
        (partial(adamw, amsgrad=True), "amsgradw", {"numerics": "optax", "eps_root": 1e-4, "weight_decay": 1e-2}),
    ]
    forms = [Case(f"{rule}, {hyper['numerics']}", make, rule, {"lr": 1e-2} | hyper) for make, rule, hyper in libraries]
    return plain + variants + forms


@dataclass
class Result:
    """Largest errors in ulps over all backends, and for each backend whether its bytes are NumPy's."""

    rule: str
    dtype: str
    update_ulps: float
    state_ulps: float
    identical: dict[str, bool]

    @property
    def right(self) -> bool:
        return max(self.update_ulps, self.state_ulps) <= LIMIT and all(self.identical.values())


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=info.BACKENDS[1:], help="only this one, against NumPy and the oracle")
    parser.add_argument("--seed", type=int, help="of the random inputs; a fresh one by default")
    parser.add_argument(
        "--size",
        type=int,
        default=262_151,
        help="elements of each input (default %(default)s: enough to run in parallel)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if args.size < 1 or (args.seed or 0) < 0:
        raise CommandError("--size should be at least 1 and --seed at least 0", Exit.USAGE)
    backends = _chosen_backends(args.backend)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    try:
        results = [
            check(case, dtype, backends, np.random.default_rng([seed, k]), args.size)
            for k, case in enumerate(_cases())
            for dtype in DTYPES
        ]
    except RuntimeError as error:  # of a compiler, or a GPU in another's exclusive use
        raise CommandError(str(error), Exit.UNAVAILABLE) from None
    flushed = flush_to_zero()
    right = not flushed and all(r.right for r in results)
    if args.json:
        rows = [asdict(r) | {"right": r.right} for r in results]
        document = {"right": right, "seed": seed, "size": args.size, "flush_to_zero": flushed, "results": rows}
        console.emit_json(document | {"backends": backends, "limit_ulps": LIMIT, "versions": info.versions()})
    else:
        _print(results, backends, seed, args.size, flushed)
    return Exit.OK if right else Exit.WRONG


def _chosen_backends(named: str | None) -> list[str]:
    """NumPy first: it is always there, and the others are compared with it."""
    if named:
        gpu.require(named)
    others = [named] if named else [name for name, ok, _ in fused_adam.backends() if ok]
    return ["numpy", *(name for name in others if name != "numpy")]


def check(case: Case, dtype: str, backends: list[str], rng: np.random.Generator, size: int) -> Result:
    """One accuracy and one identity check of a rule on all backends, at a random step."""
    names = ("p", "g", *oracle.RULES[case.rule][0])
    t = int(rng.integers(1, 10_000))
    smooth = _same_sign_inputs(names, case.hyper, dtype, rng, size)
    rough = {name: _any_inputs(name, dtype, rng, size) for name in names}
    exact_p, exact_states = oracle.step(
        case.rule, smooth["p"], smooth["g"], smooth, t, dtype=np.longdouble, **case.hyper
    )
    exact = exact_states | {"p": exact_p}
    update = np.abs(exact_p - smooth["p"])

    result = Result(case.name, dtype, 0.0, 0.0, {})
    reference: Arrays = {}
    for backend in backends:
        got = _step(case, smooth, t, backend)
        # p carries its own rounding, half an ulp of p, which is no error of the update
        excess = np.abs(got["p"] - exact["p"]) - np.spacing(np.abs(got["p"])) / 2
        result.update_ulps = max(result.update_ulps, _largest(excess / np.spacing(update.astype(dtype))))
        for name in names[2:]:
            error = np.abs(got[name] - exact[name]) / np.spacing(np.abs(got[name]))
            result.state_ulps = max(result.state_ulps, _largest(error))
        bits = {f"smooth {k}": a for k, a in got.items()} | _step(case, rough, t, backend)
        reference = reference or bits
        result.identical[backend] = all(_same_bits(bits[k], reference[k]) for k in bits)
    return result


def _largest(errors: Any) -> float:
    """Infinite where a result is NaN: the exact one never is."""
    return float(np.max(np.where(np.isnan(errors), np.inf, errors)))


def _step(case: Case, inputs: Arrays, t: int, backend: str) -> Arrays:
    """p and the states after step t through the public API; the inputs stay as they are."""
    p, g = (gpu.copy_to(backend, inputs[name]) for name in "pg")
    optimizer = case.make(p, backend=backend, **case.hyper)
    state = optimizer.state_dict()
    for name in state["state"][0]:
        state["state"][0][name][...] = inputs[name]
    optimizer.load_state_dict(state | {"t": t - 1})
    with np.errstate(all="ignore"):
        optimizer.step(g)
    return {"p": gpu.to_host(backend, p), **optimizer.state_dict()["state"][0]}


def _same_sign_inputs(
    names: tuple[str, ...], hyper: dict[str, Any], dtype: str, rng: np.random.Generator, size: int
) -> Arrays:
    """Sizes from 1e-5 to 1; p as small as an update, so that its rounding does not hide the update's error."""
    sign = rng.choice([-1.0, 1.0], size)
    inputs = {name: sign * 10 ** rng.uniform(-5, 0, size) for name in names}
    inputs["p"] *= 1e-2
    if hyper.get("maximize"):
        inputs["g"] *= -1
    for name in {"v", "max_v"} & set(names):
        inputs[name] = inputs[name] ** 2
    if "a" in names:  # a mean cannot exceed the root of the mean square
        inputs["a"] = sign * np.sqrt(inputs["v"]) * rng.uniform(0, 0.5, size)
    return {name: a.astype(dtype) for name, a in inputs.items()}


def _any_inputs(name: str, dtype: str, rng: np.random.Generator, size: int) -> Any:
    """Any sign, any size, and every twentieth element special; v and max_v are not negative."""
    tiny = np.finfo(dtype).smallest_subnormal
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -7 * tiny, np.finfo(dtype).max], dtype)
    a = (rng.standard_normal(size) * 10 ** rng.uniform(-30, 5, size)).astype(dtype)
    a = np.where(rng.random(size) < 0.05, rng.choice(special, size), a)
    return np.abs(a) if name in ("v", "max_v") else a


def _same_bits(a: Any, b: Any) -> bool:
    """Equal bytes, all NaNs taken as one: their payloads differ even between NumPy and Numba."""
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all()) and a[~nan].tobytes() == b[~nan].tobytes()


def flush_to_zero() -> bool:
    """Whether this thread rounds subnormal numbers to zero: a library built with -ffast-math turns that on."""
    smallest = np.array([2.0**-126], np.float32)  # normal, and half of it is subnormal
    made = smallest * np.float32(0.5)
    read = np.array([2**22], np.uint32).view(np.float32) * np.float32(2.0)  # 2**-127 twice
    return bool(made.view(np.uint32)[0] != 2**22 or read.view(np.uint32)[0] != 2**23)


def _print(results: list[Result], backends: list[str], seed: int, size: int, flushed: bool) -> None:
    rows = []
    for r in results:
        different = [name for name, same in r.identical.items() if not same]
        mark = f"DIFFERENT: {', '.join(different)}" if different else "identical" if backends[1:] else ""
        rows.append([r.rule, r.dtype, f"{r.update_ulps:.2f}", f"{r.state_ulps:.2f}", mark])
    header = ["rule", "dtype", "update ulp", "state ulp", "bits" if backends[1:] else ""]
    title = f"{', '.join(backends)}: largest error of one step, {size:,} elements, seed {seed}\n"
    console.table(title, header, rows)

    wrong = [r for r in results if not r.right]
    if flushed:
        print(
            "flush-to-zero: ON. Subnormal numbers are rounded to zero in this process, so results are wrong near\n"
            "underflow. A library built with -ffast-math does that when it is loaded: find it by leaving out\n"
            "imports, and rebuild or replace it."
        )
    else:
        print("flush-to-zero: off")
    print(f"accuracy: at most {max(r.update_ulps for r in results):.2f} ulp of the update (limit {LIMIT:g})")
    if len(backends) == 1:
        print("bits: nothing to compare, numpy is the only available backend")
    elif all(all(r.identical.values()) for r in results):
        print(f"bits: bit-identical on {', '.join(backends)}")
    for r in wrong:
        print(f"WRONG: {r.rule}, {r.dtype}; run again with --seed {seed} --size {size}")
