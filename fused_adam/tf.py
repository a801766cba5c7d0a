"""TensorFlow 1's AdamOptimizer for arrays: its interface, its formula and its one step count, without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fused_adam import _checks, _numbers
from fused_adam._tf_variables import Together, Variables
from fused_adam.backends import DeferredInterrupt, check_name

Number = float | Callable[[], float]


class AdamOptimizer:
    """Adam as ``tf.train.AdamOptimizer`` of TensorFlow 1, over arrays that are updated in place.

    With t the number of this step, from 1::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - learning_rate * sqrt(1 - beta2**t) / (1 - beta1**t) * m / (sqrt(v) + epsilon)

    so that epsilon is not scaled by the bias correction ("epsilon hat"), unlike in `fused_adam.Adam`, of which it is
    ``numerics="tf"``. As in TensorFlow there is one t, for all variables: that of one which first comes at the fifth
    step is 5, although its m and v start from 0. The powers of the betas are computed without TensorFlow's rounding.
    The variables of one call are stepped in one pass, or, if anything is wrong with any of them, not at all.

    Args:
        learning_rate: >= 0. beta1, beta2: in [0, 1). epsilon: >= 0. Each a number, or a callable of no arguments that
            is asked for it at every step, and when the state is saved; also attributes, which may be changed between
            steps. (While a beta changes, TensorFlow multiplies what it was at each step; here it is the power of what
            it is now.)
        use_locking: TensorFlow's, for threads that update one variable at once. It changes nothing here: a step is
            never torn by an error or Ctrl-C, and steps from several threads have to be locked by them.
        name: what messages and ``repr`` call it.
        backend: "auto", or one of the names in `fused_adam.backends()`.

    Raises:
        TypeError, ValueError: a number is wrong.

    References: Kingma & Ba, ICLR 2015, end of section 2; TensorFlow 1.x, ``tf.train.AdamOptimizer``.

    >>> import numpy as np
    >>> from fused_adam.tf import AdamOptimizer
    >>> w = np.array([1.0, 2.0])
    >>> AdamOptimizer(0.1).minimize(lambda: (float((w**2).sum()), [2 * w]), [w])
    5.0
    >>> w.round(6).tolist()
    [0.9, 1.9]
    """

    def __init__(
        self,
        learning_rate: Number = 0.001,
        beta1: Number = 0.9,
        beta2: Number = 0.999,
        epsilon: Number = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
        *,
        backend: str = "auto",
    ) -> None:
        self.learning_rate = learning_rate
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon
        self.use_locking = _numbers.flag("use_locking", use_locking)
        if not isinstance(name, str):
            raise TypeError(f"name should be a string, got {name!r}")
        self.name = name
        self.backend = check_name(backend)  # what "auto" chose, once there was a step
        self.t = 0  # the number of steps done
        self._known = Variables(backend)
        for number, check in _NUMBERS.items():
            given = getattr(self, number)
            if not callable(given):
                check(number, given)

    # --- the step -----------------------------------------------------------------------------------------------------

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], global_step: Any = None, name: str | None = None
    ) -> None:
        """Update variables and their slots in place.

        Args:
            grads_and_vars: (gradient, variable) pairs in any order, each variable at most once, and not always the
                same ones. A variable is a float32 or float64 array, C- or Fortran-contiguous and writable, in host
                memory or on a GPU as in `fused_adam.Adam`; it is known by the object, so pass the same one each time.
                Its gradient is an array of its shape and dtype, or a SparseGrad; a pair with None is left out.
            global_step: a NumPy array of one integer, which becomes 1 more.
            name: what the message calls this step where there are no gradients; the optimizer's name by default.

        Raises:
            TypeError, ValueError: something is wrong with one of these, or with a number of the optimizer's.
            RuntimeError: the backend cannot run here. In all cases nothing is changed: no variable, no slot, not t.
        """
        pairs = {}
        for n, pair in enumerate(grads_and_vars):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"grads_and_vars[{n}] should be a (gradient, variable) pair, got {_checks.kind(pair)}")
            if pair[0] is not None:
                pairs[n] = pair
        if not pairs:
            raise ValueError(f"{name or self.name}: no variable has a gradient; pass at least one that is not None")
        _check_global_step(global_step)
        together = self._together({n: v for n, (_, v) in pairs.items()})
        done: Any = None if global_step is None else global_step + np.ones((), global_step.dtype)
        with DeferredInterrupt():
            self._keep(together, together.apply_gradients, pairs.values())
            if global_step is not None:
                np.copyto(global_step, done)

    def minimize(
        self,
        loss_and_grads: Callable[[], tuple[Any, Sequence[Any]]],
        var_list: Sequence[Any],
        global_step: Any = None,
        name: str | None = None,
    ) -> Any:
        """Ask for the loss and the gradients, apply these, and return the loss (of before the step).

        Args:
            loss_and_grads: a callable of no arguments that returns the loss, which is passed on as it is, and a list or
                tuple of gradients in the order of var_list; there is no graph to derive them from.
            var_list, global_step, name: as in `apply_gradients`.

        Raises: as `apply_gradients`.
        """
        if not callable(loss_and_grads):
            fix = "pass a function that returns (loss, gradients)"
            raise TypeError(f"loss_and_grads should be callable, got {_checks.kind(loss_and_grads)}; {fix}")
        found = loss_and_grads()
        if not isinstance(found, tuple | list) or len(found) != 2 or not isinstance(found[1], tuple | list):
            raise TypeError(f"loss_and_grads should return (loss, list of gradients), got {_checks.kind(found)}")
        loss, grads = found
        if len(grads) != len(var_list):
            raise ValueError(f"loss_and_grads gave {len(grads)} gradients for the {len(var_list)} of var_list")
        self.apply_gradients(zip(grads, var_list, strict=True), global_step, name)
        return loss

    def prepare(self, var_list: Sequence[Any]) -> None:
        """Make the slots, and compile and allocate, now instead of at the first step over these variables."""
        together = self._together(dict(enumerate(var_list)))
        self._keep(together, together.prepare)

    def _together(self, variables: Mapping[int, Any]) -> Together:
        """What steps these variables, which are numbered as the caller did, at the numbers of now."""
        given = {name: getattr(self, name) for name in _NUMBERS}
        values = {name: _NUMBERS[name](name, x() if callable(x) else x) for name, x in given.items()}
        together = self._known.together(variables)
        betas = (values["beta1"], values["beta2"])
        together.param_groups[0].update(lr=values["learning_rate"], betas=betas, eps=values["epsilon"])
        together._t[0] = self.t
        return together

    def _keep(self, together: Together, call: Callable[..., None], *arguments: Any) -> None:
        """Do something with these variables, and know them from then on unless it fails. After it, nothing can."""
        before = self._known.keep(together)
        try:
            call(*arguments)
        except BaseException:
            self._known.restore(before)
            raise
        self.t, self.backend = together.t, together.backend

    # --- state --------------------------------------------------------------------------------------------------------

    def get_slot_names(self) -> list[str]:
        return ["m", "v"]

    def get_slot(self, var: Any, name: str) -> Any:
        """The live m or v of a variable, in its shape and memory order; None before its first step, as in TensorFlow.

        Raises:
            ValueError: there is no slot of that name.
        """
        if name not in self.get_slot_names():
            raise ValueError(f"{self.name} has the slots 'm' and 'v', got {name!r}")
        return self._known.slot(var, name)

    def variables(self) -> list[Any]:
        """The live m and v of each variable that has come so far. The step count, `t`, is a number."""
        return [self.get_slot(var, name) for var in self._known for name in self.get_slot_names()]

    def state_dict(self) -> dict[str, Any]:
        """t, and copies of the slots on the host, to continue bit for bit: as `fused_adam.Adam.state_dict`.

        Variables are in the order in which they came. Raises ValueError if there is none yet, or if they are not all in
        one place.
        """
        return self._together(dict(enumerate(self._known))).state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], var_list: Sequence[Any]) -> None:
        """Continue from a `state_dict` with these variables, in its order. Learning rate and the like stay as they are.

        Raises:
            ValueError, TypeError: it does not fit the variables. Nothing is changed then.
        """
        together = self._together(dict(enumerate(var_list)))
        with DeferredInterrupt():
            self._keep(together, together.load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Variables are known by their ids, which those of a copy do not share."""
        known = list(self._known)
        return self.__dict__ | {"_known": (self._known.backend, known, self.state_dict() if known else {})}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        backend, known, state = saved["_known"]
        self._known = Variables(backend)
        if known:
            self.load_state_dict(state, known)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name)!r}" for name in _NUMBERS)
        return f"AdamOptimizer({numbers}, name={self.name!r}, backend={self.backend!r}, t={self.t})"


_NUMBERS: dict[str, Callable[[str, Any], float]] = {
    "learning_rate": _numbers.nonnegative,
    "beta1": _numbers.decay_rate,
    "beta2": _numbers.decay_rate,
    "epsilon": _numbers.nonnegative,
}


def _check_global_step(x: Any) -> None:
    if x is None:
        return
    plain = isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray)
    if not plain or x.dtype.kind not in "iu" or x.size != 1:
        raise TypeError(f"global_step should be a NumPy array of one integer, as np.zeros((), np.int64), got {x!r}")
    if not x.flags.writeable:
        raise TypeError("global_step is read-only; pass a writable array")
    if x.item() == np.iinfo(x.dtype).max:
        raise ValueError(f"global_step is {x.item()}, the largest number of {x.dtype}; pass np.int64")
