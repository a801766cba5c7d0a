"""Wrong arrays, gradients and numbers are refused by name, on every backend, before a byte is written."""

from __future__ import annotations

import copy
import importlib.util
import itertools

import numpy as np
import pytest
from watch import adam_arrays, misaligned, random, refused

import fused_adam


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def torch_tensor(a):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    import torch

    return torch.from_numpy(a.copy())


class ArrayLike:
    """What NumPy's own functions would convert without a word, and so lose the update."""

    def __init__(self, a):
        self.__array_interface__ = a.__array_interface__


# Each turns a good 1-D float32 array of ten into a wrong one; then what the message says of it.
WRONG = {
    "int64": (lambda a: a.astype(np.int64), r"dtype int64; expected float32 or float64"),
    "uint8": (lambda a: a.astype(np.uint8), r"dtype uint8; expected"),
    "complex": (lambda a: a.astype(np.complex64), r"dtype complex64; expected"),
    "longdouble": (lambda a: a.astype(np.longdouble), r"dtype \w+; expected float32 or float64|dtype float64 but"),
    "complex64": (lambda a: a.astype(np.complex64), r"dtype complex64; expected"),
    "object": (lambda a: a.astype(object), r"dtype object; expected"),
    "bool": (lambda a: a.astype(bool), r"dtype bool; expected"),
    "structured": (lambda a: a.astype([("x", "f4")]), r"dtype .*x.*; expected"),
    "big-endian": (lambda a: a.astype(">f4"), r"byte order of another machine; pass .*astype\('float32'\)"),
    "reversed": (lambda a: a[::-1], r"not contiguous \(strides \(-4,\)\)"),
    "every second": (lambda a: np.repeat(a, 2)[::2], r"not contiguous \(strides \(8,\)\)"),
    "stride 0": (lambda a: np.broadcast_to(a[:1], a.shape), r"broadcast \(a stride is 0\)|not contiguous"),
    "writable, stride 0": (lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0,)), r"stride is 0|not contig"),
    "masked": (
        lambda a: np.ma.masked_array(a, a > 0),
        r"should be a NumPy array or one on a GPU, got a numpy\.MaskedArray",
    ),
    "list": (
        lambda a: a.tolist(),
        r"should be a NumPy array or one on a GPU, got a |too many|has no parameter|should be one array",
    ),
    "None": (lambda a: None, r"None"),
    "scalar": (lambda a: a[0], r"should be a NumPy array or one on a GPU, got a NumPy scalar of float32"),
    "float": (lambda a: 1.0, r"should be a NumPy array or one on a GPU, got a float"),
    "string": (lambda a: "abc", r"should be a NumPy array or one on a GPU, got a str"),
    "bytes": (lambda a: a.tobytes(), r"should be a NumPy array or one on a GPU, got a bytes"),
    "memoryview": (lambda a: memoryview(a), r"should be a NumPy array or one on a GPU, got a memoryview"),
    "generator": (lambda a: (x for x in a), r"should be a NumPy array or one on a GPU, got a generator"),
    "array-like": (ArrayLike, r"should be a NumPy array or one on a GPU, got a test_checks\.ArrayLike"),
    "torch": (torch_tensor, r"should be a NumPy array or one on a GPU, got a torch\.Tensor"),
}
# Wrong only beside the others.
UNLIKE = {
    "shorter": (lambda a: a[:-1], r"shape \(9,\)|shape \(10,\) but p has \(9,\)"),
    "longer": (lambda a: np.append(a, a[:1]), r"shape \(11,\)|shape \(10,\) but p has \(11,\)"),
    "2-D": (lambda a: a.reshape(2, 5), r"shape \(2, 5\)|but p has \(2, 5\)"),
    "0-d": (lambda a: a[:1].reshape(()), r"shape \(\)|but p has \(\)"),
    "float64": (lambda a: a.astype(np.float64), r"dtype float64|but p has float64"),
}
READ_ONLY = {"read-only": (read_only, r"is read-only; pass a writable array or a copy")}


@pytest.mark.parametrize("what", WRONG | UNLIKE | READ_ONLY)
@pytest.mark.parametrize("name", ["p", "g", "m", "v", "max_v"])
def test_adam_step_refuses_a_wrong_array(name, what, backend):
    arrays = adam_arrays(0, max_v=True)
    make, message = (WRONG | UNLIKE | READ_ONLY)[what]
    if (name, what) in {("g", "read-only"), ("max_v", "None")}:
        return  # g is only read; max_v=None is plain Adam
    arrays[name] = make(arrays[name])
    for five in (True, False):  # with max_v the compiled call is not asked
        if not five:
            del arrays["max_v"]
        if name in arrays:
            with refused(rf"(?=.*\b{name}\b).*({message})", arrays):
                fused_adam.adam_step(**arrays, step=1, backend=backend)


