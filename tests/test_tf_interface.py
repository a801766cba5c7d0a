"""TensorFlow 1's AdamOptimizer: slots, pairs, copies, and what is refused."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import assert_same_bits, same_bits
from tf_cases import BETA1, BETA2, CALLS, EPSILON, LR, Reference, assert_close, make, optimizer, pairs

import fused_adam
from fused_adam import SparseGrad
from fused_adam.tf import AdamOptimizer

# --- the interface ----------------------------------------------------------------------------------------------------


def test_only_those_who_ask_import_it():
    code = "import sys, fused_adam; print('fused_adam.tf' in sys.modules, hasattr(fused_adam, 'tf'))\n"
    code += "import fused_adam.tf; print(fused_adam.tf.AdamOptimizer().name)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\nAdam\n"


def test_a_pair_without_a_gradient_is_left_out(backend):
    variables, start = make(0), make(0)
    opt, reference = optimizer(backend), Reference(start)
    for t in range(3):
        grads = make(t + 1) | {"abc"[t]: None}
        opt.apply_gradients(pairs(grads, variables))
        reference.apply(grads)
        assert_close(opt, variables, reference, start)


def test_slots_are_live(backend):
    for order in "CF":
        variables = make(0, order=order)
        opt = optimizer(backend)
        opt.apply_gradients(pairs(make(1), variables))
        slots = {(name, slot): opt.get_slot(v, slot) for name, v in variables.items() for slot in "mv"}
        before = {key: a.copy() for key, a in slots.items()}
        opt.apply_gradients(pairs(make(2), variables))
        opt.apply_gradients(pairs(make(3, names="ac"), variables))  # other sets share them
        for (name, slot), a in slots.items():
            assert a.shape == variables[name].shape and a.dtype == variables[name].dtype
            assert not np.array_equal(a, before[name, slot])
            assert same_bits(a, opt.get_slot(variables[name], slot))
        slots["a", "m"][...] = 0
        opt.apply_gradients([(np.zeros((4, 3)), variables["a"])])
        assert (slots["a", "m"] == 0).all()
    assert opt.get_slot_names() == ["m", "v"]
    assert [id(a.base) for a in opt.variables()] == [id(a.base) for a in slots.values()]
    assert opt.get_slot(np.zeros(3), "m") is None
    with pytest.raises(ValueError, match="'m' and 'v', got 'momentum'"):
        opt.get_slot(variables["a"], "momentum")


def test_minimize_returns_the_loss_and_applies_the_gradients(backend):
    w, b, global_step = np.zeros((3, 2)), np.zeros(2), np.zeros((), np.int64)
    x, y = make(0)["a"], make(1)["a"][:, :2]
    opt = AdamOptimizer(0.05, backend=backend)

    def loss_and_grads():
        error = x @ w + b - y
        return (error**2).sum(), [2 * x.T @ error, 2 * error.sum(axis=0)]

    losses = [opt.minimize(loss_and_grads, [w, b], global_step, "train") for _ in range(200)]
    assert losses[0] == (y**2).sum()
    assert losses[-1] < 0.05 * losses[0]
    assert global_step == opt.t == 200


def test_global_step_counts_in_place():
    p = np.ones(2)
    for global_step in (np.array(7), np.array([7], np.int32), np.array([[7]], np.uint8)):
        view = global_step
        optimizer().apply_gradients([(p.copy(), p)], global_step=global_step)
        assert view == 8


def test_numbers_may_be_callables_and_may_change(backend):
    variables, start = make(0), make(0)
    asked = []
    opt = optimizer(backend, learning_rate=lambda: asked.append(0) or LR, beta1=lambda: BETA1, beta2=lambda: BETA2,
                    epsilon=lambda: EPSILON)  # fmt: skip
    reference = Reference(start)
    for t in range(3):
        opt.apply_gradients(pairs(make(t + 1), variables))
        reference.apply(make(t + 1))
    assert_close(opt, variables, reference, start)
    assert len(asked) == 3
    opt.learning_rate = 0
    before = copy.deepcopy(variables)
    opt.apply_gradients(pairs(make(1), variables))
    assert_same_bits(before, before.values(), variables.values())


def test_more_sets_than_are_kept(backend):
    variables, start = make(0), make(0)
    opt, reference = optimizer(backend), Reference(start)
    subsets = [[n for k, n in enumerate("abcde") if bits >> k & 1] for bits in range(1, 32)]
    for t, names in enumerate(subsets * 2):
        grads = make(t, names=names)
        opt.apply_gradients(pairs(grads, variables))
        reference.apply(grads)
    assert_close(opt, variables, reference, start)


def test_prepare_makes_the_slots(backend):
    variables = make(0)
    opt = optimizer(backend)
    opt.prepare(list(variables.values()))
    assert (opt.backend, opt.t) == (backend, 0)
    assert all((opt.get_slot(v, "m") == 0).all() for v in variables.values())
    slot = opt.get_slot(variables["a"], "m")
    opt.apply_gradients(pairs(make(1), variables))
    assert same_bits(slot, (1 - BETA1) * make(1)["a"])


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_continues_bit_for_bit(backend, how):
    variables = make(0, np.float32)
    opt = optimizer(backend)
    for t, names in enumerate(CALLS):
        opt.apply_gradients(pairs(make(t + 1, np.float32, names), variables))
    if how == "pickle":
        other, others = pickle.loads(pickle.dumps((opt, variables)))
    elif how == "deepcopy":
        other, others = copy.deepcopy((opt, variables))
    else:
        others = copy.deepcopy(variables)
        other = optimizer(backend)
        other.load_state_dict(opt.state_dict(), list(others.values()))
    for t, names in enumerate(CALLS):
        grads = make(t + 50, np.float32, names)
        opt.apply_gradients(pairs(grads, variables))
        other.apply_gradients(pairs(grads, others))
    assert opt.t == other.t == 14
    assert_same_bits(variables, variables.values(), others.values())
    assert repr(other) == repr(opt)


def test_a_copy_of_an_unused_one():
    assert repr(copy.deepcopy(AdamOptimizer(name="mine"))) == repr(AdamOptimizer(name="mine"))
    assert "learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-08, name='mine'" in repr(AdamOptimizer(name="mine"))


def test_a_state_dict_that_does_not_fit():
    p = np.ones(3)
    opt = optimizer()
    opt.apply_gradients([(np.ones(3), p)])
    other, q = optimizer(), np.ones(4)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        other.load_state_dict(opt.state_dict(), [q])
    assert other.t == 0 and other.get_slot(q, "m") is None
    with pytest.raises(ValueError, match="'Adam' but this is AdamOptimizer"):
        other.load_state_dict(fused_adam.Adam(q).state_dict(), [q])
    with pytest.raises(ValueError, match="empty"):
        other.state_dict()


def test_ctrl_c_during_a_step_comes_after_it(monkeypatch):
    """With the step count, the slots and global_step of that step."""
    assert threading.current_thread() is threading.main_thread()
    p, global_step = np.ones(3), np.zeros(1, np.int64)
    opt = optimizer()
    right = fused_adam.Adam.apply_gradients

    def interrupted(self, given):
        signal.raise_signal(signal.SIGINT)
        right(self, given)

    monkeypatch.setattr(fused_adam.Adam, "apply_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.apply_gradients([(np.ones(3), p)], global_step)
    assert opt.t == global_step == 1
    assert (p < 1).all() and (opt.get_slot(p, "m") > 0).all()


# --- what is refused --------------------------------------------------------------------------------------------------

KNOWN = np.ones((2, 3))
READ_ONLY = np.ones(2)
READ_ONLY.flags.writeable = False
NEW = np.ones(2)

WRONG = [
    (lambda k: [(None, k), (None, NEW)], ValueError, "Adam: no variable has a gradient; pass at least one"),
    (lambda k: [], ValueError, "no variable has a gradient"),
    (lambda k: [np.ones(3)], TypeError, r"grads_and_vars\[0\] should be a \(gradient, variable\) pair"),
    (lambda k: [(np.ones(2), NEW), (np.ones((3, 2)), k)], ValueError, r"grads_and_vars\[1\]\[0\] has shape \(3, 2\)"),
    (lambda k: [(None, NEW), (k.astype("f4"), k)], ValueError, r"grads_and_vars\[1\]\[0\] has dtype float32"),
    (lambda k: [(np.ones(2), NEW), ([1.0], k)], TypeError, r"grads_and_vars\[1\]\[0\] should be a NumPy array"),
    (lambda k: [(np.ones((2, 3)), k), (np.ones((2, 3)), k)], ValueError, r"\[0\]\[1\] and .*\[1\]\[1\] share memory"),
    (lambda k: [(np.ones(3), k[1])], ValueError, r"grads_and_vars\[0\]\[1\] shares memory with an earlier variable"),
    (lambda k: [(np.ones((2, 3)), k[:])], ValueError, "pass the same array object in every call"),
    (lambda k: [(np.ones((2, 3)), k), (np.ones(2), READ_ONLY)], ValueError, r"\[1\]\[1\] is read-only"),
    (lambda k: [(np.ones((2, 3)), k), (np.ones(2), [1.0, 2.0])], TypeError, r"\[1\]\[1\] should be a NumPy array"),
    (lambda k: [(np.ones(2), NEW), (np.ones(2, int), np.ones(2, int))], ValueError, r"\[1\]\[1\] has dtype int64"),
    (lambda k: [(k, k), (np.ones(2), NEW)], ValueError, r"grads_and_vars\[0\]\[0\] overlaps"),
    (
        lambda k: [(np.ones(2), NEW), (SparseGrad([2], np.ones((1, 3))), k)],
        ValueError,
        r"\[1\]\[0\]\.indices\[0\] is 2",
    ),
    (lambda k: [(np.ones(2), NEW), (SparseGrad([1], np.ones((2, 3))), k)], ValueError, r"\[1\]\[0\]\.values has shape"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_a_wrong_pair_changes_nothing(backend, given, error, message):
    variable, global_step = KNOWN.copy(), np.zeros(1, np.int64)
    opt = AdamOptimizer(backend=backend)
    opt.apply_gradients([(np.ones((2, 3)), variable)], global_step)
    before = [variable.copy(), *(a.copy() for a in opt.variables())]
    with pytest.raises(error, match=message):
        opt.apply_gradients(given(variable), global_step)
    assert_same_bits("pmv", [variable, *opt.variables()], before)
    assert opt.t == global_step == 1
    assert (NEW == 1).all() and opt.get_slot(NEW, "m") is None
    opt.apply_gradients([(np.ones((2, 3)), variable), (np.ones(2), NEW.copy())], global_step)  # and it goes on
    assert opt.t == global_step == 2


@pytest.mark.parametrize(
    ("global_step", "error", "message"),
    [
        (3, TypeError, "a NumPy array of one integer, as np.zeros"),
        (np.int64(3), TypeError, "a NumPy array of one integer"),
        (np.zeros(2, np.int64), TypeError, "one integer"),
        (np.zeros(1), TypeError, "one integer"),
        (np.zeros(1, bool), TypeError, "one integer"),
        (np.ma.zeros(1, np.int64), TypeError, "one integer"),
        (np.broadcast_to(np.int64(3), (1,)), TypeError, "read-only"),
        (np.array(127, np.int8), ValueError, "127, the largest number of int8"),
    ],
)
def test_a_wrong_global_step_changes_nothing(global_step, error, message):
    p = np.ones(2)
    opt = optimizer()
    with pytest.raises(error, match=message):
        opt.apply_gradients([(np.ones(2), p)], global_step)
    assert (p == 1).all() and opt.t == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learning_rate": -1}, ValueError, "learning_rate should be at least 0"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate should be a number"),
        ({"beta1": 1.0}, ValueError, r"beta1 should be in \[0, 1\)"),
        ({"beta2": float("nan")}, ValueError, "beta2 should be finite"),
        ({"epsilon": -1e-8}, ValueError, "epsilon should be at least 0"),
    ],
)
def test_wrong_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        AdamOptimizer(**arguments)
    p = np.ones(2)
    opt = AdamOptimizer(**{name: lambda value=value: value for name, value in arguments.items()})
    with pytest.raises(error, match=message):
        opt.apply_gradients([(np.ones(2), p)])
    assert (p == 1).all() and opt.t == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"use_locking": 1}, TypeError, "use_locking should be True or False"),
        ({"name": None}, TypeError, "name should be a string"),
        ({"backend": "tf"}, ValueError, "backend should be 'auto' or one of"),
    ],
)
def test_other_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AdamOptimizer(**arguments)


@pytest.mark.parametrize(
    ("loss_and_grads", "error", "message"),
    [
        (1.0, TypeError, "loss_and_grads should be callable, got a float; pass a function"),
        (lambda: 1.0, TypeError, r"should return \(loss, list of gradients\), got a float"),
        (lambda: (1.0, np.ones(2)), TypeError, r"\(loss, list of gradients\)"),
        (lambda: (1.0, []), ValueError, "gave 0 gradients for the 1 of var_list"),
        (lambda: (1.0, [None]), ValueError, "named: no variable has a gradient"),
    ],
)
def test_wrong_losses(loss_and_grads, error, message):
    p = np.ones(2)
    opt = optimizer()
    with pytest.raises(error, match=message):
        opt.minimize(loss_and_grads, [p], name="named")
    assert (p == 1).all() and opt.t == 0
