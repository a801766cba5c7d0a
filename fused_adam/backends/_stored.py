"""Gradients of parameters that are kept in 16 bits, or that have them."""

from __future__ import annotations

from collections.abc import Sequence

from fused_adam import _checks, _formats
from fused_adam._arrays import Array, carried, kind_of
from fused_adam._layout import FlatBuffer
from fused_adam.backends import Gradients, Kept, Placed, Rows


def gradients(part: Rows, given: Gradients | Placed) -> tuple[Kept, Sequence[Array]]:
    """How the part is kept, the gradient's kind with it, and 1-D gradients of its rows, or its runs if they are flat.

    Raises TypeError or ValueError: one is wrong, or is not offered.
    """
    kept = part.kept
    assert kept is not None
    if isinstance(given, Placed):
        return kept, given.arrays(part)
    if isinstance(given, FlatBuffer):
        name, kinds = "the flat buffer of gradients", {kind_of(given.layout.dtype, kept.declared)}
        arrays = [carried(run, *kinds) for run in given.runs]
    else:
        each = zip(given.names, given.arrays, given.parameters, strict=True)
        found = [_checks.kept_gradient(n, g, p, kept.declared) for n, g, p in each]
        arrays, kinds = [g for g, _ in found], {kind for _, kind in found}
        name = given.names[0]
    form = kept.form._replace(g=_checks.one_kind(name, kinds))
    _formats.refuse_gradient(form, name)
    return kept._replace(form=form), arrays