@pytest.mark.parametrize("what", WRONG | READ_ONLY)
def test_optimizers_refuse_a_wrong_parameter(what, backend):
    good, bad = random(0, 10, 10)
    make, message = (WRONG | READ_ONLY)[what]
    bad = make(bad)
    where = r'params\["a"\]\[1\](\[0\])?'  # a list is taken for more of the tree, and its leaf is named
    with refused(rf"{where}.*({message})", good, bad):
        fused_adam.Adam({"a": [good, bad]}, backend=backend)
    where = r'params\[1\]\["params"\]\["x"\](\[0\])?'
    with refused(rf"{where}.*({message})", good, bad):
        fused_adam.SGD([{"params": good}, {"params": {"x": bad}}], backend=backend)


@pytest.mark.parametrize("what", WRONG | UNLIKE)
@pytest.mark.parametrize("flat", [False, True])
def test_step_refuses_a_wrong_gradient(what, flat, backend):
    params = {"a": [*random(0, 10, 10)]}
    grads = {"a": [*random(1, 10, 10)]}
    opt = fused_adam.Adam(fused_adam.flatten(params) if flat else params, backend=backend)
    opt.step(grads)
    make, message = (WRONG | UNLIKE)[what]
    grads["a"][1] = make(grads["a"][1])
    with refused(rf'grads\["a"\]\[1\].*({message})', opt, params, grads):
        opt.step(grads)
    if not flat:
        with refused(rf'grads\["a"\]\[1\].*({message})|.*list.*', opt, params, grads):
            opt.apply_gradients(list(zip(grads["a"], params["a"], strict=True)))


@pytest.mark.parametrize("pair", list(itertools.combinations(["p", "g", "m", "v", "max_v"], 2)), ids="-".join)
@pytest.mark.parametrize("n", [10, 2**18])  # the large array takes another way through the compiled call
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adam_step_refuses_overlap(pair, n, dtype, backend):
    arrays = adam_arrays(0, n, dtype, max_v=True)
    buffer = np.ones(3 * n + 1, dtype)
    for shift in (0, 1, -1, n - 1, 1 - n):
        arrays[pair[0]] = buffer[n : 2 * n]
        arrays[pair[1]] = buffer[n + shift : 2 * n + shift]
        for five in (True, False):
            if five or "max_v" not in pair:
                given = {name: a for name, a in arrays.items() if five or name != "max_v"}
                with refused(rf"{pair[0]} and {pair[1]} share memory|{pair[1]} and {pair[0]} share", arrays):
                    fused_adam.adam_step(**given, step=1, backend=backend)
    for shift in (n, -n):  # neighbours
        arrays[pair[1]] = buffer[n + shift : 2 * n + shift]
        fused_adam.adam_step(**arrays, step=1, backend=backend)
        if "max_v" not in pair:
            fused_adam.adam_step(**{k: a for k, a in arrays.items() if k != "max_v"}, step=1, backend=backend)


def test_adam_step_refuses_an_overlap_of_one_byte(backend):
    arrays = adam_arrays(0)
    raw = np.zeros(200, np.uint8)
    arrays["m"] = raw[:40].view(np.float32)
    arrays["v"] = raw[39:79].view(np.float32)
    with refused("m and v share memory", arrays):
        fused_adam.adam_step(**arrays, step=1, backend=backend)
    arrays["v"] = raw[40:80].view(np.float32)
    fused_adam.adam_step(**arrays, step=1, backend=backend)


def test_optimizers_refuse_parameters_that_share_memory(backend):
    buffer = np.ones(30, np.float32)
    a, b, c = buffer[:10], buffer[9:19], buffer[10:20]
    other = buffer.view(np.float64)[:4]
    for tree, names in (
        ([a, a], r"params\[0\] and params\[1\]"),
        ({"x": a, "y": b}, r'params\["x"\] and params\["y"\]'),
        ([c, [a, b]], r"params\[1\]\[\d\] and params\[(1\]\[\d|0)\]"),
        ([a, buffer[2:4]], r"params\[0\] and params\[1\]"),
        ([buffer[2:4], a, buffer[:1]], "params"),
        ([a, other], "params"),
        ([{"params": a}, {"params": [c, a]}], r'params\[0\]\["params"\] and params\[1\]\["params"\]\[1\]'),
    ):
        with refused(rf"{names}.*share memory; pass each parameter once", buffer):
            fused_adam.Adam(tree, backend=backend)
    fused_adam.Adam([a, c, buffer[20:20], buffer[20:20]], backend=backend)  # empty arrays share nothing


