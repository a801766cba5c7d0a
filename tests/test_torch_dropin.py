"""`fused_adam.torch` against torch's own classes: arguments, bytes, and states in all their forms."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import same_bits
from torch_cases import FULL, STEPS, close, give, parameters, refuses, same_states, torch

import fused_adam
import fused_adam.torch as ours

full = pytest.mark.parametrize(("name", "kwargs"), FULL, ids=[name for name, _ in FULL])
shared = pytest.mark.parametrize(("name", "kwargs"), FULL[:-1], ids=[name for name, _ in FULL[:-1]])


@pytest.mark.parametrize("name", [name for name, _ in FULL])
def test_arguments_are_torchs(name: str) -> None:
    """Names, order, kinds and defaults, but for those of this package behind them."""
    if name == "Lion":
        assert issubclass(ours.Lion, torch.optim.Optimizer)
        return
    theirs = getattr(torch.optim, name)
    assert issubclass(getattr(ours, name), theirs)
    mine = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(ours, name)).parameters.values()]
    expected = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
    assert mine[:-1] == expected


@pytest.mark.parametrize(
    ("foreach", "fused"), [(None, None), (True, None), (None, True), (False, False), (True, False)]
)
def test_foreach_and_fused_change_nothing(foreach: bool | None, fused: bool | None) -> None:
    a, b = parameters(), parameters()
    for params, kwargs in ((a, {"foreach": foreach, "fused": fused}), (b, {})):
        opt = ours.AdamW(params, **kwargs)
        give(params, 0)
        opt.step()
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())


def test_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match=r"differentiable=True is not supported: .*; leave it out"):
        ours.AdamW(parameters(), differentiable=True)
    opt = ours.AdamW(params := parameters())
    opt.param_groups[0]["differentiable"] = True
    give(params, 0)
    refuses(opt, ValueError, "differentiable")


def test_capturable_is_for_a_gpu() -> None:
    params = parameters()
    give(params, 0)
    refuses(ours.AdamW(params, capturable=True), ValueError, "capturable=True needs parameters on a GPU and CuPy")


@full
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes_of_the_flat_class(name: str, kwargs: dict[str, Any], dtype: str, backend: str) -> None:
    params = parameters(getattr(torch, dtype))
    arrays = [p.detach().numpy().copy() for p in params]
    mine = getattr(ours, name)(params, **kwargs, backend=backend)
    flat = getattr(fused_adam, name)(arrays, **kwargs, backend=backend)
    for n in range(STEPS):
        give(params, n)
        mine.step()
        flat.step([p.grad.numpy() for p in params])
    saved = flat.state_dict()["state"]
    for k, (p, a) in enumerate(zip(params, arrays, strict=True)):
        assert same_bits(p.detach().numpy(), a)
        for rule_name, called in mine._family.states.items():
            if called in mine.state[p]:
                assert same_bits(mine.state[p][called].numpy(), saved[k][rule_name])


@shared
@pytest.mark.parametrize("into", ["ours", "torch"])
def test_states_go_both_ways(name: str, kwargs: dict[str, Any], into: str) -> None:
    """A run that changes classes in the middle is the run that does not."""
    classes = {"ours": getattr(ours, name), "torch": getattr(torch.optim, name)}
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    changing = classes["torch" if into == "ours" else "ours"](a, **kwargs)
    steady = classes["torch"](b, **kwargs)
    for n in range(2 * STEPS):
        if n == STEPS:
            saved = changing.state_dict()
            changing = classes[into](a, lr=123.0)
            changing.load_state_dict(saved)
        for params in (a, b):
            give(params, n, (0,) if n == 1 else ())
        changing.step()
        steady.step()
    close(a, b, start)
    same_states(changing.state_dict(), steady.state_dict())
    assert changing.param_groups[0]["lr"] == kwargs["lr"]


@full
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "mmap"])
def test_copies_continue_bit_for_bit(name: str, kwargs: dict[str, Any], how: str, tmp_path: Any) -> None:
    a = parameters(torch.float32)
    opt = getattr(ours, name)(a, **kwargs, backend="numpy")
    for n in range(STEPS):
        give(a, n, (1,) if n == 2 else ())
        opt.step()
    if how in ("deepcopy", "pickle"):
        b, other = copy.deepcopy((a, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((a, opt)))
        assert type(other) is type(opt) and other.param_groups[0]["params"][0] is b[0]
    else:
        file = tmp_path / "state.pt"
        torch.save(opt.state_dict(), file)
        b = [torch.nn.Parameter(p.detach().clone()) for p in a]
        other = getattr(ours, name)(b, **kwargs)
        other.load_state_dict(torch.load(file, weights_only=True, mmap=how == "mmap"))
    for n in range(STEPS, 2 * STEPS):
        for params, optimizer in ((a, opt), (b, other)):
            give(params, n)
            optimizer.step()
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())
        for key, s in opt.state[x].items():
            assert same_bits(s, other.state[y][key])


def test_a_saved_state_is_as_large_as_it_has_to_be() -> None:
    """The steps share one memory while they live, and must not drag it along."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(50)]
    opt = ours.AdamW(params)
    for p in params:
        p.grad = torch.ones(1)
    opt.step()
    steps = [s["step"] for s in opt.state_dict()["state"].values()]
    assert {s.untyped_storage().nbytes() for s in steps} == {4}
    theirs = torch.optim.AdamW(params)
    theirs.step()
    sizes = []
    for o in (opt, theirs):
        torch.save(o.state_dict(), file := io.BytesIO())
        sizes.append(len(file.getvalue()))
    assert sizes[0] <= 1.01 * sizes[1]


