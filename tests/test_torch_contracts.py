"""`fused_adam.torch` in a training loop: gradients and parameters of all kinds, what moves, and who calls a step."""

from __future__ import annotations

import copy
import gc
import importlib.util
import re
import signal
import weakref
from typing import Any

import numpy as np
import pytest
from conftest import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer as torch_optimizer
from torch_cases import FULL, STEPS, close, give, parameters, torch

import fused_adam
import fused_adam.torch as ours
from fused_adam.backends import load

full = pytest.mark.parametrize(("name", "kwargs"), FULL, ids=[name for name, _ in FULL])


def snapshot(opt: Any) -> list[Any]:
    """Copies of all that a step writes."""
    params = [p for group in opt.param_groups for p in group["params"]]
    states = [s for p in params for s in opt.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params, *states)]


def refuses(opt: Any, kind: type[Exception], message: str) -> None:
    """The next step raises, and changes nothing."""
    before = snapshot(opt)
    with pytest.raises(kind, match=message):
        opt.step()
    after = snapshot(opt)
    assert len(before) == len(after) and all(map(same_bits, before, after))


def one(shape: tuple[int, ...] = (4, 3), **kwargs: Any) -> tuple[Any, Any, Any]:
    """A parameter with a gradient in ours and in torch's optimizer, stepped once."""
    a = torch.nn.Parameter(torch.arange(float(np.prod(shape))).reshape(shape) / 7)
    b = torch.nn.Parameter(a.detach().clone())
    pair = ours.AdamW([a], lr=0.1, **kwargs), torch.optim.AdamW([b], lr=0.1, **kwargs)
    for p, opt in zip((a, b), pair, strict=True):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(shape)
        opt.step()
    return a, b, pair


# --- gradients --------------------------------------------------------------------------------------------------------

G = torch.linspace(-2, 1, 12)
GRADIENTS: dict[str, Any] = {
    "expanded": lambda: torch.tensor([[1.0, -2.0, 0.5]]).expand(4, 3),
    "of one element": lambda: torch.tensor(0.25).expand(4, 3),
    "transposed": lambda: G.reshape(3, 4).t(),
    "strided": lambda: torch.cat([G, G]).reshape(4, 6)[:, ::2],
    "with an offset": lambda: torch.cat([G, G])[5:17].reshape(4, 3),
    "negated lazily": lambda: torch._neg_view(G.reshape(4, 3)),
    "of a graph": lambda: (G.clone().requires_grad_() * 2).reshape(4, 3),
    "a parameter": lambda: torch.nn.Parameter(G.reshape(4, 3)),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_any_gradient(kind: str) -> None:
    a, b, pair = one()
    for p, opt in zip((a, b), pair, strict=True):
        p.grad = GRADIENTS[kind]()
        opt.step()
    close([a], [b], [torch.zeros(4, 3)], 1e-6)
    again = GRADIENTS[kind]()
    assert same_bits(a.grad.detach().resolve_neg(), again.detach().resolve_neg()), "a gradient is only read"


def test_one_gradient_for_two_parameters() -> None:
    a, b = parameters()[:1], parameters(seed=1)[:1]
    g = torch.ones(3, 5, dtype=torch.float64)
    opt = ours.SGD([*a, *b], lr=0.5)
    starts = [p.detach().clone() for p in (*a, *b)]
    for p in (*a, *b):
        p.grad = g
    opt.step()
    for p, start in zip((*a, *b), starts, strict=True):
        assert torch.equal(p.detach(), start - 0.5)


def test_sparse_gradients_are_refused() -> None:
    a, _, (opt, _) = one()
    a.grad = torch.ones(4, 3).to_sparse()
    refuses(opt, RuntimeError, r"gradient of params\[0\]\[0\] is sparse; .*\.to_dense")


def test_a_gradient_in_what_is_written_is_refused() -> None:
    a, _, (opt, _) = one()
    a.grad = opt.state[a]["exp_avg"]
    refuses(opt, ValueError, r"the gradient of params\[0\]\[0\] overlaps a parameter or a state")


def test_never_half_a_step() -> None:
    """A bad gradient behind good ones: nothing moves, no state appears, and the next step is as if it had not been."""
    a, b = parameters(), parameters()
    opt, other = ours.AdamW([{"params": a[:2]}, {"params": a[2:], "lr": 0.1}]), ours.AdamW(b)
    give(a, 0)
    a[3].grad = a[3].grad.to_sparse()
    refuses(opt, RuntimeError, r"params\[1\]\[1\]")
    assert not opt.state
    other.param_groups[0]["params"], rest = b[:2], b[2:]
    other.add_param_group({"params": rest, "lr": 0.1})
    for params, optimizer in ((a, opt), (b, other)):
        give(params, 0)
        optimizer.step()
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())


