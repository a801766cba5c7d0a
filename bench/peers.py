"""What others offer: builders that take a problem and return the step, on the problem's own memory where they can."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from .problem import Candidate, Problem, Skipped
from .timing import Call

# PyTorch's class of each rule with what it takes beside our hyperparameters, and its names of our states.
_TORCH: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "sgd": ("SGD", {}, {}),
    "momentum": ("SGD", {}, {"m": "momentum_buffer"}),
    "nesterov": ("SGD", {"nesterov": True}, {"m": "momentum_buffer"}),
    "adagrad": ("Adagrad", {}, {"v": "sum"}),
    "rmsprop": ("RMSprop", {}, {"v": "square_avg"}),
    "adam": ("Adam", {}, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "adamw": ("AdamW", {}, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "amsgrad": ("Adam", {"amsgrad": True}, {"m": "exp_avg", "v": "exp_avg_sq", "max_v": "max_exp_avg_sq"}),
}


def _tensors(x: Problem) -> tuple[Any, list[Any]]:
    """PyTorch, and its parameters with their gradients."""
    torch: Any = import_module("torch")
    if x.on_gpu and not torch.cuda.is_available():
        raise Skipped("this PyTorch has no CUDA")
    params = [torch.nn.Parameter(torch.from_dlpack(a)) for a in x.params.tree]
    for p, g in zip(params, x.grads.tree, strict=True):
        p.grad = torch.from_dlpack(g)
    return torch, params


def _adopt(opt: Any, params: list[Any], x: Problem, names: dict[str, str], step: Callable[[Any], Any]) -> None:
    """Make the problem's states those of a torch optimizer, before its first step."""
    torch: Any = import_module("torch")
    for k, p in enumerate(params):
        opt.state[p] = {names[name]: torch.from_dlpack(buffer.tree[k]) for name, buffer in x.states.items()}
        opt.state[p]["step"] = step(p)


def _check_adam(x: Problem, who: str) -> dict[str, str]:
    """What the libraries that only know Adam call its states."""
    if x.rule not in ("adam", "adamw"):
        raise Skipped(f"{who} is timed with adam and adamw only")
    return _TORCH[x.rule][2]


def torch_optimizer(*, fused: bool, capturable: bool = False) -> Callable[[Problem], Call]:
    """torch.optim's step(), fused or foreach."""

    def build(x: Problem) -> Call:
        if x.rule not in _TORCH:
            raise Skipped(f"PyTorch has no {x.rule}")
        torch, params = _tensors(x)
        name, more, states = _TORCH[x.rule]
        if not fused and x.rule == "nesterov":
            raise Skipped("PyTorch's foreach writes into the gradients, which are everybody's")
        kinds = {"foreach": not fused}
        if name != "RMSprop":
            kinds["fused"] = fused
        elif fused:
            raise Skipped("PyTorch has no fused RMSprop")
        if capturable:
            more = more | {"capturable": True}
        opt = getattr(torch.optim, name)(params, **kinds, **x.hyper, **more)
        on_device = fused or capturable
        _adopt(opt, params, x, states, lambda p: torch.zeros((), device=p.device if on_device else "cpu"))
        step: Call = opt.step
        return step

    return build


