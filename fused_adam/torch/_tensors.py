"""Torch tensors as rows of memory: what can be stepped in place, and what has to be copied or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_adam._arrays import AnyArray, Array, CudaArray, carrier

# What parameters hold. Complex numbers are stepped as pairs of real ones, as torch does.
KINDS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.complex64: "float32",
    torch.complex128: "float64",
}
# How NumPy sees what is kept.
_CARRIERS = {dtype: carrier(kind) for dtype, kind in KINDS.items()} | {
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
    torch.int16: np.dtype(np.uint16),
}


def is_spread(t: Tensor) -> bool:
    """Whether it is a DTensor, of which this process may hold a part."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ and hasattr(t, "_local_tensor")


def local(t: Tensor) -> Tensor:
    """What this process holds of a DTensor, whose own data_ptr is 0; any other tensor itself."""
    if not is_spread(t):
        return t
    part: Tensor = t._local_tensor  # type: ignore[attr-defined] # as .to_local(), which takes 10 us
    return part.wait() if hasattr(part, "wait") else part  # a collective may not have finished it


def check_parameter(name: str, p: Tensor) -> None:
    """Raises RuntimeError, TypeError or ValueError for one that cannot be stepped in place."""
    p = local(p)
    _plain(name, p)
    if p.dtype not in KINDS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS)
        raise TypeError(f"{name} has dtype {str(p.dtype).removeprefix('torch.')}; expected one of {known}")
    if not is_dense(p):
        hint = "make it so before it is a parameter, with .contiguous()"
        raise ValueError(f"{name} has gaps or repeats in memory (strides {p.stride()} for {tuple(p.shape)}); {hint}")


def device(t: Tensor) -> int | None:
    """The number of the GPU that a tensor is on; None for host memory."""
    return t.device.index if t.device.type == "cuda" else None


def _plain(name: str, t: Tensor) -> None:
    """Raises unless the elements of t lie where it says: in plain strided memory of the host or a GPU."""
    if t.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"{name} is on {t.device}; expected host memory or a CUDA device: move it there")
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a DTensor, a fake or quantized tensor, ...
        raise TypeError(f"{name} is a {type(t).__name__}, which is no plain memory; pass its local tensor, .to_local()")
    if t.layout is not torch.strided:
        raise RuntimeError(f"{name} has layout {t.layout}; expected a dense tensor, .to_dense()")
    if t.numel():
        last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if t.untyped_storage().nbytes() < (last + 1) * t.element_size():
            raise RuntimeError(f"{name} has shape {tuple(t.shape)}, for which its storage is too small: resize it back")


def _beside(name: str, t: Tensor, p: Tensor) -> None:
    """Raises RuntimeError unless t is on the device of its parameter."""
    if t.device != p.device:
        raise RuntimeError(f"{name} is on {t.device} but its parameter is on {p.device}; pass .to({str(p.device)!r})")


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their stretch of memory in some order, each once."""
    expected = 1
    if t.numel():
        for stride, size in sorted(
            (stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1
        ):
            if stride != expected:
                return False
            expected *= size
    return True


def row(t: Tensor) -> AnyArray:
    """The elements of a dense tensor in memory order: a 1-D view, which keeps the memory."""
    dtype = _CARRIERS[t.dtype]
    where = device(t)
    if where is None:
        flat = t.detach().as_strided((t.numel(),), (1,))
        if t.dtype == torch.bfloat16:  # which NumPy does not know
            flat = flat.view(torch.int16)
        elements: Array = flat.numpy().view(dtype)
        return elements
    shape = (t.nbytes // dtype.itemsize,)
    return CudaArray(t.data_ptr(), shape, dtype, "C", True, where if t.numel() else -1, None, t.untyped_storage())


def in_order_of(t: Tensor, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of t in the shape and memory order of a dense p, by default with t's own dtype."""
    dtype = dtype or t.dtype
    copy = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return copy.copy_(t.detach())