def test_loading_does_not_alias() -> None:
    a, b = parameters(), parameters()
    opt, other = ours.AdamW(a), ours.AdamW(b)
    give(a, 0)
    opt.step()
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    for n in range(3):
        give(b, n)
        other.step()
    for key, state in before["state"].items():
        for name, s in state.items():
            assert same_bits(s, saved["state"][key][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(2)), r'state_dict\["state"\]\[0\]\["exp_avg"\] has shape'),
        (lambda s: s["state"][3].pop("exp_avg_sq"), r"state_dict\[\"state\"\]\[3\] has no 'exp_avg_sq'"),
        (lambda s: s["state"][3].update(step=torch.tensor(1.5)), r'\[3\]\["step"\] should be a whole number of steps'),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr should be at least 0"),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
        (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    a, b = parameters(), parameters(seed=1)
    opt, other = ours.AdamW(a, lr=0.5), ours.AdamW(b)
    for params, optimizer in ((a, opt), (b, other)):
        give(params, 3)
        optimizer.step()
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    same_states(other.state_dict(), before, 0.0)
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_float32_moments_stay_float32() -> None:
    """torch casts them to bfloat16 with the parameter (pytorch #43706)."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    m = torch.tensor([1.0 + 2**-20, 2.0, 3.0])
    saved = ours.AdamW([p]).state_dict()
    saved["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": m * m}}
    opt = ours.AdamW([p])
    opt.load_state_dict(saved)
    assert same_bits(opt.state[p]["exp_avg"], m)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert same_bits(opt.state[p]["exp_avg"], m + (1 - m) * torch.tensor(1.0 - 0.9))


def test_steps_beyond_float32_are_exact() -> None:
    """A float32 step stays at 2**24 for ever; here it goes on, in memory and in what is saved."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = ours.Adagrad([p], lr=1.0, lr_decay=1.0)
    opt.state[p]["step"] = torch.tensor(2.0**24 - 2)
    for n in range(5):
        p.grad = torch.ones_like(p)
        v = float(opt.state[p]["sum"][0])
        before = p[0].item()
        opt.step()
        lr = 1.0 / (1 + (2**24 - 2 + n))
        assert p[0].item() == pytest.approx(before - lr / ((v + 1) ** 0.5 + 1e-10), rel=1e-15)
        assert opt.state[p]["step"].item() == 2**24 - 1 + n
    saved = copy.deepcopy(opt.state_dict())
    other = ours.Adagrad([p])
    other.load_state_dict(saved)
    p.grad = torch.ones_like(p)
    other.step()
    assert other.state[p]["step"].item() == 2**24 + 4


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, fused_adam; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- docs/migration.md ------------------------------------------------------------------------------------------------

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/migration.md").read_text(), re.DOTALL)


def _apex(saved: Any) -> Any:
    groups = []
    for group in saved["param_groups"]:
        kept = {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay")}
        groups.append({**kept, "bias_correction": True, "step": STEPS})
    states = saved["state"].items()
    return {"state": {k: {n: s[n] for n in ("exp_avg", "exp_avg_sq")} for k, s in states}, "param_groups": groups}


def _deepspeed(saved: Any) -> Any:
    return {**saved, "state": {k: {**s, "step": int(s["step"])} for k, s in saved["state"].items()}}


def _bitsandbytes(saved: Any) -> Any:
    states = saved["state"].items()
    renamed = {k: {"state1": s["exp_avg"], "state2": s["exp_avg_sq"], "step": int(s["step"])} for k, s in states}
    return {"state": renamed, "param_groups": saved["param_groups"]}


@pytest.mark.parametrize(
    ("layout", "convert"), [(_apex, "from_apex"), (_deepspeed, ""), (_bitsandbytes, "from_bitsandbytes")]
)
def test_runs_are_carried_over(layout: Any, convert: str) -> None:
    """States in the layout of another library, made of torch's: the run goes on as torch's does."""
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    before, steady = torch.optim.AdamW(a, lr=0.01), torch.optim.AdamW(b, lr=0.01)
    for n in range(STEPS):
        for params, opt in ((a, before), (b, steady)):
            give(params, n)
            opt.step()
    saved = layout(before.state_dict())
    after = ours.AdamW(a)
    after.load_state_dict(getattr(ours, convert)(saved) if convert else saved)
    for n in range(STEPS, 2 * STEPS):
        for params, opt in ((a, after), (b, steady)):
            give(params, n)
            opt.step()
    close(a, b, start)


REFUSED = [
    ("from_apex", {"state": {}}, TypeError, "expected the state_dict"),
    (
        "from_apex",
        {"state": {}, "param_groups": [{"params": [0]}]},
        ValueError,
        r"param_groups\[0\] should have a step",
    ),
    (
        "from_apex",
        {"state": {}, "param_groups": [{"params": [0], "step": 3, "bias_correction": False}]},
        ValueError,
        "bias_correction=False, which has no counterpart",
    ),
    (
        "from_bitsandbytes",
        {"state": {0: {"step": 1, "state1": 0, "qmap1": 0}}, "param_groups": []},
        ValueError,
        "8 bits",
    ),
    ("from_bitsandbytes", {"state": {0: {"step": 1}}, "param_groups": []}, ValueError, "should have step and state1"),
]


@pytest.mark.parametrize(("convert", "saved", "kind", "message"), REFUSED)
def test_what_does_not_carry_over(convert: str, saved: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        getattr(ours, convert)(saved)


def test_the_migration_guide_goes_both_ways() -> None:
    model = torch.nn.Linear(2, 3)
    model(torch.ones(1, 2)).sum().backward()
    theirs = torch.optim.AdamW(model.parameters())
    theirs.step()
    scope = {"torch": torch, "fused_adam": fused_adam, "model": model, "saved": theirs.state_dict()}
    exec(BLOCKS[0], scope)
    same_states(scope["optimizer"].state_dict(), theirs.state_dict(), 0.0)
