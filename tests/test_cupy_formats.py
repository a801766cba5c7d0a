"""Numbers in 16 and 8 bits on a GPU that is not there (see fake_cupy): the bytes of NumPy, launches, and refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import fake_cupy
import numpy as np
import pytest
from test_formats import BF16, MAKE, draw, options, rows, same_runs

import fused_adam
from fused_adam import _storage


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fake_cupy.installed(monkeypatch) as module:
        yield module


def upload(cupy: Any, arrays: list[Any]) -> list[Any]:
    return [cupy.asarray(a) for a in arrays]


def got(arrays: list[Any]) -> list[Any]:
    return [a.get() for a in arrays]


@rows
def test_bits(cupy: Any, rule: str, form: _storage.Format, stochastic: bool) -> None:
    """NumPy's, of p and all that a state dict has; in one launch a step."""
    p, q = draw(form.p, 0), upload(cupy, draw(form.p, 0))
    expected = MAKE[rule](p, backend="numpy", **options(form, stochastic))
    opt = MAKE[rule](q, **options(form, stochastic))
    assert opt.backend == "cupy"
    for n in range(1, 5):
        g = draw(form.g, n, special=n == 3)
        expected.step(g)
        opt.step(upload(cupy, g))
    same_runs(opt, expected, got(q), p)
    assert len(fake_cupy.launches) == 4


@pytest.mark.parametrize("declared", [False, True], ids=["ml_dtypes", "uint16"])
@pytest.mark.parametrize("layout", ["arrays", "flat", "flat, loose gradients"])
def test_layouts(cupy: Any, layout: str, declared: bool) -> None:
    """The same bytes in any, with random bits and blocks by canonical index; bfloat16 by its name or as uint16."""
    how = {"state_dtype": "int8", "master": "split8", "stochastic_rounding": True}

    def on_device(arrays: list[Any]) -> list[Any]:
        return upload(cupy, [a.view(np.uint16) if declared else a for a in arrays])

    p, given = draw("bfloat16", 0), on_device(draw("bfloat16", 0))
    flat = layout != "arrays"
    if flat and declared:
        q: Any = fused_adam.flatten(upload(cupy, [a.astype(np.float32) for a in p]), dtype="bfloat16")
    else:
        q = fused_adam.flatten(given) if flat else given
    expected = fused_adam.AdamW(p, backend="numpy", **how)
    opt = fused_adam.AdamW(q, dtype="bfloat16" if declared else None, **how)
    for n in range(1, 4):
        g = draw("bfloat16", n)
        expected.step(g)
        if layout == "flat":
            grads = q.zeros_like()
            for k, a in enumerate(on_device(g)):
                grads[k] = a
            opt.step(grads)
        else:
            opt.step(on_device(g))
    same_runs(opt, expected, [q[k].get().view(BF16) for k in range(len(p))], p)
    assert len(fake_cupy.launches) == 3


def test_groups_and_formats_of_one_optimizer(cupy: Any) -> None:
    """One launch for each kind of parameters, whatever their groups; another kernel where gradients come in another."""
    kinds = ("bfloat16", "float32", "float16", "bfloat16")
    p = [draw(kind, k)[3] for k, kind in enumerate(kinds)]
    q = upload(cupy, p)

    def groups(arrays: list[Any]) -> list[dict[str, Any]]:
        return [{"params": [a], "lr": 0.01 * (k + 1)} for k, a in enumerate(arrays)]

    opt = fused_adam.AdamW(groups(q))
    expected = fused_adam.AdamW(groups(p), backend="numpy")
    opt.prepare()
    assert len(fake_cupy.compiled) == 3 and not fake_cupy.launches
    for n in range(1, 5):
        g = [draw("float32" if n == 3 and kind == "bfloat16" else kind, n)[3] for kind in kinds]
        opt.step([[a] for a in upload(cupy, g)])
        expected.step([[a] for a in g])
    same_runs(opt, expected, got(q), p)
    assert len(fake_cupy.launches) == 3 * 4 and len(fake_cupy.compiled) == 4


@rows
def test_a_run_goes_on_bit_for_bit(cupy: Any, rule: str, form: _storage.Format, stochastic: bool) -> None:
    """From a state dict on the host or of it on the GPU, a pickle and a copy."""
    p = draw(form.p, 0)
    host = MAKE[rule](p, backend="numpy", **options(form, stochastic))
    host.step(draw(form.g, 1))
    q = upload(cupy, p)
    opt = MAKE[rule](q, **options(form, stochastic))
    opt.load_state_dict(host.state_dict())
    same_runs(opt, host, got(q), p)
    copied = copy.deepcopy(opt)
    unpickled = pickle.loads(pickle.dumps(opt))
    g = draw(form.g, 2)
    host.step(g)
    for one in (opt, copied, unpickled):
        one.step(upload(cupy, g))
        same_runs(one, host, got(one.param_groups[0]["params"]), p)
    again = MAKE[rule]([a.copy() for a in p], backend="numpy", **options(form, stochastic))
    again.load_state_dict(opt.state_dict())
    same_runs(again, host, p, p)


