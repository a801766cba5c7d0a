"""The optimizer classes for torch: torch's own, but for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

import fused_adam
from fused_adam import _base
from fused_adam.torch._base import FusedOptimizer, Options
from fused_adam.torch._members import Family


class SGD(FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with the step of `fused_adam.SGD`. Args: as torch's, and those of `AdamW` in this module."""

    _flat_class = fused_adam.SGD
    _family = Family({"m": "momentum_buffer"}, counted=False)
    _names = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_up(**options)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with the step of `fused_adam.Adagrad`. Args: as torch's, and those of `AdamW`."""

    _flat_class = fused_adam.Adagrad
    _family = Family({"v": "sum"})
    _names = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_up(**options)

    def _initial(self, p: Tensor) -> complex:
        value = float(self.defaults["initial_accumulator_value"])  # as in torch, whatever a group says
        return complex(value, value) if p.is_complex() else value


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` with the step of `fused_adam.RMSprop`. Args: as torch's, and those of `AdamW`.

    alpha is below 1; torch takes 1 too.
    """

    _flat_class = fused_adam.RMSprop
    _family = Family({"v": "square_avg", "a": "grad_avg", "m": "momentum_buffer"})
    _names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._set_up(**options)


class _AnyAdam(FusedOptimizer):
    _family = Family({"m": "exp_avg", "v": "exp_avg_sq", "max_v": "max_exp_avg_sq"})
    _names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")

    def _class_for(self, group: Mapping[str, Any]) -> type[_base.Optimizer]:
        return fused_adam.AdamW if group["decoupled_weight_decay"] else fused_adam.Adam


class Adam(_AnyAdam, torch.optim.Adam):
    """``torch.optim.Adam`` with the step of `fused_adam.Adam`. Args: as torch's, and those of `AdamW`."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_up(**options)


class AdamW(_AnyAdam, torch.optim.AdamW):
    """``torch.optim.AdamW`` with the step of `fused_adam.AdamW`: one pass over all parameters of all groups.

    Args:
        params: float32, float64, complex64, complex128, bfloat16 or float16 parameters in host memory or, with CuPy, on
            GPUs, without gaps in it, or groups of them, as torch takes them.
        lr, betas, eps, weight_decay, amsgrad, maximize: as torch's.
        foreach, fused: taken as torch takes them, and of no effect: every step is fused.
        capturable: keep t and the learning rate on the GPU, so that a captured step is the next one at each replay; see
            `prepare`. Needs parameters on a GPU, and CuPy.
        differentiable: refused unless False.
        flat: parameters, gradients and states are moved into a buffer each, for each dtype. It makes many small
            parameters faster. To change a state then, write into it or put another in its place: not to its `.data`.
            `zero_grad` then zeroes gradients instead of taking them away, so that parameters which a loss does not
            reach are stepped with zeros: their moments and weights decay.
        backend: "auto" or a name; see `fused_adam.backends()`.
        amp_scaling: let ``torch.amp.GradScaler.step`` leave unscaling to the step, which does it in the same pass. Off
            by default, for code that clips between the two would clip scaled gradients.
        max_grad_norm, skip_nonfinite, zero_grads, count_unmoved: as those of `fused_adam.AdamW`; with `last_stats`. Of
            the parameters that have a gradient, which have to be on one device for the first two.
        state_dtype: "float32", "bfloat16" or "int8", as of `fused_adam.AdamW`. By default that of the parameter, as in
            torch; of float16 parameters, and where there is a master, float32. States of a loaded run stay as they are.
        master, stochastic_rounding, seed: as of `fused_adam.AdamW`; parameters of 32 and 64 bits have no use for them,
            and stay as they are. In the state stand `master`, in float32, or `master_low`, the bits beside those of the
            parameter; it starts from the parameter: to change parameters then, change it too, or delete it. 8-bit
            states are `exp_avg_codes`, `exp_avg_sq_codes` and `scales`, two of int16 for each 64 elements. SGD has a
            `step` with stochastic_rounding.

    Raises:
        TypeError, ValueError: an argument is wrong, in torch's words where torch refuses it.

    >>> import torch
    >>> from fused_adam.torch import AdamW
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = AdamW([w], lr=0.1, weight_decay=0.0)
    >>> (w**2).sum().backward()
    >>> opt.step()
    >>> [round(x, 6) for x in w.tolist()]
    [0.9, 1.9]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_up(**options)


class Lion(FusedOptimizer):
    """`fused_adam.Lion` as a ``torch.optim.Optimizer``; torch has none. Args: those of `fused_adam.Lion` and `AdamW`.

    Its state is `step` and `exp_avg`.
    """

    _flat_class = fused_adam.Lion
    _family = Family({"m": "exp_avg"})
    _names = ("lr", "betas", "weight_decay", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
        self._set_up(**options)
