"""Other libraries' Adam over a tree of parameters: the packages, or NumPy after the sources of those that want a GPU.

Each has `step(grads)`, `params()` in the order of the leaves, and `state()`: what `fused_adam.checkpoint` converts.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from conftest import require

from fused_adam._layout import leaves, match, rebuild

Hyper = dict[str, Any]
DEFAULTS: Hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


def arrays(tree: Any) -> list[Any]:
    return [a for _, a in leaves(tree, "")]


def _jax() -> Any:
    """In float64. On a CPU it may keep the very memory of an array that it is given, which our step then writes to."""
    jax = require("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


class Torch:
    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        torch = require("torch")
        self._make = torch.tensor
        self._tensors = [torch.tensor(p, requires_grad=True) for p in arrays(tree)]
        self.optimizer = getattr(torch.optim, name)(self._tensors, **DEFAULTS | hyper)

    def step(self, grads: Any) -> None:
        for tensor, g in zip(self._tensors, arrays(grads), strict=True):
            tensor.grad = self._make(g)
        self.optimizer.step()

    def params(self) -> list[Any]:
        return [tensor.detach().numpy().copy() for tensor in self._tensors]

    def state(self) -> Any:
        return self.optimizer.state_dict()


class Optax:
    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        jax, self._optax = _jax(), require("optax")
        h = DEFAULTS | hyper
        b1, b2 = h["betas"]
        numbers = {"b1": b1, "b2": b2, "eps": h["eps"], "eps_root": h.get("eps_root", 0.0)}
        decay = self._optax.add_decayed_weights(h["weight_decay"])
        amsgrad = self._optax.amsgrad if h["amsgrad"] else self._optax.adam
        if name == "Adam":
            made = self._optax.chain(decay, amsgrad(h["lr"], **numbers))
        elif h["amsgrad"]:
            scaled = self._optax.scale_by_amsgrad(**numbers)
            made = self._optax.chain(scaled, decay, self._optax.scale(-h["lr"]))
        else:
            made = self._optax.adamw(h["lr"], **numbers, weight_decay=h["weight_decay"])
        self._made, self._like = made, tree
        self._tree = jax.tree.map(jax.numpy.array, tree)
        self._state = made.init(self._tree)

    def step(self, grads: Any) -> None:
        updates, self._state = self._made.update(grads, self._state, self._tree)
        self._tree = self._optax.apply_updates(self._tree, updates)

    def params(self) -> list[Any]:
        return [np.array(a) for a in match(self._tree, self._like, "")]  # JAX sorts the keys of dicts

    def state(self) -> Any:
        return self._state


class Keras:
    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        _jax()
        os.environ |= {"KERAS_BACKEND": "jax", "KERAS_HOME": os.devnull}  # it would write to ~/.keras
        keras = require("keras")
        keras.config.set_floatx("float64")
        h = DEFAULTS | hyper
        b1, b2 = h["betas"]
        self._variables = [keras.Variable(p.copy(), dtype=str(p.dtype)) for p in arrays(tree)]
        decay = {"weight_decay": h["weight_decay"]} if name == "AdamW" else {}
        self.optimizer = getattr(keras.optimizers, name)(
            learning_rate=h["lr"], beta_1=b1, beta_2=b2, epsilon=h["eps"], amsgrad=h["amsgrad"], **decay
        )
        self.optimizer.build(self._variables)
        self._make = keras.ops.convert_to_tensor

    def step(self, grads: Any) -> None:
        self.optimizer.apply([self._make(g) for g in arrays(grads)], self._variables)

    def params(self) -> list[Any]:
        return [np.asarray(variable).copy() for variable in self._variables]

    def state(self) -> Any:
        store: dict[str, Any] = {}
        with warnings.catch_warnings():  # Keras 3.15 reads its variables in a way that NumPy 2 frowns upon
            warnings.simplefilter("ignore", DeprecationWarning)
            self.optimizer.save_own_variables(store)
        return store


class Mlx:
    """Its learning rate is kept in float32, whatever the parameters are."""

    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        self._mx, optimizers = require("mlx.core"), require("mlx.optimizers")
        self._mx.set_default_device(self._mx.cpu)
        h = DEFAULTS | hyper
        decay = {"weight_decay": h["weight_decay"]} if name == "AdamW" else {}
        self.optimizer = getattr(optimizers, name)(h["lr"], betas=list(h["betas"]), eps=h["eps"], **decay)
        self._tree = self._own(tree)
        self.optimizer.init(self._tree)

    def _own(self, tree: Any) -> Any:
        return rebuild(tree, lambda a: self._mx.array(a, dtype=getattr(self._mx, str(a.dtype))))

    def step(self, grads: Any) -> None:
        self._tree = self.optimizer.apply_gradients(self._own(grads), self._tree)
        self._mx.eval(self._tree, self.optimizer.state)

    def params(self) -> list[Any]:
        return [np.array(a) for a in arrays(self._tree)]

    def state(self) -> Any:
        return self.optimizer.state


class Reference(ABC):
    """What the libraries' sources say, with the operations in their order. Subclasses have `update` and `state`."""

    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        self.h = DEFAULTS | hyper
        self.decoupled = name == "AdamW"
        self.t = 0
        self.names = ["/".join(path.strip('[]"').split('"]["')) for path, _ in leaves(tree, "")]
        self._params = [p.copy() for p in arrays(tree)]
        self.m, self.v = ([np.zeros_like(p) for p in self._params] for _ in "mv")

    def step(self, grads: Any) -> None:
        self.t += 1
        b1, b2 = self.h["betas"]
        for k, (p, g) in enumerate(zip(self._params, arrays(grads), strict=True)):
            g = self.gradient(p, g)
            self.m[k] = b1 * self.m[k] + (1 - b1) * g
            self.v[k] = b2 * self.v[k] + (1 - b2) * g * g
            self._params[k] = self.update(p, self.m[k], self.v[k], 1 - b1**self.t, 1 - b2**self.t, self.h["lr"])

    def gradient(self, p: Any, g: Any) -> Any:
        return g if self.decoupled else g + self.h["weight_decay"] * p

    @abstractmethod
    def update(self, p: Any, m: Any, v: Any, q1: float, q2: float, lr: float) -> Any:
        """The new parameter. q1, q2: 1 - beta1**t and 1 - beta2**t."""

    def params(self) -> list[Any]:
        return [np.array(p) for p in self._params]

    def _groups(self, **more: Any) -> list[dict[str, Any]]:
        h = {key: self.h[key] for key in ("lr", "betas", "eps", "weight_decay")}
        return [{**h, **more, "params": list(range(len(self.m)))}]


