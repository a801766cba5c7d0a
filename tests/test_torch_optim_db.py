"""`fused_adam.torch` over every configuration and error of torch's own optimizer tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import require
from torch_cases import STEPS, close, give, parameters, same_states, torch

require("expecttest")  # which torch's tests import

from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db  # noqa: E402

import fused_adam.torch as ours  # noqa: E402

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}
CONFIGURATIONS = [
    pytest.param(name, given.kwargs, id=f"{name}-{given.desc}")
    for name, info in INFO.items()
    for given in info.optim_inputs_func("cpu")
]
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, info in INFO.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
def test_steps_as_torch(name: str, kwargs: dict[str, Any], backend: str) -> None:
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    mine = getattr(ours, name)(a, **copy.deepcopy(kwargs), backend=backend)
    theirs = getattr(torch.optim, name)(b, **copy.deepcopy(kwargs))
    for n in range(STEPS):
        absent = (0, 2) if n == 2 else (1,) if n == 0 else ()  # so that step counts differ
        for params in (a, b):
            give(params, n, absent)
        mine.step()
        theirs.step()
        close(a, b, start)
    saved, expected = mine.state_dict(), theirs.state_dict()
    same_states(saved, expected)
    assert saved["param_groups"] == expected["param_groups"]


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors_are_torchs(name: str, error: Any) -> None:
    given = error.optimizer_error_input
    params = given.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            getattr(ours, name)(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(ours, name)(params, **given.kwargs)