def test_step_refuses_a_gradient_in_memory_that_it_writes(backend):
    p = np.ones(40, np.float32)
    q, g = random(0, 10, 10)
    opt = fused_adam.Adam([p[10:20], q], backend=backend)
    opt.step([g.copy(), g])
    states = opt._parts[0].states
    for wrong in (p[10:20], p[1:11], p[19:29], q, states["m"].data[:10], states["v"].data[5:15]):
        with refused(r"grads\[0\] overlaps a parameter or a state that the step writes", opt, p, q):
            opt.step([wrong, g])
        with refused(r"grads\[1\] overlaps", opt, p, q):
            opt.step([g, wrong])
    same = (g, g)  # two gradients may share: they are only read
    opt.step(same)
    opt.step([p[:10], p[20:30]])  # neighbours


def test_step_refuses_flat_buffers_that_it_writes(backend):
    first, second = (fused_adam.flatten(random(k, 10, 3)) for k in (0, 1))
    opt = fused_adam.Adam(first, backend=backend)
    with refused("grads overlaps a parameter", opt, first.data):
        opt.step(first)
    with refused(r"grads\[0\] overlaps a parameter", opt, first.data):
        opt.step(first.tree)
    opt = fused_adam.Adam([{"params": first}, {"params": second}], backend=backend)
    with refused(r"grads\[0\].* overlaps", opt, first.data, second.data):
        opt.step([second, first.zeros_like()])
    with refused(r"grads\[1\].* overlaps", opt, first.data, second.data):
        opt.step([first.zeros_like(), first])


A, B = random(9, 4, (2, 3))
STRUCTURES = [  # params, grads, message
    ({"a": A, "b": B}, {"a": A}, r'grads\["b"\] is missing; grads has "a"'),
    ({"a": A, "b": B}, {"a": A, "b": B, "c": B}, r'grads\["c"\] has no parameter; the parameters are "a", "b"'),
    ({"a": A}, {"A": A}, r'grads\["A"\] has no parameter'),
    ({1: A}, {"1": A}, r'grads\["1"\] has no parameter; the parameters are 1'),
    ({"a": A}, A, r"grads should be a dict like the parameters, got a NumPy array"),
    ({"a": A}, [A], r"grads should be a dict like the parameters, got a (list|tuple)"),
    ([A, B], [A], r"grads has 1 entries but there are 2 parameters"),
    ([A, B], [A, B, B], r"grads has 3 entries but there are 2 parameters"),
    ([A, B], {"a": A}, r"grads should be a list like the parameters, got a (dict|mappingproxy)"),
    ([A, B], A, r"grads should be a list like the parameters"),
    ([A, B], (x for x in (A, B)), r"grads should be a list like the parameters, got a generator"),
    ([A, B], None, r"grads should be a list like the parameters, got None"),
    ([A, B], [A, None], r"grads\[1\] is None; pass an array, or leave"),
    ([A, B], [B, A], r"grads\[0\] has shape \(2, 3\) but the parameter has \(4,\)"),
    ([A, B], [A, [B]], r"grads\[1\] should be one array like the parameter, got a (list|tuple)"),
    (A, [A], r"grads should be one array like the parameter, got a (list|tuple)"),
    (A, None, r"grads is None"),
    ({"x": [A, {"y": B}]}, {"x": [A, {"y": [B]}]}, r'grads\["x"\]\[1\]\["y"\] should be one array'),
    ({"x": [A, {"y": B}]}, {"x": [A, B]}, r'grads\["x"\]\[1\] should be a dict like the parameters'),
    ([{"params": A}, {"params": [B]}], [A], r"grads has 1 entries but there are 2 groups"),
    ([{"params": A}, {"params": [B]}], A, r"grads should be a list with one entry for each group"),
    ([{"params": A}, {"params": [B]}], [A, B], r"grads\[1\] should be a list like the parameters"),
    ([{"params": A}, {"params": [B]}], [A, [A]], r"grads\[1\]\[0\] has shape \(4,\) but the parameter has \(2, 3\)"),
    ([{"params": A}, {"params": [B]}], {"params": [A, [B]]}, r"grads should be a list with one entry for each group"),
]


