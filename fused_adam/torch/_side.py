"""What steps over the parameters in the memory of one device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_adam import _checks, _numbers
from fused_adam._formats import Storage, describe
from fused_adam._guard import Settings, Stats
from fused_adam._runner import Runner
from fused_adam._update import Update
from fused_adam.backends import Kept, Placed, Rows, choose, load
from fused_adam.torch import _tensors
from fused_adam.torch._members import Member


class Side:
    """Steps over members that are on one device, in the order of their parts.

    Args:
        on_device: whether t may be kept there, which is then the same for all.
        storage: what was asked for numbers of fewer bits. With any, t is the same for all, too.

    Attributes:
        slices: which of its members each part is.
        on_device: whether t is kept on the device.
        t: the count of steps of each part; where it is kept on the device, as it was when last asked for.

    Raises:
        ValueError, RuntimeError: the backend cannot step over these.
    """

    def __init__(
        self, members: Sequence[Member], backend: str, settings: Settings, on_device: bool, storage: Storage
    ) -> None:
        self.members = members
        self._device = members[0].part.device
        starts = [k for k, m in enumerate(members) if k == 0 or m.part != members[k - 1].part]
        self.slices = [slice(*ends) for ends in pairwise([*starts, len(members)])]
        parts = [members[k].part for k in starts]
        self._groups = [part.group for part in parts]
        self._dtypes = [part.dtype for part in parts]
        self.t = [part.t for part in parts]
        rows = [tuple(map(_tensors.row, map(_tensors.local, (m.p, *m.states)))) for m in members]
        self._writes = _checks.Extents(a for row in rows for a in row)
        self._nbytes = np.array([row[0].nbytes for row in rows], np.int64)
        tables = []
        for part, s in zip(parts, self.slices, strict=True):
            kept = None if part.form is None else Kept(part.form, storage.seed, None)
            tables.append(Rows(part.dtype, [], rows[s], [], kept, [m.at for m in members[s]]))
        name = choose(backend, sum(row[0].size for row in rows), self._device)
        if settings.device_scalars and name != "cupy":
            raise ValueError(
                f"capturable=True needs parameters on a GPU and CuPy, got the {name} backend; leave it out"
            )
        if name == "numba-cuda" and any(part.form is not None for part in parts):
            raise ValueError(f"{members[0].name}: the numba-cuda backend steps over 32 and 64 bits alone; install CuPy")
        stepper = load(name).Stepper(tables, np.zeros(1, np.int64), self._writes)
        self._runner = Runner(stepper, self._dtypes, name, settings, on_device)
        self.on_device = self._runner.on_device
        if self.on_device:
            stepper.set_t(self.t[0])
        self._accepted: list[int] = []
        self._placed: list[Placed] = []

    def prepare(self, updates: Sequence[Update]) -> None:
        """Compile and allocate what a step needs, and send to the device what it keeps."""
        self._runner.prepare([updates[group] for group in self._groups])

    def ready(self, addresses: list[int], updates: Sequence[Update]) -> None:
        """Take the next step's gradients, each in the memory order of its parameter, and find its coefficients.

        Raises ValueError where a gradient overlaps a write, or a dtype cannot hold a coefficient.
        """
        if addresses != self._accepted:
            places = np.array(addresses, np.int64)
            hit = self._writes.first_overlap(places, self._nbytes)
            if hit >= 0:
                raise _checks.overlap(f"the gradient of {self.members[hit].name}")
            self._placed = [Placed(places[s], self._nbytes[s]) for s in self.slices]
            self._accepted = addresses
        self._next, self._updates, self._values = [], [], []
        for group, dtype, t in zip(self._groups, self._dtypes, self.t, strict=True):
            update = updates[group]
            values = update.at(t + 1)
            _numbers.coefficients(update.rule.coefficients, values, dtype)
            self._next.append(t + 1)  # here, for once the step is done nothing may fail
            self._updates.append(update)
            self._values.append(values)

    def step(self, scale: Any, found: Any) -> bool:
        """The step that it is ready for. False if it was skipped, as far as the host knows."""
        options = () if self._device is None else (torch.cuda.current_stream(self._device).cuda_stream,)
        if isinstance(scale, Tensor) or isinstance(found, Tensor):
            scale, found = self._scalar(scale), self._scalar(found)
        if self.on_device:
            self._runner.step_on_device(self._updates, self._placed, scale, found, *options)
            return True
        done = self._runner.step(self._next[0], self._updates, self._values, self._placed, scale, found, options)
        if done:
            self.t = self._next
        return done

    def _scalar(self, x: Any) -> Any:
        """A number, or a tensor that stays where it is."""
        return x.item() if isinstance(x, Tensor) and not (self.on_device and x.is_cuda) else x

    def sync(self) -> None:
        """Ask the device for t."""
        if self.on_device:
            self.t = [int(self._runner.stepper.control()["t"])] * len(self.t)

    @property
    def captured(self) -> bool:
        """Whether a step was captured in a CUDA graph, which reads the stepper's tables at each replay."""
        return self._device is not None and self._runner.stepper.captured

    def last_stats(self) -> Stats:
        """What the last step met."""
        return self._runner.last_stats()


def sides(members: Sequence[Member], backend: str, settings: Settings, storage: Storage) -> list[Side]:
    """One for each device, or for each device and t where t is kept there, or where random bits depend on it."""
    for m in members:
        on_gpu = m.part.device is not None
        asked = settings._replace(device_scalars=False).names if on_gpu else "count_unmoved" * settings.counts
        if m.part.form is not None and asked:
            raise ValueError(f"{m.name}: {asked} is not offered with {describe(m.part.form)}; leave one of them out")
    on_device = settings.on_device
    if settings.wants_norm and not settings.device_scalars and not settings.counts:
        on_device = len({m.part.t for m in members}) == 1  # or one norm for several t: the host waits for it
    found: dict[Any, list[Member]] = {}
    stored = any(m.part.form is not None for m in members)
    for m in sorted(members, key=_order):
        one_t = (on_device and m.part.device is not None) or stored
        found.setdefault((m.part.device, m.part.t if one_t else None), []).append(m)
    if len(found) > 1 and (settings.wants_norm or settings.counts):
        where = ", ".join(f"{_checks.place(device)}{'' if t is None else f' at step {t}'}" for device, t in found)
        raise ValueError(f"{settings.names} needs parameters in one place, at one step; these are in {where}")
    return [Side(some, backend, settings, on_device, storage) for some in found.values()]


def _order(m: Member) -> tuple[Any, ...]:
    device, group, dtype, t, form = m.part
    return -1 if device is None else device, t, group, dtype.char, str(form)