def test_scales_and_scalars_on_the_device(cupy: Any) -> None:
    """A gradient's scale is divided out, a step is skipped, and t may be kept on the device, for CUDA graphs."""
    how = {"state_dtype": "int8", "master": "split8", "stochastic_rounding": True}
    p = draw("bfloat16", 0)
    q, r = upload(cupy, p), upload(cupy, p)
    expected = fused_adam.AdamW(p, backend="numpy", **how)
    opt, on_device = fused_adam.AdamW(q, **how), fused_adam.AdamW(r, device_scalars=True, **how)
    for n in range(1, 5):
        g = [np.asarray(a.astype(np.float32) * 4, BF16) for a in draw("bfloat16", n)]
        for one, arrays in ((expected, g), (opt, upload(cupy, g)), (on_device, upload(cupy, g))):
            one.step(arrays, grad_scale=4.0, found_inf=n == 2)
    same_runs(opt, expected, got(q), p)
    same_runs(on_device, expected, got(r), p)
    assert expected.t == 3
    names = {name for name, *_ in fake_cupy.launches}
    assert names == {
        "prologue",
        "unscale_adamw_bf16_bf16_int8_split8_stochastic",
        "unscale_adamw_bf16_bf16_int8_split8_stochastic_on_device",
    }


def test_a_captured_step_is_replayed(cupy: Any) -> None:
    """With random bits and dithers of its own each time, for t is on the device."""
    how = {"state_dtype": "int8", "master": "split8", "stochastic_rounding": True}
    p, g = draw("bfloat16", 0), draw("bfloat16", 1)
    q, d = upload(cupy, p), upload(cupy, g)
    expected, opt = fused_adam.AdamW(p, backend="numpy", **how), fused_adam.AdamW(q, device_scalars=True, **how)
    opt.prepare()
    opt.step(d)
    fake_cupy.capturing.add(9)
    opt.step(d, stream=9)
    fake_cupy.capturing.clear()
    fake_cupy.replay()
    fake_cupy.replay()
    for _ in range(3):
        expected.step(g)
    same_runs(opt, expected, got(q), p)


def bf16(cupy: Any, n: int = 6) -> Any:
    return cupy.zeros(n, BF16)


REFUSED: list[tuple[str, Any, str]] = [
    ("uint16", lambda c: fused_adam.AdamW(c.zeros(6, np.uint16)), "params has dtype uint16; if it holds bfloat16 say"),
    ("a rule", lambda c: fused_adam.RMSprop(bf16(c)), "the rule rmsprop is not offered with bfloat16 parameters"),
    ("clipping", lambda c: fused_adam.AdamW(bf16(c), max_grad_norm=1.0), "max_grad_norm is not offered with bfloat16"),
    ("zeroing", lambda c: fused_adam.AdamW(bf16(c), zero_grads=True), "zero_grads is not offered with bfloat16"),
    ("counting", lambda c: fused_adam.AdamW(bf16(c), count_unmoved=True), "count_unmoved is not offered with"),
    (
        "a gradient's kind",
        lambda c: fused_adam.AdamW(bf16(c)).step(c.zeros(6, np.float16)),
        "grads: bfloat16 parameters with float16 gradients, float32 states is not offered; there are bfloat16",
    ),
    (
        "two kinds",
        lambda c: fused_adam.AdamW([bf16(c), bf16(c)]).step([bf16(c), c.zeros(6, np.float32)]),
        "dtypes bfloat16, float32; make them alike",
    ),
    (
        "a shape",
        lambda c: fused_adam.AdamW(bf16(c)).step(bf16(c, 5)),
        r"grads has shape \(5,\) but the parameter has \(6,\)",
    ),
    (
        "a gradient on the host",
        lambda c: fused_adam.AdamW(bf16(c)).step(np.zeros(6, BF16)),
        "grads is in host memory but the parameter is in the memory of GPU 0",
    ),
    (
        "a gradient on the GPU",
        lambda c: fused_adam.AdamW(np.zeros(6, BF16)).step(bf16(c)),
        "grads is in the memory of GPU 0 but the parameter is in host memory",
    ),
    (
        "half an address",
        lambda c: fused_adam.AdamW(fake_cupy.ndarray(c.zeros(13, np.uint8)._a[1:].view(BF16))),
        "params is not aligned; pass a copy",
    ),
    (
        "a gradient at half an address",
        lambda c: fused_adam.AdamW(bf16(c)).step(fake_cupy.ndarray(c.zeros(13, np.uint8)._a[1:].view(BF16))),
        "grads is not aligned; pass a copy",
    ),
    (
        "Fortran order",
        lambda c: fused_adam.AdamW(bf16(c).reshape(2, 3)).step(bf16(c).reshape(3, 2).T),
        "grads is in F order but the parameter is in C order",
    ),
    ("no float", lambda c: fused_adam.AdamW(bf16(c)).step(c.zeros(6, np.int16)), "grads has dtype int16; expected"),
]


@pytest.mark.parametrize(("name", "call", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused(cupy: Any, name: str, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(cupy)
    assert not fake_cupy.launches


def test_a_gradient_in_the_memory_of_the_step_is_refused(cupy: Any) -> None:
    p = bf16(cupy, 300)
    with pytest.raises(ValueError, match="grads overlaps a parameter or a state"):
        fused_adam.AdamW(p).step(p)


def test_bytes_on_the_device(cupy: Any) -> None:
    """Of the smallest format: 5.0625 a parameter, and nothing more in a step."""
    n = 2**16
    p, g = bf16(cupy, n), bf16(cupy, n)
    before = fake_cupy.held()
    opt = fused_adam.AdamW(p, state_dtype="int8", master="split8")
    assert p.nbytes + fake_cupy.held() - before == 5.0625 * n
    opt.prepare()
    before = fake_cupy.held()
    opt.step(g)
    assert fake_cupy.held() == before