@pytest.mark.parametrize(("params", "grads", "message"), STRUCTURES)
@pytest.mark.parametrize("flat", [False, True])
def test_step_refuses_a_wrong_structure(params, grads, message, flat, backend):
    params = copy.deepcopy(params)
    groups = isinstance(params, list) and isinstance(params[0], dict)
    if flat and groups:
        return
    tree = fused_adam.flatten(params) if flat else params
    opt = fused_adam.Adam(tree, backend=backend)
    with refused(message, opt, params, A, B, tree.data if flat else None):
        opt.step(grads)
    if flat and isinstance(grads, dict | list) and grads and not any(x is None for x in grads):
        with refused(message, opt, tree.data):  # a flat buffer of another structure
            opt.step(fused_adam.flatten(grads))


def test_apply_gradients_refuses_wrong_pairs(backend):
    a, b, c = random(0, 4, (2, 3), 4)
    opt = fused_adam.Adam({"a": a, "b": b}, backend=backend)
    for pairs, message in (
        ([(A, a)], r'the gradient of params\["b"\] is missing'),
        ([(A, a), (B, b), (A, a)], r"grads_and_vars\[2\]: this parameter came before"),
        ([(A, a), (B, b), (A, c)], r"grads_and_vars\[2\]: not a parameter of this optimizer"),
        ([(A, a.copy()), (B, b)], r"grads_and_vars\[0\]: not a parameter of this optimizer"),
        ([(A, a), B], r"grads_and_vars\[1\] should be a \(gradient, parameter\) pair, got a NumPy array"),
        ([(A, a), (B, b, b)], r"grads_and_vars\[1\] should be a \(gradient, parameter\) pair, got a tuple"),
        ([(A, a), (None, b)], r'grads\["b"\] is None'),
        ([(B, a), (A, b)], r'grads\["a"\] has shape \(2, 3\) but the parameter has \(4,\)'),
        (None, r"not iterable"),
        ([], "is missing"),
    ):
        with refused(message, opt, a, b):
            opt.apply_gradients(pairs)
    opt.apply_gradients(iter([(B, b), (A, a)]))
    assert opt.t == 1


@pytest.mark.parametrize("tree", [[], {}, (), [[], {}], {"a": []}, [{"params": []}], [{"params": {}}, {"params": A}]])
def test_nothing_to_optimize_is_refused(tree, backend):
    with refused("is empty; pass at least one array", A):
        fused_adam.Adam(tree, backend=backend)
    with refused("is empty; pass at least one array"):
        fused_adam.flatten([] if tree == [{"params": {}}, {"params": A}] else tree)


def test_flatten_refuses_wrong_leaves_and_dtypes():
    for tree, dtype, message in (
        ([A, B.astype(np.float64)], None, r"tree\[1\] has dtype float64 but tree\[0\] has float32; pass dtype="),
        ({"a": A.astype(np.int32)}, None, r'tree\["a"\] has dtype int32; expected float32 or float64'),
        ([A.astype(complex)], np.float32, r"tree\[0\] has dtype complex128, which does not convert to float32"),
        ([A, None], np.float32, r"tree\[1\] should be a NumPy array or one on a GPU, got None"),
        ([A, 1.0], None, r"tree\[1\] should be a NumPy array or one on a GPU, got a float"),
        (
            [np.ma.masked_array(A)],
            np.float32,
            r"tree\[0\] should be a NumPy array or one on a GPU, got a numpy.MaskedArray",
        ),
        ([A], np.complex64, r"dtype should be float32, float64, float16 or bfloat16, got complex64"),
        ([A], np.uint16, r"dtype should be float32, float64, float16 or bfloat16, got uint16"),
        ([A], ">f4", r"dtype should be float32, float64, float16 or bfloat16, got >f4"),
        ([A], "f4,(", r"dtype should be float32, float64, float16 or bfloat16, got 'f4,\('"),
        ([A], object(), r"dtype should be float32, float64, float16 or bfloat16"),
    ):
        with refused(message, A):
            fused_adam.flatten(tree, dtype)


def test_misaligned_is_no_reason_to_refuse(backend):
    arrays = {name: misaligned(a) for name, a in adam_arrays(0).items()}
    fused_adam.adam_step(**arrays, step=1, backend=backend)
    fused_adam.Adam([arrays["p"]], backend=backend).step([arrays["g"]])
