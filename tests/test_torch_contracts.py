"""`fused_adam.torch` in a training loop: groups, schedulers, hooks, a gradient scaler, and who calls a step."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from conftest import same_bits
from torch.optim import optimizer as torch_optimizer
from torch_cases import STEPS, close, full, give, image, one, parameters, refuses, torch

import fused_adam
import fused_adam.torch as ours

# --- groups and hyperparameters ---------------------------------------------------------------------------------------


@full
def test_groups_and_numbers_that_change(name: str, kwargs: dict[str, Any]) -> None:
    """A group more, another lr, maximize, no decay: between steps, against torch."""
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    torchs = getattr(torch.optim, name, None)
    pair = [getattr(ours, name)(a[:2], **kwargs), (torchs or ours.Lion)(b[:2], **kwargs)]
    for n in range(3 * STEPS):
        for params, opt in zip((a, b), pair, strict=True):
            if n == 2:
                opt.add_param_group({"params": params[2:], "lr": 0.05})
            if n == 4:
                opt.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
            if n == 6:
                opt.param_groups[0]["lr"].mul_(2)
            if n == 8:
                opt.param_groups[1]["maximize"] = True
            if n == 10:
                opt.param_groups[0]["weight_decay"] = 0.0
            if n == 12:
                opt.param_groups[0]["params"].reverse()
            give(params, n)
            opt.step()
    close(a, b, start, 1e-8 if torchs else 0.0)


def test_momentum_that_comes_later_and_a_parameter_that_changes_its_group() -> None:
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    for params, module in ((a, ours), (b, torch.optim)):
        opt = module.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 1.0}], lr=0.1, dampening=0.5)
        for n in range(STEPS):
            if n == 2:
                opt.param_groups[0]["momentum"] = 0.9
            if n == 4:
                opt.param_groups[0]["params"], opt.param_groups[1]["params"] = params[:1], params[1:]
            give(params, n)
            opt.step()
    close(a, b, start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_adagrad_starts_a_later_group_as_torch(dtype: Any) -> None:
    a, b = parameters(dtype), parameters(dtype)
    start = [p.detach().clone() for p in a]
    for params, module in ((a, ours), (b, torch.optim)):
        opt = module.Adagrad(params[:2], initial_accumulator_value=0.5)
        opt.add_param_group({"params": params[2:]})
        for n in range(STEPS):
            give(params, n)
            opt.step()
    close(a, b, start)


def test_a_wrong_group_is_not_added() -> None:
    opt = ours.AdamW(parameters())
    with pytest.raises(ValueError, match="lr should be at least 0, got -1"):
        opt.add_param_group({"params": parameters(), "lr": -1.0})
    assert len(opt.param_groups) == 1


def test_tensor_betas() -> None:
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    betas = (torch.tensor([0.8], dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    for params, module in ((a, ours), (b, torch.optim)):
        opt = module.Adam(params, betas=betas, lr=torch.tensor(0.1, dtype=torch.float64))
        for n in range(STEPS):
            give(params, n)
            opt.step()
    close(a, b, start)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("flat", [False, True])
def test_training_with_a_scheduler_and_a_closure(set_to_none: bool, flat: bool) -> None:
    """A small network for some steps, with OneCycleLR, which changes the betas too."""
    losses = []
    for module in (ours, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        x, y = torch.randn(20, 5).double(), torch.randn(20, 1).double()
        opt = module.AdamW(model.parameters(), lr=0.01, **({"flat": flat} if module is ours else {}))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20)

        def closure(model: Any = model, opt: Any = opt, x: Any = x, y: Any = y) -> Any:
            opt.zero_grad(set_to_none)
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            return loss

        with torch.no_grad():
            found = []
            for _ in range(20):
                found.append(float(opt.step(closure).detach()))
                scheduler.step()
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-1] < 0.7 * losses[0][0]


@full
def test_hooks(name: str, kwargs: dict[str, Any]) -> None:
    params = parameters()
    opt = getattr(ours, name)(params, **kwargs)
    seen: list[Any] = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kw: seen.append(("before", args, kw))),
        opt.register_step_post_hook(lambda o, args, kw: seen.append(("after", args, kw))),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, args, kw: seen.append("global")),
    ]
    give(params, 0)
    opt.step()
    assert seen == [("before", (opt,), {}), ("after", (opt,), {}), "global"]
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(seen) == 3
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d.keys()))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o))
    opt.load_state_dict(opt.state_dict())
    assert seen[3:] == [{"state": 0, "param_groups": 0}.keys(), opt]


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_all_optimizers(when: str) -> None:
    opt, seen = ours.AdamW(parameters()), []
    handle = getattr(torch_optimizer, f"register_optimizer_step_{when}_hook")(lambda o, args, kw: seen.append(o))
    opt.step()
    handle.remove()
    opt.step()
    assert seen == [opt]


def test_the_profiler_sees_a_step() -> None:
    params = parameters()
    opt = ours.AdamW(params)
    give(params, 0)
    with torch.autograd.profiler.profile() as found:
        opt.step()
    assert "Optimizer.step#AdamW.step" in {event.name for event in found.function_events}


def test_an_optimizer_for_each_parameter_in_hooks() -> None:
    """Stepped during the backward pass, as soon as each gradient is there."""
    a, b = parameters()[:2], parameters()[:2]
    single = {p: ours.AdamW([p], lr=0.1) for p in a}
    together = ours.AdamW(b, lr=0.1)

    def step(p: Any) -> None:
        single[p].step()
        single[p].zero_grad()

    for p in a:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        for params in (a, b):
            sum((p**3).sum() for p in params).backward()
        together.step()
        together.zero_grad()
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it compiles
def test_a_compiled_step() -> None:
    """torch.compile leaves the step as it is, without a word."""
    a, b, pair = one()
    for opt in pair:
        seen: list[Any] = []
        handle = opt.register_step_post_hook(lambda o, args, kw, seen=seen: seen.append(args))
        step = torch.compile(opt.step, backend="eager") if opt is pair[0] else opt.step
        for _ in range(3):
            step()
        handle.remove()
        assert seen == [(opt,)] * 3
    close([a], [b], [torch.zeros(4, 3)], 1e-6)


def test_a_step_without_gradients() -> None:
    opt = ours.AdamW(parameters())
    opt.step()
    assert not opt.state
    assert opt.step(lambda: 3.0) == 3.0


# --- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_grad_scaler(amp_scaling: bool) -> None:
    """Scales are powers of two, so the bits are those of a step without one; an inf skips the step and halves it."""
    a, b = parameters(torch.float32), parameters(torch.float32)
    opt, plain = ours.AdamW(a, amp_scaling=amp_scaling), ours.AdamW(b)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for n in range(STEPS):
        give(a, n)
        give(b, n)
        for p in a:
            p.grad.mul_(scaler.get_scale())
        if n == 3:
            a[1].grad[5] = float("inf")
        scale = scaler.get_scale()
        if n == 4:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if n == 3 else scale)
        if n != 3:
            plain.step()
        for x, y in zip(a, b, strict=True):
            assert same_bits(x.detach(), y.detach()), n
        if amp_scaling and n == 0:
            assert float(a[0].grad.abs().max()) > 100, "the step itself divides"
    assert opt._step_supports_amp_scaling is amp_scaling
    assert opt.state[a[0]]["step"] == STEPS - 1


# --- flat -------------------------------------------------------------------------------------------------------------


def assert_flat(params: list[Any]) -> None:
    """One behind the other, gradients likewise; and none drags the memory of all along where it is saved."""
    filled = [p for p in params if p.numel()]
    places = [p.data_ptr() for p in filled]
    blocks = [-(-p.numel() // 128) * 128 * p.element_size() for p in filled]
    assert [b - a for a, b in pairwise(places)] == blocks[:-1]
    assert {p.grad.data_ptr() - place for p, place in zip(filled, places, strict=True)} == {sum(blocks)}
    assert all(t.untyped_storage().nbytes() == t.nbytes for p in filled for t in (p, p.grad))


@full
def test_flat_has_the_bytes_of_the_other_layout(name: str, kwargs: dict[str, Any]) -> None:
    a, b = parameters(torch.float32), parameters(torch.float32)
    a.append(torch.nn.Parameter(image(torch.channels_last)))
    b.append(torch.nn.Parameter(image(torch.channels_last)))
    opt, other = getattr(ours, name)(a, **kwargs, flat=True), getattr(ours, name)(b, **kwargs)
    assert_flat(a)
    views = [p.grad for p in a]
    for n in range(STEPS):
        give(b, n)
        for p, q in zip(a, b, strict=True):
            p.grad.add_(q.grad)
        opt.step()
        other.step()
        opt.zero_grad(set_to_none=n % 2 == 0)
        assert all(p.grad is view and not view.any() for p, view in zip(a, views, strict=True))
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach()) and x.stride() == y.stride()


@full
def test_flat_has_states_to_load_into_before_its_first_step(name: str, kwargs: dict[str, Any]) -> None:
    """torch.distributed.checkpoint needs them. Loading them changes nothing."""
    a, b = parameters(), parameters()
    opt, other = getattr(ours, name)(a, **kwargs, flat=True), getattr(ours, name)(b, **kwargs)
    saved = opt.state_dict()
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.state_dict()["state"].keys() == saved["state"].keys() == set(range(len(a)))
    for n in range(STEPS):
        give(b, n)
        for p, q in zip(a, b, strict=True):
            p.grad.copy_(q.grad)
        opt.step()
        other.step()
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())
    for k, state in other.state_dict()["state"].items():
        assert {key: s.dtype for key, s in saved["state"][k].items()} == {key: s.dtype for key, s in state.items()}


def test_flat_keeps_what_there_was() -> None:
    p = torch.nn.Parameter(torch.arange(3.0))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    p.grad = torch.ones(3)
    opt = ours.SGD([p, frozen], lr=1.0, weight_decay=0.5, flat=True)
    assert p.tolist() == [0, 1, 2] and p.grad.tolist() == [1, 1, 1]
    opt.step()
    assert p.tolist() == [-1, -0.5, 0] and frozen.tolist() == [1, 1] and frozen.grad is None


def test_flat_goes_on_without_its_views() -> None:
    """Gradients taken away, parameters moved out and back: steps are right, and gradients return to the buffer."""
    a, b = parameters(), parameters()
    opt, other = ours.AdamW(a, flat=True), ours.AdamW(b)
    views = [p.grad for p in a]
    for n in range(5):
        give(b, n)
        if n in (1, 2):
            give(a, n)
        else:
            for p, q in zip(a, b, strict=True):
                p.grad.copy_(q.grad)
        if n == 3:
            a[0].data = a[0].data.clone()
        opt.step()
        other.step()
        opt.zero_grad()
        assert [p.grad is view for p, view in zip(a, views, strict=True)] == [n < 3] + [True] * 4
        if n >= 3:
            a[0].grad = torch.zeros_like(a[0])
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())


def test_flat_is_flat_again_when_copied() -> None:
    params = parameters()
    mine, opt = copy.deepcopy((params, ours.AdamW(params, flat=True)))
    assert_flat(mine)
    for p in mine:
        p.grad.fill_(1.0)
    opt.step()
    opt.zero_grad()
    assert not any(p.grad.any() for p in mine)


def test_flat_moves_nothing_if_one_cannot_be_moved() -> None:
    params = [*parameters(), torch.nn.Parameter(torch.ones(3).to(torch.float8_e5m2))]
    places = [p.data_ptr() for p in params]
    with pytest.raises(TypeError, match="parameter 5 of those that require gradients has dtype float8_e5m2"):
        ours.AdamW(params, flat=True)
    assert places == [p.data_ptr() for p in params]


def test_backends_are_chosen_by_name() -> None:
    with pytest.raises(ValueError, match="backend should be 'auto' or one of"):
        ours.AdamW(parameters(), backend="cuda")
    assert "numpy" in {name for name, available, _ in fused_adam.backends() if available}
    params = parameters()
    opt = ours.AdamW(params, backend="cupy")
    give(params, 0)
    refuses(opt, RuntimeError, "backend 'cupy'")
