"""The optimizer classes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Unpack

from fused_adam import _coefficients
from fused_adam._base import Optimizer
from fused_adam._codegen import bind
from fused_adam._guard import Options
from fused_adam._update import Update


def _update(rule: str, group: Mapping[str, Any], formula: str, arguments: tuple[float, ...], l2: float = 0.0) -> Update:
    """A built-in rule behind the preludes that a group asks for; a decay of 0 leaves its term out (0 * inf is NaN)."""
    preludes = (("maximize",) if group["maximize"] else ()) + (("l2",) if l2 else ())
    constants = {"ascent": -1.0, "wd": l2, "zero": 0.0}
    return Update(
        bind(rule, preludes), getattr(_coefficients, formula), _coefficients.FORMULAS[formula], arguments, constants
    )


class SGD(Optimizer):
    """Gradient descent, with momentum, dampening and Nesterov's look-ahead, as ``torch.optim.SGD``.

    With g the gradient plus ``weight_decay * p``::

        m = momentum * m + (1 - dampening) * g        the first gradient enters whole
        p = p - lr * m                                lr * (g + momentum * m) with nesterov; lr * g without momentum

    Args:
        params: an array, a FlatBuffer, dicts, lists and tuples of arrays nested as they like, or a list of group dicts
            ``{"params": ..., "lr": ...}``. Arrays are float32 or float64, C- or Fortran-contiguous and writable, all
            in host memory (NumPy) or all on one GPU (CuPy, Numba, or anything with ``__cuda_array_interface__`` or
            DLPack); they are updated in place. Also float16 or bfloat16, computed in float32; on a GPU with CuPy.
        lr: learning rate, >= 0.
        momentum: >= 0. dampening: any number. nesterov: needs momentum > 0 and dampening = 0.
        weight_decay: L2 penalty, >= 0.
        maximize: ascend.
        backend: "auto", or one of the names in `backends()`.
        per_row_step: each row of a parameter, along its first axis, counts its own steps, so that one which moves
            rarely (see SparseGrad, and mask in `step`) starts like any other.
        skip_nonfinite: a step of which any gradient is inf or NaN, once it is unscaled, is skipped: p, the states and
            t stay as they were.
        max_grad_norm: where the global norm of all gradients, unscaled, exceeds it they are multiplied by
            max_grad_norm / norm. The norm has the same bits on every backend. Squares are summed in float64: for
            float64 gradients beyond 1e154 it is inf, and the factor 0, though skip_nonfinite lets these pass.
        zero_grads: gradients are zeroed in the same pass, and in a step that is skipped.
        count_unmoved: count what `last_stats` calls unmoved.
        device_scalars: for parameters on a GPU (CuPy), keep t, the learning rate and all that follows from them there,
            so that a step can be captured in a CUDA graph and replayed. On the host nothing changes.
        master: beside parameters of 16 bits, what their step is computed from: "float32", of which they are the rounded
            copies; or for bfloat16 "split16", their other 16 bits, or with states of fewer than 32 bits "split8", 8 of
            these. By default a step is computed from themselves.
        state_dtype: "float32" (the default; for float64 parameters float64), "bfloat16", or for Adam and AdamW "int8".
        stochastic_rounding: round what is kept in 16 bits, parameters without a master and states, up or down at random
            so that the mean is exact. The random bits depend on seed, t and the element's place among the parameters.
        seed: an int from 0 to 2**63 - 1.
        dtype: "bfloat16" says that uint16 arrays hold that. (Arrays of ml_dtypes' bfloat16 say it themselves.)

    Raises:
        TypeError, ValueError: an array or a number is wrong; the message names it.
        RuntimeError: the named backend cannot run here.

    References: Polyak 1964; Nesterov 1983; Sutskever et al., ICML 2013.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, hyperparameters, **options)

    def _check(self, group: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._check(group)
        if checked["nesterov"] and (checked["momentum"] == 0 or checked["dampening"] != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        return checked

    def _update(self, group: Mapping[str, Any]) -> Update:
        arguments = group["lr"], group["momentum"], group["dampening"]
        rule = "nesterov" if group["nesterov"] else "momentum" if group["momentum"] else "sgd"
        return _update(rule, group, "momentum", arguments, group["weight_decay"])


class Adagrad(Optimizer):
    """Adagrad, as ``torch.optim.Adagrad``.

    With g the gradient plus ``weight_decay * p``::

        v = v + g**2                                  from initial_accumulator_value
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(v) + eps)

    Args: as `SGD`, and lr_decay, initial_accumulator_value and eps, all >= 0.

    Reference: Duchi, Hazan & Singer, JMLR 2011.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, hyperparameters, **options)

    def _initial(self, group: Mapping[str, Any], state: str) -> float:
        return float(group["initial_accumulator_value"])

    def _update(self, group: Mapping[str, Any]) -> Update:
        arguments = group["lr"], group["lr_decay"], group["eps"]
        return _update("adagrad", group, "adagrad", arguments, group["weight_decay"])


class RMSprop(Optimizer):
    """RMSProp, as ``torch.optim.RMSprop``.

    With g the gradient plus ``weight_decay * p``::

        v = alpha * v + (1 - alpha) * g**2
        a = alpha * a + (1 - alpha) * g               only if centered; v - a**2 then stands for v below
        m = momentum * m + g / (sqrt(v) + eps)        only with momentum
        p = p - lr * m                                lr * g / (sqrt(v) + eps) without momentum

    Args: as `SGD`, and alpha in [0, 1), eps >= 0, momentum >= 0, centered.

    References: Tieleman & Hinton 2012, lecture 6.5; Graves 2013, eq. 38 to 45 (centered).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        super().__init__(params, hyperparameters, **options)

    def _update(self, group: Mapping[str, Any]) -> Update:
        arguments = group["lr"], group["alpha"], group["momentum"], group["eps"]
        rule = "rmsprop" + ("_centered" if group["centered"] else "") + ("_momentum" if group["momentum"] else "")
        return _update(rule, group, "rmsprop", arguments, group["weight_decay"])


class Adam(Optimizer):
    """Adam, as ``torch.optim.Adam``, or in another library's form.

    With g the gradient plus ``weight_decay * p`` and t from 1::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2            the largest v so far stands below with amsgrad
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    computed with the bias corrections folded into lr and eps; see `_rules.adam` for the exact order.

    ``numerics`` names the library whose formula to follow, so that its runs can be carried over (see
    `fused_adam.checkpoint`). Defaults stay ours; what is not said is as above. With q1 and q2 the corrections
    ``1 - beta1**t`` and ``1 - beta2**t``::

        "torch"         the formula above
        "apex"          the same, with L2 as its adam_w_mode=False; no amsgrad
        "tf"            lr * sqrt(q2) / q1 * m / (sqrt(v) + eps): TensorFlow 1; no amsgrad
        "keras"         the same, with amsgrad. Keras' eps is 1e-7, and its weight_decay is that of `AdamW`
        "optax"         lr * (m / q1) / (sqrt(v / q2 + eps_root) + eps); amsgrad takes the largest v / q2
        "bitsandbytes"  as above, then ``p = p - lr * weight_decay * p``, for `Adam` too: its CUDA kernels as of 0.50.1
                        (the other backends decay first, as `AdamW` with "torch"); no amsgrad
        "mlx"           lr * m / (sqrt(v) + eps): MLX's default; with its bias_correction=True it is "torch"; no amsgrad

    Args: as `SGD`, and betas, both in [0, 1), eps >= 0, amsgrad, numerics, and eps_root >= 0, for "optax" only.

    References: Kingma & Ba, ICLR 2015, algorithm 1; Reddi, Kale & Kumar, ICLR 2018 (amsgrad).
    """

    _decoupled = False
    _later = MappingProxyType({"numerics": "torch", "eps_root": 0.0})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        numerics: str = "torch",
        eps_root: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "numerics": numerics,
            "eps_root": eps_root,
        }
        super().__init__(params, hyperparameters, **options)

    def _check(self, group: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._check(group)
        numerics = checked["numerics"]
        if checked["amsgrad"] and numerics not in _WITH_AMSGRAD:
            raise ValueError(f'numerics="{numerics}" has no amsgrad; {", ".join(_WITH_AMSGRAD)} have it')
        if checked["eps_root"] and numerics != "optax":
            raise ValueError(f'eps_root is for numerics="optax", not "{numerics}"; leave it at 0')
        return checked

    def _update(self, group: Mapping[str, Any]) -> Update:
        return adam(group, self._decoupled)


_WITH_AMSGRAD = ("torch", "keras", "optax")


def adam(group: Mapping[str, Any], decoupled: bool) -> Update:
    """`Adam` or `AdamW` by the formula of the library that `numerics` names."""
    numerics, amsgrad = group["numerics"], group["amsgrad"]
    weight_decay, eps_root = group["weight_decay"], group["eps_root"]
    arguments = (group["lr"], *group["betas"], group["eps"], weight_decay)
    form, formula = "", _FORMULAS.get(numerics, "adamw")
    if numerics == "bitsandbytes":
        decoupled = True
        form = "_after" if weight_decay else ""
    elif numerics == "optax" and amsgrad:
        form, formula, arguments = "_hat", "amsgradw_hat", (*arguments, eps_root)
    elif eps_root:
        form, formula, arguments = "_root", "adamw_root", (*arguments, eps_root)
    rule = ("amsgrad" if amsgrad else "adam") + ("w" if decoupled and weight_decay else "") + form
    return _update(rule, group, formula, arguments, 0.0 if decoupled else weight_decay)


_FORMULAS = {"tf": "eps_hat", "keras": "eps_hat", "mlx": "uncorrected"}


class AdamW(Adam):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``.

    As `Adam`, but the decay does not enter the gradient: ``p`` also loses ``lr * weight_decay * p`` of the old p, in
    every ``numerics`` but "bitsandbytes", where it is of the new p. (TensorFlow 1's own AdamWOptimizer leaves lr out.)

    Reference: Loshchilov & Hutter, ICLR 2019, algorithm 2.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        numerics: str = "torch",
        eps_root: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize,
            numerics=numerics,
            eps_root=eps_root,
            **options,
        )


class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    ::

        p = p - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    Args: as `SGD`, and betas, both in [0, 1).

    Reference: Chen et al., NeurIPS 2023, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, hyperparameters, **options)

    def _update(self, group: Mapping[str, Any]) -> Update:
        arguments = (group["lr"], *group["betas"], group["weight_decay"])
        return _update("lionw" if group["weight_decay"] else "lion", group, "lion", arguments)