def optax(x: Problem) -> Call:
    """Jitted, with everything donated that it replaces. JAX's arrays are its own: these are copies."""
    jax, jnp, optax = (import_module(name) for name in ("jax", "jax.numpy", "optax"))
    if x.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    hyper = dict(x.hyper)
    lr, (b1, b2) = hyper.pop("lr"), hyper.pop("betas", (0.0, 0.0))
    makers = {
        "sgd": lambda: optax.sgd(lr),
        "momentum": lambda: optax.sgd(lr, **hyper),
        "nesterov": lambda: optax.sgd(lr, nesterov=True, **hyper),
        "adam": lambda: optax.adam(lr, b1, b2, **hyper),
        "adamw": lambda: optax.adamw(lr, b1, b2, **hyper),
        "lion": lambda: optax.lion(lr, b1, b2, **hyper),
    }
    if x.rule not in makers:
        raise Skipped(f"optax's {x.rule} is another one")
    device = jax.devices("gpu" if x.on_gpu else "cpu")[0]
    params, grads = (jax.device_put(x.host(name), device) for name in "pg")
    rule = makers[x.rule]()
    names = {"mu": "m", "nu": "v", "trace": "m"}

    def known(path: Any, leaf: Any) -> Any:
        """The problem's state in place of zeros."""
        field = next((names[key.name] for key in path if getattr(key, "name", "") in names), "")
        return jnp.asarray(x.host(field)[path[-1].idx]) if field else leaf

    state = jax.device_put(jax.tree_util.tree_map_with_path(known, rule.init(params)), device)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(jitted(params, state, grads))

    x.result = lambda: [np.asarray(p) for p in params]
    return step


def deepspeed(x: Problem) -> Call:
    """FusedAdam on a GPU, DeepSpeedCPUAdam elsewhere; both build an extension at the first use."""
    names = _check_adam(x, "DeepSpeed")
    _, params = _tensors(x)
    adam: Any = import_module("deepspeed.ops.adam")
    decoupled = x.rule == "adamw"
    if x.on_gpu:
        opt = adam.FusedAdam(params, adam_w_mode=decoupled, **x.hyper)
    else:
        opt = adam.DeepSpeedCPUAdam(params, adamw_mode=decoupled, **x.hyper)
    _adopt(opt, params, x, names, lambda p: 0)
    step: Call = opt.step
    return step


def flashoptim(x: Problem) -> Call:
    """FlashAdamW without its compression of the states: the same bytes as everybody's."""
    if not x.on_gpu:
        raise Skipped("it needs a GPU")
    _check_adam(x, "FlashOptim")
    _, params = _tensors(x)
    make: Any = getattr(import_module("flashoptim"), "FlashAdamW" if x.rule == "adamw" else "FlashAdam")
    opt = make(params, quantize=False, fused=True, **x.hyper)
    for buffer in x.states.values():  # it starts from its own
        buffer.data[...] = 0
    step: Call = opt.step
    return step


def textbook(x: Problem) -> Call:
    """Adam as the paper prints it and as most people write it in NumPy."""
    if x.on_gpu:
        raise Skipped("it steps over arrays in host memory")
    _check_adam(x, "textbook NumPy")
    lr, (beta1, beta2), eps = x.hyper["lr"], x.hyper["betas"], x.hyper["eps"]
    weight_decay, t = x.hyper.get("weight_decay", 0.0), 0
    ms, vs = list(x.states["m"].tree), list(x.states["v"].tree)

    def step() -> None:
        nonlocal t
        t += 1
        for k, (p, g) in enumerate(zip(x.params.tree, x.grads.tree, strict=True)):
            m = ms[k] = beta1 * ms[k] + (1 - beta1) * g
            v = vs[k] = beta2 * vs[k] + (1 - beta2) * g**2
            m_hat = m / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            update = m_hat / (np.sqrt(v_hat) + eps)
            p[...] = p - lr * (update + weight_decay * p if weight_decay else update)

    return step


_capturable = partial(torch_optimizer, capturable=True)

PEERS = {
    c.name: c
    for c in (
        Candidate("torch-fused", torch_optimizer(fused=True), ("torch",), graph=_capturable(fused=True)),
        Candidate("torch-foreach", torch_optimizer(fused=False), ("torch",), graph=_capturable(fused=False)),
        Candidate("optax", optax, ("jax", "optax")),
        Candidate("deepspeed", deepspeed, ("torch", "deepspeed")),
        Candidate("flashoptim", flashoptim, ("torch", "flashoptim")),
        Candidate("naive-numpy", textbook),
    )
}
