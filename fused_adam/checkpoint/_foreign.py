"""The Adam states of other libraries, as state dicts that `Adam` and `AdamW` load.

For example::

    opt = fused_adam.AdamW(params, lr=1e-3, eps=1e-7, numerics="keras")
    opt.load_state_dict(fused_adam.checkpoint.convert(model.optimizer.variables, opt, "keras"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fused_adam import _checks, _memory, _numbers
from fused_adam._arrays import Array
from fused_adam._cuda_arrays import view
from fused_adam._layout import leaves, match
from fused_adam._optimizer import Adam
from fused_adam._part import ROW_STEPS

Named = tuple[str, Any]  # what a message calls something, and it


class Found(NamedTuple):
    """What a foreign state holds, not yet checked.

    t: the count of steps, once or for each parameter. states: of each parameter in order, under our names.
    hyperparameters: of each group, under our names.
    """

    t: list[Named]
    states: list[dict[str, Named]]
    hyperparameters: list[dict[str, Any]]


def convert(foreign: Any, optimizer: Adam, layout: str, *, t: int | None = None, names: Any = None) -> dict[str, Any]:
    """The state of another library's Adam as a state dict of `optimizer`, for its `load_state_dict`.

    Moments and the step count are taken over; hyperparameters too where the layout holds them (all in "torch", "apex"
    and "bitsandbytes", lr in "keras" and "mlx"), otherwise the optimizer's stay. Make it with the ``numerics`` of
    the library, over the same parameters in the same structure; their values are yours to copy. With `per_row_step`
    each row has done the library's steps.

    Args:
        foreign: by layout:

            * "torch": `state_dict()` of ``torch.optim.Adam`` or ``AdamW``. "apex": of ``FusedAdam``. "bitsandbytes": of
              ``Adam`` or ``AdamW`` with 32-bit states.
            * "tf": the variables of a TensorFlow 1 checkpoint by name: ``name/Adam`` and ``name/Adam_1`` for each
              parameter, ``beta1_power`` and ``beta2_power``; others are not looked at.
            * "keras": `optimizer.variables` of Keras 3's ``Adam`` or ``AdamW``, or what `save_own_variables` stores.
            * "optax": the state of ``adam``, ``adamw`` or ``amsgrad``, also inside ``chain``.
            * "mlx": `optimizer.state` of ``Adam`` or ``AdamW``.

            Arrays are of any library that NumPy can read, or on a GPU; float32 or float64, as the parameters are.
        optimizer: an `Adam` or `AdamW`; it is not changed.
        layout: one of the above.
        t: the number of steps done, instead of what `foreign` says.
        names: for "tf", the names of the parameters in their structure; by default their keys joined by "/".

    Raises:
        TypeError, ValueError: `foreign` is not of this layout or does not fit the optimizer; the message names the
            entry. Among them: step counts that differ between parameters, and 8-bit states.

    Returns:
        A dict as of `state_dict`, with arrays of its own.
    """
    if not isinstance(optimizer, Adam):
        raise TypeError(f"optimizer should be an Adam or AdamW, got {_checks.kind(optimizer)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout should be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if names is not None and layout != "tf":
        raise ValueError(f'names is for layout "tf", not "{layout}"; leave it out')
    d = optimizer.state_dict()
    found = LAYOUTS[layout](foreign, optimizer, **({"names": names, "t": t} if layout == "tf" else {}))
    d["t"] = _steps(found.t) if t is None else _numbers.step_number(t, least=0, name="t")
    for k, (group, values) in enumerate(zip(d["param_groups"], found.hyperparameters, strict=True)):
        group.update({name: _number(f"{name} of group {k}", x) for name, x in values.items()})
        optimizer._check(group)
        if group["amsgrad"] and (group["numerics"] == "optax") != (layout == "optax"):
            raise ValueError(
                f'layout "{layout}" with amsgrad does not go with numerics="{group["numerics"]}": optax keeps the '
                "largest corrected v, the others the largest v"
            )
    for ours, theirs in zip(d["state"], found.states, strict=True):
        if ROW_STEPS in ours:
            ours[ROW_STEPS][...] = d["t"]
        if ours.keys() - {ROW_STEPS} != theirs.keys():
            amsgrad = "max_v" in theirs
            name, _ = theirs["v"]
            raise ValueError(
                f"{name} is of an optimizer {'with' if amsgrad else 'without'} amsgrad; "
                f"make this one with amsgrad={amsgrad}"
            )
        for key, (name, a) in theirs.items():
            host = _host(name, a)
            _checks.state(name, host, ours[key].shape, ours[key].dtype)
            if key != "m" and (host < 0).any():
                raise ValueError(
                    f"{name} is a second moment but has negative elements; compare the order of the states"
                )
            ours[key] = host
    return d


# --- numbers and arrays -----------------------------------------------------------------------------------------------


def _host(name: str, a: Any) -> Array:
    """A copy in host memory."""
    try:
        return np.asarray(a).copy() if view(name, a) is None else _memory.on_host(a)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name} should be an array that NumPy can read, got {_checks.kind(a)}: {error}") from error


def _number(name: str, x: Any) -> Any:
    """A hyperparameter, which may be an array of one element, or a sequence of such."""
    if isinstance(x, tuple | list):
        return tuple(_number(name, one) for one in x)
    if isinstance(x, bool | int | float):
        return x
    a = _host(name, x)
    if a.size != 1:
        raise TypeError(f"{name} should be a number, got {_checks.kind(x)} of shape {a.shape}")
    return a.item()


def _steps(counts: list[Named]) -> int:
    """The count that all agree on."""
    done = []
    for name, x in counts:
        n = _number(name, x)
        if isinstance(n, float) and n.is_integer():
            if n >= 2**24 and _host(name, x).dtype == np.float32:
                raise ValueError(f"{name} is {n}, and a float32 counts no further than 2**24; pass t=, the steps done")
            n = int(n)
        done.append(_numbers.step_number(n, least=0, name=name))
        if done[-1] != done[0]:
            raise ValueError(
                f"{name} is {done[-1]} but {counts[0][0]} is {done[0]}, and an optimizer has one count of steps: "
                "convert parameters that have done the same steps into one optimizer, or pass t="
            )
    return done[0]


def _mapping(name: str, x: Any) -> Mapping[Any, Any]:
    if not isinstance(x, Mapping):
        raise TypeError(f"{name} should be a dict, got {_checks.kind(x)}")
    return x


def _matched(tree: Any, optimizer: Adam, path: str) -> list[Named]:
    """The arrays of a tree, in the structure that gradients have, in the order of the parameters."""
    like = optimizer._trees[0] if optimizer._one_group else optimizer._trees
    return [(name, a) for (name, _), a in zip(leaves(like, path), match(tree, like, path), strict=True)]


# --- PyTorch and its relatives ----------------------------------------------------------------------------------------

_TORCH = {
    "torch": {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "max_v"},
    "apex": {"exp_avg": "m", "exp_avg_sq": "v"},
    "bitsandbytes": {"state1": "m", "state2": "v"},
}
_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts what FSDP should not gather


def _torch(foreign: Any, optimizer: Adam, layout: str) -> Found:
    _checks.same_keys("foreign", foreign, ("state", "param_groups"))
    states = _mapping('foreign["state"]', foreign["state"])
    groups, have = foreign["param_groups"], len(optimizer.param_groups)
    if not isinstance(groups, list | tuple) or len(groups) != have:
        raise ValueError(f'foreign["param_groups"] should be a list of {have}, got {_checks.kind(groups)}')
    found = Found([], [], [])
    for k, (theirs, ours, index) in enumerate(zip(groups, optimizer.param_groups, optimizer._index, strict=True)):
        path = f'foreign["param_groups"][{k}]'
        numbers = _mapping(path, theirs).get("params", [])
        if len(numbers) != len(index):
            raise ValueError(f"{path} has {len(numbers)} parameters but the optimizer's has {len(index)}")
        if theirs.get("decoupled_weight_decay", optimizer._decoupled) != optimizer._decoupled:
            wanted = "Adam" if optimizer._decoupled else "AdamW"
            raise ValueError(f"{path} is of {wanted}; make the optimizer fused_adam.{wanted}")
        if not theirs.get("bias_correction", True) and ours["numerics"] != "mlx":
            raise ValueError(f'{path} has bias_correction=False; make the optimizer with numerics="mlx"')
        found.hyperparameters.append({name: theirs[name] for name in optimizer._names if name in theirs})
        if layout == "apex":
            found.t.append((f'{path}["step"]', theirs.get("step")))
        for number in numbers:
            name = f'foreign["state"][{number}]'
            if number not in states:
                raise ValueError(
                    f"{name} is missing: this parameter has done no step; convert the others by themselves"
                )
            state = dict(_mapping(name, states[number]))
            state |= state.pop(_WRAPPED, {})
            if layout == "bitsandbytes" and "qmap1" in state:
                raise ValueError(f"{name} has 8-bit states; only 32-bit states (optim_bits=32) are converted")
            if layout != "apex":
                found.t.append((f'{name}["step"]', state.pop("step", None)))
            keys = [key for key in _TORCH[layout] if key in state or _TORCH[layout][key] != "max_v"]
            _checks.same_keys(name, state, keys)
            found.states.append({_TORCH[layout][key]: (f'{name}["{key}"]', state[key]) for key in keys})
    return found


# --- TensorFlow 1 and Keras 3 -----------------------------------------------------------------------------------------


def _tf(foreign: Any, optimizer: Adam, names: Any, t: int | None) -> Found:
    _mapping("foreign", foreign)
    trees = optimizer._trees
    chosen = [n for _, n in _matched(names, optimizer, "names")] if names is not None else list(_joined(trees, ()))
    states = []
    for name in chosen:
        slots = {"m": f"{name}/Adam", "v": f"{name}/Adam_1"}
        for slot in slots.values():
            if slot not in foreign:
                raise ValueError(f'foreign["{slot}"] is missing; pass names=, the names of the parameters')
        states.append({key: (f'foreign["{slot}"]', foreign[slot]) for key, slot in slots.items()})
    return Found([_tf_steps(foreign, optimizer)] if t is None else [], states, [{} for _ in trees])


def _joined(tree: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """The keys on the way to each array of the groups' trees, without the number of the group, joined by "/"."""
    if isinstance(tree, Mapping | list | tuple):
        for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _joined(child, (*keys, str(key)))
    else:
        yield "/".join(keys[1:])