class Apex(Reference):
    """FusedAdam, multi_tensor_adam.cu: ADAM_MODE_0 is L2 (adam_w_mode=False), ADAM_MODE_1 decoupled."""

    def update(self, p: Any, m: Any, v: Any, q1: float, q2: float, lr: float) -> Any:
        update = (m / q1) / (np.sqrt(v / q2) + self.h["eps"])
        return p - lr * (update + self.h["weight_decay"] * p if self.decoupled else update)

    def state(self) -> Any:
        moments = [{"exp_avg": m, "exp_avg_sq": v} for m, v in zip(self.m, self.v, strict=True)]
        return {"state": dict(enumerate(moments)), "param_groups": self._groups(bias_correction=True, step=self.t)}


class Bitsandbytes(Reference):
    """kOptimizer32bit2State in csrc/kernels.cu, for Adam and AdamW alike."""

    wrapped = True  # since 0.49 its moments are hidden from FSDP

    def gradient(self, p: Any, g: Any) -> Any:
        return g

    def update(self, p: Any, m: Any, v: Any, q1: float, q2: float, lr: float) -> Any:
        p = p + (-lr * np.sqrt(q2) / q1) * (m / (np.sqrt(v) + self.h["eps"] * np.sqrt(q2)))
        return p * (1 - lr * self.h["weight_decay"])

    def state(self) -> Any:
        moments = [{"state1": m, "state2": v} for m, v in zip(self.m, self.v, strict=True)]
        if self.wrapped:
            moments = [{"__bnb_optimizer_quant_state__": both} for both in moments]
        states = {k: {"step": self.t, **both} for k, both in enumerate(moments)}
        return {"state": states, "param_groups": self._groups(alpha=0.0, t_alpha=None, t_beta3=None)}


class TensorFlow(Reference):
    """AdamOptimizer of TensorFlow 1, training_ops ApplyAdam; the L2 penalty is the loss's, the decay is ours."""

    def __init__(self, name: str, tree: Any, hyper: Hyper) -> None:
        super().__init__(name, tree, hyper)
        self.powers = np.array(self.h["betas"], np.float32)

    def step(self, grads: Any) -> None:
        super().step(grads)
        self.powers *= np.array(self.h["betas"], np.float32)

    def update(self, p: Any, m: Any, v: Any, q1: float, q2: float, lr: float) -> Any:
        if self.decoupled:
            p = p - lr * self.h["weight_decay"] * p
        return p - (lr * np.sqrt(q2) / q1) * m / (np.sqrt(v) + self.h["eps"])

    def state(self) -> Any:
        both = zip(self.names, self._params, self.m, self.v, strict=True)
        slots = {
            name + slot: a for name, *three in both for slot, a in zip(("", "/Adam", "/Adam_1"), three, strict=True)
        }
        return {**slots, "beta1_power": self.powers[0], "beta2_power": self.powers[1]}


PEERS: dict[str, Any] = {
    "torch": Torch,
    "tf": TensorFlow,
    "keras": Keras,
    "apex": Apex,
    "optax": Optax,
    "bitsandbytes": Bitsandbytes,
    "mlx": Mlx,
}