def test_first_momentum_enters_whole_after_a_failed_step() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    opt = ours.SGD([p], lr=1.0, momentum=0.9, dampening=0.5)
    p.grad = torch.ones(2).to_sparse()
    refuses(opt, RuntimeError, "sparse")
    p.grad = torch.ones(2)
    opt.step()
    assert p.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_interrupt_comes_after_the_step(
    steps_before: int, place: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C where states have just been made, or have just been stepped and not yet been counted."""
    a, b = parameters(), parameters()
    opt, other = ours.AdamW(a, backend=backend), ours.AdamW(b)
    for n in range(steps_before + 1):
        give(a, n)
        give(b, n)
        other.step()
        if n < steps_before:
            opt.step()
    stepper = load(backend).Stepper
    step = stepper.step

    def interrupted(*arguments: Any) -> None:
        if place == "before":
            signal.raise_signal(signal.SIGINT)
        step(*arguments)
        if place == "after":
            signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stepper, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opt.step()
    finally:
        signal.signal(signal.SIGINT, previous)
    for x, y in zip(a, b, strict=True):
        assert same_bits(x.detach(), y.detach())
        for key, s in other.state[y].items():
            assert same_bits(opt.state[x][key], s)


# --- parameters -------------------------------------------------------------------------------------------------------


def image(memory_format: Any) -> Any:
    return torch.linspace(-1, 1, 120).reshape(2, 3, 4, 5).to(memory_format=memory_format)


@full
def test_other_memory_orders(name: str, kwargs: dict[str, Any]) -> None:
    """Channels last and transposed parameters, with gradients in their order and in another."""
    made = [image(torch.channels_last), image(torch.contiguous_format).permute(3, 0, 2, 1), torch.ones(3, 4).t()]
    a = [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in made]
    b = [torch.nn.Parameter(t.contiguous()) for t in made]
    opts = [getattr(ours, name)(params, **kwargs) for params in (a, b)]
    for n in range(STEPS):
        give(b, n)
        for p, q in zip(a, b, strict=True):
            p.grad = q.grad.clone() if n % 2 else torch.empty_like(p).copy_(q.grad)
        for opt in opts:
            opt.step()
    for p, q in zip(a, b, strict=True):
        assert not p.is_contiguous() and torch.equal(p, q)
        for key, s in opts[0].state[p].items():
            assert torch.equal(s, opts[1].state[q][key])
            assert key == "step" or s.stride() == p.stride()


def test_parameters_with_gaps_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    opt = ours.SGD([p])
    p.grad = torch.ones(4, 3)
    refuses(opt, ValueError, re.escape("params[0][0] has gaps or repeats in memory (strides (6, 2) for (4, 3))"))


def test_parameters_that_share_memory_are_refused() -> None:
    whole = torch.ones(6)
    a, b = torch.nn.Parameter(whole[:4]), torch.nn.Parameter(whole[3:])
    opt = ours.SGD([a, b])
    a.grad, b.grad = torch.ones(4), torch.ones(3)
    refuses(opt, ValueError, re.escape("params[0][0] and params[0][1] share memory"))


@full
def test_complex_parameters(name: str, kwargs: dict[str, Any]) -> None:
    """As torch: real and imaginary parts are two numbers. Gradients may be conjugated lazily."""
    a, b = (torch.nn.Parameter(torch.arange(6).reshape(2, 3) * (0.5 + 0.25j)) for _ in range(2))
    opt = getattr(ours, name)([a], **kwargs)
    reals = torch.nn.Parameter(torch.view_as_real(b.detach()).clone())
    other = getattr(torch.optim, name, ours.Lion)([b if name != "Lion" else reals], **kwargs)
    for n in range(STEPS):
        g = torch.randn(2, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(n))
        a.grad = g.conj()
        b.grad = g.conj().resolve_conj()
        reals.grad = torch.view_as_real(b.grad).clone()
        opt.step()
        other.step()
    theirs = b.detach() if name != "Lion" else torch.view_as_complex(reals.detach())
    way = float((theirs - torch.arange(6).reshape(2, 3) * (0.5 + 0.25j)).abs().max())
    assert way > 0 and float((a.detach() - theirs).abs().max()) <= 1e-5 * way


def test_cuda_parameters_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(2, device="cuda"))
        p.grad = torch.empty(2, device="cuda")
        opt = ours.SGD([p])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            RuntimeError, match=re.escape("params[0][0] is on cuda:0; pip install 'fused-adam[cuda13]'")
        ):
            opt.step()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        with pytest.raises(RuntimeError, match="host memory only"):
            opt.step()


def test_what_is_no_memory_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match=r"params\[0\]\[0\] is on meta; .*: move it to the CPU"):
        ours.SGD([p]).step()
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        with pytest.raises(TypeError, match=r"params\[0\]\[0\] is a \w+, which is no plain memory"):
            ours.SGD([p]).step()


def test_names_are_in_messages() -> None:
    model = torch.nn.Linear(2, 2)
    opt = ours.AdamW(model.named_parameters())
    model.bias.grad = torch.ones(2).to_sparse()
    refuses(opt, RuntimeError, re.escape("the gradient of params[0][1] (bias) is sparse"))


# --- what moves between steps -----------------------------------------------------------------------------------------

MOVES: dict[str, Any] = {
    "data": lambda p, s: setattr(p, "data", p.data.clone()),
    "set_": lambda p, s: p.data.set_(p.data.clone()),
    "transposed": lambda p, s: setattr(p, "data", p.data.t().contiguous().t()),
    "storage": lambda p, s: p.data.share_memory_(),
    "a state": lambda p, s: s.update(exp_avg=s["exp_avg"].clone()),
    "a state's data": lambda p, s: setattr(s["exp_avg"], "data", s["exp_avg"].clone()),
    "a state's order": lambda p, s: s.update(exp_avg=s["exp_avg"].t().contiguous().t()),
    "step": lambda p, s: s["step"].fill_(41.0),
    "another step": lambda p, s: s.update(step=torch.tensor(7.0)),
    "a state's values": lambda p, s: s["exp_avg"].mul_(0.5),
    "values": lambda p, s: p.data.add_(1),
}


@pytest.mark.parametrize("kind", MOVES)
def test_what_moved_is_found(kind: str) -> None:
    a, b, pair = one()
    for _ in range(2):
        for p, opt in zip((a, b), pair, strict=True):
            MOVES[kind](p, opt.state[p])
            p.grad = torch.linspace(1, -3, p.numel()).reshape(p.shape)
            opt.step()
    close([a], [b], [torch.zeros(4, 3)], 1e-6)
    for key, s in pair[1].state[b].items():
        assert torch.allclose(pair[0].state[a][key], s, rtol=1e-5)


def test_states_replaced_as_a_whole() -> None:
    a, b, pair = one()
    for p, opt in zip((a, b), pair, strict=True):
        opt.state[p] = copy.deepcopy(opt.state[p])
        opt.step()
        opt.state.clear()
        opt.step()
    close([a], [b], [torch.zeros(4, 3)], 1e-6)
    assert pair[0].state[a]["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(exp_avg=torch.zeros(2)), r"'exp_avg' of params\[0\]\[0\] has shape \(2,\)"),
        (lambda s: s["exp_avg"].resize_(2), r"'exp_avg' of params\[0\]\[0\] has shape \(2,\)"),
        (lambda s: s.update(exp_avg=torch.zeros(4, 3).double()), "has dtype torch.float64 but its parameter"),
        (lambda s: s.update(exp_avg=s["exp_avg_sq"]), "share memory"),
        (lambda s: s.pop("exp_avg"), "has no 'exp_avg'"),
        (lambda s: s.update(step=torch.tensor(-1.0)), "'step' of .* should be a whole number of steps"),
        (lambda s: s.update(step=torch.tensor(float("nan"))), "'step' of .* should be a whole number of steps"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    """torch's fused step reads and writes out of bounds for the first."""
    a, _, (opt, _) = one()
    change(opt.state[a])
    refuses(opt, (ValueError, TypeError), message)  # type: ignore[arg-type]


def test_autograd_notices_the_step() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w**2).sum()
    w.grad = torch.ones(3)
    ours.SGD([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_not_kept_alive() -> None:
    a, _, (opt, _) = one()
    seen = weakref.ref(a.grad)
    opt.zero_grad()
    gc.collect()
    assert seen() is None


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


@full
def test_flat_has_the_bytes_of_the_other_layout(name: str, kwargs: dict[str, Any]) -> None:
    a, b = parameters(torch.float32), parameters(torch.float32)
    a.append(torch.nn.Parameter(image(torch.channels_last)))
    b.append(torch.nn.Parameter(image(torch.channels_last)))
    opt, other = getattr(ours, name)(a, **kwargs, flat=True), getattr(ours, name)(b, **kwargs)
    buffers = {p.untyped_storage().data_ptr() for p in a}, {p.grad.untyped_storage().data_ptr() for p in a}
    assert buffers[0] == buffers[1] and len(buffers[0]) == 1
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
    assert len({p.untyped_storage().data_ptr() for p in mine}) == 1
    assert all(p.grad is not None for p in mine)
    for p in mine:
        p.grad.fill_(1.0)
    opt.step()
    opt.zero_grad()
    assert not any(p.grad.any() for p in mine)


def test_flat_moves_nothing_if_one_cannot_be_moved() -> None:
    params = [*parameters(), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    places = [p.data_ptr() for p in params]
    with pytest.raises(TypeError, match="parameter 5 of those that require gradients has dtype bfloat16"):
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