def _tf_steps(foreign: Mapping[str, Any], optimizer: Adam) -> Named:
    """TensorFlow keeps beta**(t + 1) in float32, multiplied up step by step, until it vanishes."""
    found = {}
    for name, beta in zip(("beta1_power", "beta2_power"), optimizer.param_groups[0]["betas"], strict=True):
        power = _host(f'foreign["{name}"]', foreign.get(name, np.float32(0)))
        base = power.dtype.type(beta)  # as it is kept there: 0.999 in float32 is a step in a hundred thousand off
        if power.size == 1 and power >= np.finfo(np.float32).tiny and 0 < base < 1:
            found[name] = math.log(power.item()) / math.log(base) - 1
    done = {round(t) for t in found.values()}
    if len(done) > 1 or any(abs(t - round(t)) > 0.2 for t in found.values()):
        raise ValueError(f"foreign says t = {found}, no count; give the optimizer TensorFlow's betas, or pass t=")
    if found:
        return "t of the beta powers", done.pop()
    if "global_step" in foreign:
        return 'foreign["global_step"]', foreign["global_step"]
    raise ValueError("beta1_power and beta2_power are missing or have vanished; pass t=, the number of steps done")


def _keras(foreign: Any, optimizer: Adam) -> Found:
    if not isinstance(foreign, Mapping | list | tuple):
        raise TypeError(f"foreign should be a list or dict of variables, got {_checks.kind(foreign)}")
    variables = foreign if isinstance(foreign, Mapping) else {str(k): a for k, a in enumerate(foreign)}
    _checks.same_keys("foreign", variables, map(str, range(len(variables))))
    values = [(f"foreign[{k}]", variables[str(k)]) for k in range(len(variables))]
    wanted = [optimizer._parts[k].states for index in optimizer._index for k, _ in index]
    extra = [k for k, keys in enumerate(wanted) if "max_v" in keys]
    size = 1 + 2 * len(wanted) + len(extra)
    if len(values) - size not in (0, 1):
        raise ValueError(
            f"foreign has {len(values)} variables but should have {size + 1}: iteration, learning_rate, "
            f"momentum and velocity of each parameter{', then velocity_hat of each' if extra else ''}"
        )
    moments = iter(values[len(values) - size + 1 :])
    states = [{"m": next(moments), "v": next(moments)} for _ in wanted]
    for k in extra:
        states[k]["max_v"] = next(moments)
    # a learning rate that a schedule computes is no variable
    lr = {"lr": values[1][1]} if len(values) > size else {}
    return Found([values[0]], states, [dict(lr) for _ in optimizer.param_groups])