def gradient(name: str, g: Tensor, p: Tensor) -> Tensor:
    """A gradient in the memory order of its parameter: itself, or a copy; what this process holds of a DTensor's.

    Raises RuntimeError, TypeError or ValueError where it does not fit.
    """
    if g.layout is not torch.strided:
        raise RuntimeError(f"{name} is sparse; sparse gradients are not supported: pass a dense one, .to_dense()")
    if is_spread(p):
        _both_spread(name, g, p)
        if _way(g) != _way(p):  # a sum that is still to be taken, for one
            g = g.detach().redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        g, p = local(g), local(p)
    _plain(name, g)
    _beside(name, g, p)
    if g.dtype != p.dtype:
        raise TypeError(f"{name} has dtype {g.dtype} but its parameter has {p.dtype}; pass .to({p.dtype})")
    if g.shape != p.shape:
        raise ValueError(f"{name} has shape {tuple(g.shape)} but its parameter has {tuple(p.shape)}")
    if g.stride() == p.stride() and not g.is_conj() and not g.is_neg():
        return g
    return in_order_of(g, p)


def zeroable(name: str, g: Tensor) -> None:
    """Raises ValueError for a gradient of which one element stands for several, which torch does not write."""
    if g.numel() and any(n > 1 and not stride for n, stride in zip(g.shape, g.stride(), strict=True)):
        raise ValueError(f"{name} is expanded, which zero_grads cannot zero; pass it .contiguous()")


def state(name: str, s: Any, p: Tensor, dtype: torch.dtype, shape: tuple[int, ...], blocked: bool) -> Tensor:
    """What is kept of a parameter, in its memory order: itself, or a copy. blocked: it has scales for blocks of memory.

    Raises RuntimeError, TypeError or ValueError if it does not fit.
    """
    if not isinstance(s, Tensor):
        raise TypeError(f"{name} should be a tensor, got {type(s).__name__}")
    fits(name, s, p, shape)
    _plain(name, local(s))
    _beside(name, local(s), local(p))
    if s.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {s.dtype}, expected {dtype} beside a parameter of {p.dtype}; "
            "convert the one that is wrong, or load_state_dict what was saved"
        )
    if tuple(p.shape) != shape or local(s).stride() == local(p).stride():
        return s
    if blocked:
        raise ValueError(f"{name} is not in the memory order of its parameter, by which its blocks go; load it anew")
    return in_order_of(s, p)


def fits(name: str, s: Tensor, p: Tensor, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless a state has its shape, and is spread as its parameter is."""
    if tuple(s.shape) != shape:
        expected = "but its parameter has" if shape == tuple(p.shape) else "beside its parameter, expected"
        raise ValueError(f"{name} has shape {tuple(s.shape)} {expected} {shape}")
    _both_spread(name, s, p)
    if is_spread(p) and _way(s) != _way(p):
        raise ValueError(f"{name} is spread by {_way(s)} but its parameter by {_way(p)}; .redistribute() it")


def _both_spread(name: str, t: Tensor, p: Tensor) -> None:
    if is_spread(t) != is_spread(p):
        kinds = ["a DTensor" if is_spread(x) else "a plain tensor" for x in (t, p)]
        fix = "get_optimizer_state_dict and set_optimizer_state_dict of torch.distributed.checkpoint carry states over"
        raise TypeError(f"{name} is {kinds[0]} but its parameter is {kinds[1]}; {fix}")


def _way(t: Tensor) -> tuple[Any, Any]:
    """How the elements of a DTensor lie on which devices."""
    return t.placements, t.device_mesh  # type: ignore[attr-defined]


def steps(name: str, step: Any) -> int:
    """The number of steps done, from torch's `step`: a tensor of one, or a number. Raises TypeError or ValueError."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} should be a number or a tensor of one, got {type(step).__name__}")
    if not (0 <= value < 2**63 - 1 and value == int(value)):
        raise ValueError(f"{name} should be a whole number of steps, got {value}")
    return int(value)
