"""`fused_adam.torch`: gradients and parameters of all kinds, and what of them moves between two steps."""

from __future__ import annotations

import copy
import gc
import re
import signal
import weakref
from typing import Any

import pytest
from conftest import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_cases import STEPS, close, full, give, image, one, parameters, refuses, torch

import fused_adam.torch as ours
from fused_adam.backends import load

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


def test_what_is_no_memory_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match=r"params\[0\]\[0\] is on meta; .*: move it there"):
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
        (
            lambda s: s.update(exp_avg=torch.zeros(4, 3).double()),
            "has dtype torch.float64, expected",
        ),
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


def test_a_gradient_whose_memory_was_taken_away_is_refused(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(1000))
    opt = ours.AdamW([p], backend=backend)
    for _ in range(2):
        p.grad = torch.ones(1000)
        opt.step()
    p.grad.untyped_storage().resize_(0)
    refuses(opt, RuntimeError, "for which its storage is too small")


ASSIGNED = [(torch.ones(1), ValueError), (torch.ones(4, dtype=torch.float64), TypeError)]


@pytest.mark.parametrize(("data", "kind"), ASSIGNED, ids=["shape", "dtype"])
def test_data_of_flat_gradients_that_does_not_fit_is_refused(data: Any, kind: type[Exception]) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    opt = ours.SGD([p], flat=True)
    opt.step()
    opt.step()
    p.grad.data = data
    refuses(opt, kind, "the gradient of params")
    opt.zero_grad()
    assert p.grad.shape == p.shape and p.grad.dtype == p.dtype


def test_data_of_flat_gradients_may_be_assigned() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2))
    opt = ours.SGD([p], lr=1.0, flat=True)
    for _ in range(3):
        p.grad.data = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T
        opt.step()
        opt.zero_grad()
        assert not p.grad.any()
    assert p.tolist() == [[-3.0, -6.0], [-9.0, -12.0]]


def test_flat_parameters_of_two_dtypes_become_one() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(3, 3).double()])
    opt = ours.AdamW(model.parameters(), flat=True)
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(s["step"] == 1 for s in opt.state.values())


def test_the_default_device_does_not_matter() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with torch.device("meta"):
        ours.AdamW([p], lr=0.1, weight_decay=0.0).step()
    assert p.tolist() == pytest.approx([0.9] * 3)


def test_expanded_gradients_are_not_zeroed() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(1).expand(3)
    refuses(ours.AdamW([p], zero_grads=True), ValueError, "expanded, which zero_grads cannot zero")


def test_leaves_in_another_order_are_zeroed() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(2, 3).T.requires_grad_()
    ours.AdamW([p], zero_grads=True).step()
    assert not p.grad.any() and p.grad.is_leaf


def test_capturable_that_is_asked_for_later_is_not_ignored() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = ours.AdamW([p])
    opt.step()
    opt.param_groups[0]["capturable"] = True
    refuses(opt, ValueError, "capturable=True needs parameters on a GPU")


def test_flat_parameters_may_turn_under_their_gradients() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2))
    opt = ours.SGD([p], lr=1.0, flat=True)
    opt.step()
    p.data = p.data.T.contiguous().T.clone(memory_format=torch.preserve_format)
    p.grad.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for n in (1.0, 2.0, 3.0):
        opt.step()
        assert p.tolist() == [[-n, -2 * n], [-3 * n, -4 * n]]