# --- optax and MLX ----------------------------------------------------------------------------------------------------

_OPTAX = {"ScaleByAdamState": {"mu": "m", "nu": "v"}, "ScaleByAmsgradState": {"mu": "m", "nu": "v", "nu_max": "max_v"}}


def _optax(foreign: Any, optimizer: Adam) -> Found:
    found = list(_in_chain(foreign, "foreign"))
    if len(found) != 1:
        raise ValueError(
            f"foreign should hold one {' or '.join(_OPTAX)}, alone or in the tuples of optax.chain; it has {len(found)}"
        )
    path, state = found[0]
    fields = _OPTAX[type(state).__name__]
    trees = [_matched(getattr(state, field), optimizer, f"{path}.{field}") for field in fields]
    states = [dict(zip(fields.values(), row, strict=True)) for row in zip(*trees, strict=True)]
    return Found([(f"{path}.count", state.count)], states, [{} for _ in optimizer.param_groups])


def _in_chain(node: Any, path: str) -> Iterator[Named]:
    if type(node).__name__ in _OPTAX:
        yield path, node
    elif type(node) in (tuple, list):
        for k, child in enumerate(node):
            yield from _in_chain(child, f"{path}[{k}]")


def _mlx(foreign: Any, optimizer: Adam) -> Found:
    if "step" not in _mapping("foreign", foreign):
        raise ValueError(f'foreign has no "step"; pass the whole state of the optimizer, not {list(foreign)}')
    tree = {key: child for key, child in foreign.items() if key not in ("step", "learning_rate")}
    trees = [_matched(_moment(tree, key, "foreign"), optimizer, "foreign") for key in ("m", "v")]
    states = [{"m": (f'{path}["m"]', m), "v": (f'{path}["v"]', v)} for (path, m), (_, v) in zip(*trees, strict=True)]
    lr = {"lr": foreign["learning_rate"]} if "learning_rate" in foreign else {}
    return Found([('foreign["step"]', foreign["step"])], states, [dict(lr) for _ in optimizer.param_groups])


def _moment(tree: Any, key: str, path: str) -> Any:
    """The tree of one moment: MLX has {"m": ..., "v": ...} in each parameter's place."""
    if isinstance(tree, Mapping):
        if tree.keys() == {"m", "v"} and not isinstance(tree["m"], Mapping | list | tuple):
            return tree[key]
        return {name: _moment(child, key, f'{path}["{name}"]') for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_moment(child, key, f"{path}[{k}]") for k, child in enumerate(tree)]
    raise ValueError(f'{path} should be a dict with "m" and "v", got {_checks.kind(tree)}')


LAYOUTS: dict[str, Callable[..., Found]] = {
    "torch": partial(_torch, layout="torch"),
    "apex": partial(_torch, layout="apex"),
    "bitsandbytes": partial(_torch, layout="bitsandbytes"),
    "tf": _tf,
    "keras": _keras,
    "optax": _optax,
    "mlx": _mlx,
}
